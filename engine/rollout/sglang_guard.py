"""Between a leader rank and its SGLang server: `python -m tandem.engine.rollout.sglang_guard LEADER_PID FOLDER COMMAND…`.

SGLang is several processes, and killing them leaves files behind. This process starts them as one session of their own and outlives them:
when the server ends, when the leader ends (however: `kill -9` too), or on SIGTERM, it kills what is left of the session and removes the
server's files. It imports the standard library only. Should it be killed itself, the server's processes die with it.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SCAN_S = 1.0  # between two looks at which files in shared memory the server has
_KILL_S = 10.0  # for processes to go after SIGKILL
# SGLang maps one of the first per server, one of the second per server of several processes, and one of the third per lock that its
# spawned processes share (of images, for example), and leaves them.
OF_SGLANG = ("/dev/shm/sglang_loads_", "/dev/shm/sgl_shm_mq_")
SHARED_MEMORY = (*OF_SGLANG, "/dev/shm/sem.mp-")


def main() -> None:
    leader_pid, folder, command = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # processes of the server that lose their parent become this one's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the leader, which then stops this process
    stopped, stopping = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(stopping, b"x"))
    server, files, started_s = None, set[str](), time.time()
    try:
        leader = os.pidfd_open(leader_pid)
        if os.getppid() == leader_pid:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            )
            files = _wait([leader, os.pidfd_open(server.pid), stopped], server.pid)
    finally:
        status = _kill(server) if server is not None else 1
        for file in files | orphans(started_s):
            Path(file).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(status)


def _wait(ends: list[int], session: int) -> set[str]:
    """Until one of the descriptors is readable. Returns the files in shared memory that the session's processes have mapped."""
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    files = set[str]()
    while not poll.poll(_SCAN_S * 1000):
        files |= mapped_files(session)
    return files | mapped_files(session)


def mapped_files(session: int) -> set[str]:
    """What a session's processes have of SGLang's in shared memory.

    Found by inode: who makes a semaphore maps it before it has its name, and its maps show another one, deleted since.
    """
    names = _names(SHARED_MEMORY)
    return _mapped(processes(session), names) if names else set()


def orphans(since_s: float) -> set[str]:
    """SGLang's own files in shared memory that no process has mapped, of this user and since a moment (Unix time).

    A server that ends by itself may have made one after the last look at what it has mapped.
    """
    names = _names(OF_SGLANG, since_s - 1)  # a file's times are those of the kernel's last tick
    left = set(names.values())
    for _ in range(2):  # who makes a file opens it, and maps it then
        if left:
            left -= _mapped((int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()), names)
            time.sleep(0.05)
    return left


def _names(prefixes: tuple[str, ...], since_s: float = 0.0) -> dict[tuple[str, str], str]:
    """This user's files in shared memory by (device, inode) as maps show them."""
    names = dict[tuple[str, str], str]()
    for path in Path("/dev/shm").iterdir():
        if str(path).startswith(prefixes):
            with contextlib.suppress(OSError):
                status = path.stat()
                if status.st_uid == os.geteuid() and status.st_ctime >= since_s:
                    names[f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)] = str(path)
    return names


def _mapped(pids: Iterable[int], names: Mapping[tuple[str, str], str]) -> set[str]:
    """Those that one of the processes has mapped."""
    files = set[str]()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                _, _, _, device, inode, *_ = line.split(maxsplit=5)
                if (device, inode) in names:
                    files.add(names[device, inode])
    return files


def processes(session: int) -> list[int]:
    """Process ids of a session, without zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(of) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def _kill(server: subprocess.Popen[bytes]) -> int:
    """Kill the session. Returns the server's exit status as a shell tells it: 128 more than the signal."""
    deadline = time.monotonic() + _KILL_S
    while (left := processes(server.pid)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    status = server.wait()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    main()
