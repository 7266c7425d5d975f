"""The sandbox's workers: each is a bubblewrap with a zygote inside, a control group, and a channel between zygote and engine."""

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.reward.bubblewrap import UnavailableError, command
from tandem.engine.reward.cgroups import Cgroup, CgroupError, Hierarchies
from tandem.engine.reward.channel import Channel
from tandem.engine.reward.execution import MIB, Limits

START_TIMEOUT_S = 30.0
GRACE_S = 10.0  # beyond a run's wall limit, for setting up and for a loaded machine, until its worker is given up
SETTLE_S = 1.0  # the kernel frees a run's files a moment after its last process
SLACK_BYTES = 4 * MIB  # that a worker may hold more than before its first run: page tables, the zygote's own memory
RUNS_PER_WORKER = 2000  # then a fresh one, should anything pile up all the same
FIRST_UID, NUM_UIDS = 2_000_000_000, 140_000_000  # nobody's; each worker has one of its own, so that they share no user's counts


class WorkerError(RuntimeError):
    """A worker did not start, died, or gave no answer in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What all workers of a sandbox have in common."""

    python: Path
    is_root: bool
    hierarchies: Hierarchies | None
    limits: Limits
    filter: bytes
    read_only: tuple[Path, ...]


class Worker:
    """Runs one program at a time."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Raises: WorkerError with what bubblewrap or the zygote said; CgroupError. Nothing is left behind then."""
        self._settings = settings
        self.num_runs = 0
        self._uid = FIRST_UID + secrets.randbelow(NUM_UIDS)
        self._process: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self.cgroup: Cgroup | None = None
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
            ours, theirs = socket.socketpair()
        except OSError as error:  # no folder for temporary files can be written to, or too many files are open
            raise WorkerError(f"a sandbox worker did not start: {error}") from error
        self._channel = Channel(ours.detach())
        self._channel.socket.settimeout(START_TIMEOUT_S)
        try:
            with theirs:
                if settings.hierarchies is not None:
                    self.cgroup = Cgroup(settings.hierarchies, f"tandem-{os.getpid()}-{secrets.token_hex(4)}", settings.limits)
                self._pid = self._start(theirs.fileno())
            self._answer()
            self._idle_bytes = self.cgroup.used_bytes() if self.cgroup else 0
        except (OSError, ValueError, CgroupError, UnavailableError, WorkerError) as error:
            words = self._words()
            self.close()
            raise WorkerError(f"a sandbox worker did not start: {error}; {words}") from error

    def _start(self, channel_fd: int) -> int:
        settings = self._settings
        inherited = [channel_fd]
        # bubblewrap is set up as whom programs are to run as, where that is in a user namespace
        uid = self._uid if not settings.is_root and os.geteuid() == 0 else None
        with contextlib.ExitStack() as stack:
            cpu_fd = None
            if self.cgroup is not None and self.cgroup.cpu_usage_file is not None:
                cpu_fd = os.open(self.cgroup.cpu_usage_file, os.O_RDONLY)
                stack.callback(os.close, cpu_fd)
                inherited.append(cpu_fd)
            zygote = {
                "channel_fd": channel_fd,
                "cpu_fd": cpu_fd,
                "uid": self._uid if settings.is_root else None,
                "filter": settings.filter.hex(),
            }
            info_read, info_write = os.pipe()
            info = stack.enter_context(open(info_read))
            try:
                words = command(
                    python=settings.python,
                    zygote_arguments=[json.dumps(zygote)],
                    info_fd=info_write,
                    is_root=settings.is_root,
                    read_only=settings.read_only,
                )
                process: subprocess.Popen[bytes] = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=self._errors,
                    stderr=self._errors,
                    pass_fds=[*inherited, info_write],
                    user=uid,
                    group=uid,
                    extra_groups=None if uid is None else [],
                )
                self._process = process
            finally:
                os.close(info_write)
            text = info.read()
        if not text:
            raise WorkerError("bubblewrap ended at once")
        pid = int(json.loads(text)["child-pid"])
        if self.cgroup is not None:
            self.cgroup.add(pid)
        if settings.is_root:  # in a user namespace a program could go back to the least that its worker ever had
            with contextlib.suppress(PermissionError):  # not every root may; programs are the first choice all the same
                Path(f"/proc/{pid}/oom_score_adj").write_text("-1000")
        return pid

    def run(self, request: Mapping[str, Any], blobs: Mapping[str, bytes], *, memory_bytes: int, wall_s: float) -> dict[str, Any]:
        """Hand over a run and wait for its end, when nothing of it is left.

        Returns: the supervisor's message, with `resident_bytes`, `oom_kills` and `reached_limit` of the group where there is one. Without,
            `oom_kills` are the machine's while a run went on that SIGKILL ended.
        Raises: WorkerError, after which the worker must be closed.
        """
        try:
            if self.cgroup is None:
                num_kills = _oom_kills_of_machine()
            else:
                self.cgroup.limit_memory(memory_bytes)
                self.cgroup.reset_peak()
                num_kills = self.cgroup.num_oom_kills()
            self._channel.socket.settimeout(wall_s + GRACE_S)
            self._channel.socket.sendall(b"R")  # for the zygote, which leaves the rest to the supervisor that it forks
            self._channel.send(dict(request), dict(blobs))
            result = self._answer()
            if "ready" in result:
                raise WorkerError(f"the run's supervisor ended with status {result['supervisor']}: {self._words()}")
            self._answer()
            if self.cgroup is not None:
                result["oom_kills"] = self.cgroup.num_oom_kills() - num_kills
                result["reached_limit"] = self.cgroup.reached_limit()
                peak = self.cgroup.peak_bytes()
                if peak is not None:
                    result["resident_bytes"] = max(0, peak - self._idle_bytes)
            elif result.get("code") == -signal.SIGKILL:  # whoever sent it: nobody can tell, if the kernel ended any process meanwhile
                result["oom_kills"], result["reached_limit"] = _oom_kills_of_machine() - num_kills, False
        except (OSError, ValueError, CgroupError) as error:
            raise WorkerError(f"a sandbox worker failed: {type(error).__name__}: {error}; {self._words()}") from error
        self.num_runs += 1
        return result

    def is_clean(self) -> bool:
        """Whether nothing of the last run is left in the group: neither a process nor memory, which scratch files are too."""
        if self.cgroup is None:
            return True
        deadline = time.monotonic() + SETTLE_S
        while self.cgroup.pids() != [self._pid] or self.cgroup.used_bytes() > self._idle_bytes + SLACK_BYTES:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def close(self) -> None:
        """End every process of the worker and remove its group.

        Raises: CgroupError if the group is still in use.
        """
        self._channel.socket.close()
        if self._process is not None:
            if self._pid is not None and self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)  # process 1 of its namespace: takes all others along
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.close()
        if self.cgroup is not None:
            self.cgroup.remove()

    def _answer(self) -> dict[str, Any]:
        message = self._channel.receive()
        if message is None:
            raise WorkerError("the worker is gone")
        return message

    def _words(self) -> str:
        """What bubblewrap and the zygote wrote, which is nothing unless something is wrong."""
        self._errors.seek(0)
        return self._errors.read(4000).decode(errors="replace").strip() or "it wrote nothing"


