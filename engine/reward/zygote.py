"""The process that waits inside a worker's namespaces and starts each program there. Standard library only.

For each run it forks a supervisor into a PID namespace of its own, as process 1. The supervisor makes mounts and scratch space that
nobody else sees, forks the program, takes all privileges from it, feeds and watches it, sends the result, and exits: then the
kernel ends every process of that namespace, and with the last one its mounts, files and IPC objects are gone. The zygote itself never
runs anything of the program's and keeps nothing of a run, so one that waited is as good as a fresh one.

Python programs run in the forked interpreter itself, which saves its start; others are executed.
"""

import ctypes
import gc
import importlib
import json
import math
import os
import resource
import signal
import site
import struct
import sys

from tandem.engine.reward.channel import Channel
from tandem.engine.reward.in_process import run_python
from tandem.engine.reward.watch import Child, watch

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x08000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
CAPABILITY_VERSION_3 = 0x20080522
LOCKED_BYTES = 1 << 16

# what solutions import most, so that a run need not
PRELOADED = (
    *("bisect", "collections", "copy", "datetime", "functools", "heapq", "io", "itertools"),
    *("operator", "random", "re", "string", "threading", "typing"),
)

libc = ctypes.CDLL(None, use_errno=True)


def check(returned, what):
    if returned != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source, target, kind, flags, options=None):
    data = options.encode() if options else None
    check(libc.mount(source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data), f"mount on {target}")


def serve(settings):
    """Runs until the engine closes the channel: None. In a program's own process: what to start there."""
    channel = Channel(settings["channel_fd"])
    own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    with open("/proc/sys/kernel/cap_last_cap") as file:
        for capability in range(int(file.read()) + 1):
            check(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "prctl")
    gc.collect()
    gc.freeze()  # the collector of a forked program then writes to none of these pages, which would copy them
    channel.send({"ready": True}, {})
    # The first byte of a request is read here, the rest by its supervisor: what the zygote held once, freed or not, a later program
    # could find in its own memory.
    while channel.socket.recv(1):
        check(libc.unshare(CLONE_NEWPID), "unshare")
        child = os.fork()
        if child == 0:
            return supervise(channel, settings)
        check(libc.setns(own_pid_namespace, CLONE_NEWPID), "setns")
        _, status = os.waitpid(child, 0)
        channel.send({"ready": True, "supervisor": os.waitstatus_to_exitcode(status)}, {})
    return None


def supervise(channel, settings):
    """Process 1 of a run. Returns only in the program's process, with what to start; ends itself otherwise."""
    gc.disable()
    try:
        request = channel.receive()
        if request is None:
            os._exit(1)
        prepare_files(request, settings)
        program = start_program(request, settings)
        if program is None:
            return request
        message, blobs = watch(program, channel, request, settings)
        channel.send(message, blobs)
    except OSError as error:
        channel.send({"fault": str(error)}, {})
    os._exit(0)


def prepare_files(request, settings):
    """Scratch space of its own on /box, /tmp and /dev/shm, a /proc of its own, and the run's files."""
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWIPC), "unshare")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    limits = request["limits"]
    options = f"size={limits['scratch_bytes']},nr_inodes={limits['scratch_files'] + 8},mode=0755"
    mount("tmpfs", "/mnt", "tmpfs", MS_NOSUID | MS_NODEV, options)
    for name, target in (("box", "/box"), ("tmp", "/tmp"), ("shm", "/dev/shm")):
        os.mkdir(f"/mnt/{name}")
        os.chmod(f"/mnt/{name}", 0o1777)
        mount(f"/mnt/{name}", target, None, MS_BIND)
    check(libc.umount2(b"/mnt", MNT_DETACH), "umount /mnt")
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=2" if settings["uid"] is not None else None)
    os.chdir("/box")
    for name, data in request["blobs"].items():
        if name.startswith("file:"):
            path = os.path.join("/box", name.removeprefix("file:"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
            os.chmod(path, 0o755)


def start_program(request, settings):
    """Forks; returns in both processes: in the program's, ready to start, None."""
    (in_read, in_write), (out_read, out_write), (err_read, err_write), (fault_read, fault_write) = [os.pipe() for _ in range(4)]
    for end in (in_read, out_write, err_write):
        os.fchmod(end, 0o666)  # opened anew as /dev/stdin by a program that is not their owner
    pid = os.fork()
    if pid == 0:
        try:
            for end, number in ((in_read, 0), (out_write, 1), (err_write, 2)):
                os.dup2(end, number)
            os.dup2(fault_write, 3, inheritable=False)
            os.closerange(4, 1 << 20)
            drop_privileges(request["limits"], settings)
            if request["argv"] is None:
                os.close(3)  # with success; the others close it by executing
            return None
        except Exception as error:
            os.write(3, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
    for end in (in_read, out_write, err_write, fault_write):
        os.close(end)
    fault = b""
    while chunk := os.read(fault_read, 4096):
        fault += chunk
    os.close(fault_read)
    if fault:
        raise OSError(f"the program was not started: {fault.decode(errors='replace')}")
    for end in (in_write, out_read, err_read):
        os.set_blocking(end, False)
    return Child(pid, in_write, out_read, err_read)


def drop_privileges(limits, settings):
    check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(score, b"1000")  # whatever memory runs out of, programs go first
    os.close(score)
    os.setsid()
    cpu = math.ceil(limits["cpu_s"])
    bounds = {
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_FSIZE": (limits["file_bytes"],) * 2,
        "RLIMIT_NOFILE": (limits["open_files"],) * 2,
        "RLIMIT_STACK": (limits["stack_bytes"],) * 2,
        "RLIMIT_NPROC": (limits["processes"],) * 2,
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MEMLOCK": (LOCKED_BYTES, LOCKED_BYTES),
    }
    if limits["address_bytes"] is not None:
        bounds["RLIMIT_AS"] = (limits["address_bytes"],) * 2
    for name, bound in bounds.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, bound if hard == resource.RLIM_INFINITY else (min(bound[0], hard), min(bound[1], hard)))
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
    header = struct.pack("<II", CAPABILITY_VERSION_3, 0)
    check(libc.capset(header, bytes(24)), "capset")
    check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    instructions = bytes.fromhex(settings["filter"])
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog: a 16-bit count, padding, a pointer
    filters = struct.pack("<HxxxxxxQ", len(instructions) // 8, ctypes.addressof(buffer))
    check(libc.prctl(PR_SET_SECCOMP, 2, filters, 0, 0), "seccomp")


def become(request):
    if request["argv"] is None:
        run_python(os.path.join("/box", request["main"]))
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        os.execv(request["argv"][0], request["argv"])
    except OSError as error:
        os.write(3, f"{request['argv'][0]}: {error}".encode())
        os._exit(1)


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 takes no signal from inside its namespace, unless it has a handler
    for name in PRELOADED:
        importlib.import_module(name)
    site.setquit()  # exit() and quit(), which many programs end with; without the rest of what site does
    to_start = serve(json.loads(sys.argv[1]))
    if to_start is not None:
        become(to_start)