def _oom_kills_of_machine() -> int:
    """Processes that the kernel ended for lack of memory, anywhere, since the start."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts.get("oom_kill", 0))


class Pool:
    """A fixed number of workers, handed out one thread at a time. Bad ones are replaced."""

    def __init__(self, settings: WorkerSettings, num_workers: int) -> None:
        """Start all workers. Raises: WorkerError, CgroupError, leaving none behind."""
        self._settings = settings
        self._num_workers = num_workers
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self.num_replaced = 0
        self._is_closed = False
        # The most recently used first: its pages are still in the caches. None: a place whose worker is to be started.
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        try:
            for _ in range(num_workers):
                self._idle.put(Worker(settings))
        except BaseException:
            self._num_workers = self._idle.qsize()
            self.close()
            raise

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """Wait for a worker and keep it for the block. One whose block raises, or that is not clean after it, is replaced.

        Raises: WorkerError or CgroupError when a replacement cannot be started.
        """
        if os.getpid() != self._owner:
            raise WorkerError(f"the sandbox belongs to process {self._owner}; make one in this process ({os.getpid()}), after the fork")
        worker = self._idle.get()
        if self._is_closed:
            self._idle.put(worker)  # for `close`, or whoever waits behind
            raise WorkerError("the sandbox is closed")
        keep = None
        try:
            if worker is None:
                worker = Worker(self._settings)
            yield worker
            if worker.num_runs < RUNS_PER_WORKER and worker.is_clean():
                keep = worker
        finally:
            try:
                if keep is None and worker is not None:
                    with self._lock:
                        self.num_replaced += 1
                    worker.close()
            finally:
                self._idle.put(keep)

    def close(self) -> None:
        """Wait for the runs in progress and end all workers. In a process forked from the owner, nothing."""
        if self._is_closed or os.getpid() != self._owner:
            return
        self._is_closed = True
        for _ in range(self._num_workers):
            worker = self._idle.get()
            if worker is not None:
                worker.close()
        self._idle.put(None)  # threads that still wait find out, one after the other
