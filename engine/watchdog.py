"""What ends a rank from outside its own work: a hang, another rank's death, and SIGTERM.

A thread beside the main one looks on, several times per deadline. Each rank keeps a small file up to date, which the other ranks of its
node read: `logs/rank_N.beat`, one JSON object. A rank counts as hanging when

- the thread itself no longer writes: the process was stopped, or something holds the interpreter's lock;
- the main thread shows no progress, and is not waiting for other ranks;
- all ranks wait for each other.

Then every rank's stack is written to `logs/rank_N.stack`, `logs/hang.txt` names rank and phase, and the run ends. `kill -USR2 PID` writes
a rank's stack at any time.
"""

import faulthandler
import json
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

BEAT_BYTES = 512
HANG_FILE = "hang.txt"
LAST_PHASE = "end"  # nobody watches a rank that has said so
# A main thread within one of these modules waits for another rank.
WAITING_MODULES = ("torch.distributed.distributed_c10d", "megatron.core.pipeline_parallel.p2p_communication", "tandem.engine.buckets")
# How long a rank whose peer died gets to notice it by itself, which gives the better message, before it is ended.
LOST_GRACE_S = 5.0
STACK_WAIT_S = 3.0
ENDING_TICK_S = 0.2
EXIT_SIGTERM = 128 + signal.SIGTERM


class Watchdog:
    """One per rank, from `start` to `close`. `note` is called by the main thread, as often as it likes.

    Args:
        folder: logs/ of the run folder.
        rank: of this process.
        watchdog_s: how long a rank may show no progress, in seconds.
        grace_s: how long the run may go on after SIGTERM, in seconds.
    """

    def __init__(self, folder: Path, *, rank: int, watchdog_s: float, grace_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.rank, self._watchdog_s, self._grace_s = folder, rank, watchdog_s, grace_s
        self._tick_s = min(15.0, max(0.1, watchdog_s / 20))
        self._beat_fd = os.open(_beat_path(folder, rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._stack_file = _stack_path(folder, rank).open("a+b")
        self._main_thread = threading.main_thread().ident
        self._iteration, self._phase, self._progressed_s = -1, "start", time.monotonic()
        self._peers: dict[int, int] = {}  # pidfd → rank, of this node
        self._pids: dict[int, int] = {}  # rank → process id, of this node
        self._num_ranks = 1
        self._lost_s: dict[int, float] = {}  # rank → when its process was seen to have ended
        self._stopping_s: float | None = None  # when SIGTERM came
        self._on_stop: tuple[Callable[[], None], float] = self._leave_at_once, math.inf  # at first there is nothing to save
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handlers: dict[int, Any] = {}
        self._old_wakeup_fd = -1
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # ---- the main thread's side

    def start(self, pids: Mapping[int, int], num_ranks: int) -> None:
        """Begin to watch, and take over SIGTERM and SIGUSR2.

        Args:
            pids: process id of each rank of this node.
            num_ranks: of the whole run.
        """
        self._pids, self._num_ranks = dict(pids), num_ranks
        self._peers = {os.pidfd_open(pid): rank for rank, pid in pids.items() if rank != self.rank}
        faulthandler.register(signal.SIGUSR2, file=self._stack_file, all_threads=True)
        if threading.current_thread() is threading.main_thread():
            # The bytes that Python writes at once, in C, tell the thread of a signal that the main thread is too busy to handle.
            self._handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, _ignore)}
            self._old_wakeup_fd = signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self._write_beat()
        self._thread.start()

    def close(self) -> None:
        """Stop watching; signals are what they were before."""
        if self._closed:
            return
        self._closed = True
        if self._handlers:
            signal.set_wakeup_fd(self._old_wakeup_fd)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        os.write(self._wake_writer, b"\0")
        if self._thread.ident is not None:
            self._thread.join()
            faulthandler.unregister(signal.SIGUSR2)
        self.note(LAST_PHASE)
        for fd in (self._beat_fd, self._wake_reader, self._wake_writer, *self._peers):
            os.close(fd)
        self._stack_file.close()

    def note(self, phase: str, iteration: int | None = None) -> None:
        """The run made progress: it is in this phase ("" between phases), and perhaps in another iteration."""
        self._progressed_s = time.monotonic()
        self._iteration = self._iteration if iteration is None else iteration
        if phase != self._phase or iteration is not None:
            self._phase = phase
            self._write_beat()

    @property
    def stop_requested(self) -> bool:
        """Whether SIGTERM came."""
        return self._stopping_s is not None

    @property
    def left_s(self) -> float:
        """Seconds until the grace period ends; the whole of it before SIGTERM came."""
        return self._grace_s - (time.monotonic() - self._stopping_s if self._stopping_s is not None else 0.0)

    def call_when_stopping(self, callback: Callable[[], None], reserve_s: float) -> None:
        """After SIGTERM, call this from the watching thread, again and again, once no more than `reserve_s` seconds of grace are left."""
        self._on_stop = callback, reserve_s
        os.write(self._wake_writer, b"\0")

    def lost_peers(self) -> list[int]:
        """Ranks of this node whose processes ended."""
        poll = select.poll()
        for pidfd in self._peers:
            poll.register(pidfd, select.POLLIN)
        return sorted(self._peers[pidfd] for pidfd, _ in poll.poll(0))

    def where(self) -> str:
        """The phase and iteration of this rank, in words."""
        return _where({"phase": self._phase, "iteration": self._iteration})

    # ---- the watching thread

    def _watch(self) -> None:
        while True:
            looked_s = time.monotonic()
            is_ending = self._stopping_s is not None or bool(self._lost_s)
            unlost = [pidfd for pidfd, rank in self._peers.items() if rank not in self._lost_s]
            select.select([self._wake_reader, *unlost], [], [], ENDING_TICK_S if is_ending else self._tick_s)
            self._read_signals()
            if self._closed:
                return
            self._write_beat()
            self._check_stop()
            self._check_lost()
            if time.monotonic() - looked_s > self._watchdog_s / 2:  # all of the job was stopped and goes on: nobody hangs
                self._progressed_s = time.monotonic()
            else:
                self._check_progress()

    def _read_signals(self) -> None:
        try:
            numbers = os.read(self._wake_reader, 4096)
        except BlockingIOError:
            return
        if signal.SIGTERM in numbers and self._stopping_s is None:
            self._stopping_s = time.monotonic()
            self._say(f"SIGTERM; it leaves within {self._grace_s:g} s")

    def _check_stop(self) -> None:
        if self._stopping_s is None:
            return
        callback, reserve_s = self._on_stop
        if self.left_s <= reserve_s:
            callback()
        if self.left_s <= 0:
            self._say(f"the grace period of {self._grace_s:g} s is over, in {self.where()}; what is not saved is done again")
            os._exit(EXIT_SIGTERM)

    def _leave_at_once(self) -> None:
        self._say(f"leaving from {self.where()}, where there is nothing to save")
        os._exit(EXIT_SIGTERM)

    def _check_lost(self) -> None:
        now_s = time.monotonic()
        for rank in self.lost_peers():
            if now_s - self._lost_s.setdefault(rank, now_s) > LOST_GRACE_S:
                self._say(f"the process of rank {rank} ended; leaving from {self.where()}")
                os._exit(EXIT_SIGTERM if self._stopping_s is not None else 1)

    def _check_progress(self) -> None:
        if (self._folder / HANG_FILE).exists():  # another rank has noticed
            self._dump()
            time.sleep(2 * STACK_WAIT_S)
            os._exit(1)
        stopped = [rank for rank in self._pids if rank != self.rank and rank not in self._lost_s and self._is_stopped(rank)]
        stuck = time.monotonic() - self._progressed_s > self._watchdog_s
        if stuck and self._is_waiting():
            stuck = all(self._waits_too_long(rank) for rank in range(self._num_ranks))
        if stopped or stuck:
            self._end_all(stopped)

    def _is_stopped(self, rank: int) -> bool:
        beat = read_beat(self._folder, rank)
        if beat is None or beat["pid"] != self._pids[rank] or beat["phase"] == LAST_PHASE:
            return False
        return time.monotonic() - beat["time"] > self._watchdog_s

    def _waits_too_long(self, rank: int) -> bool:
        beat = read_beat(self._folder, rank)
        return beat is not None and beat["waiting"] and beat["idle_s"] > self._watchdog_s

    def _is_waiting(self) -> bool:
        frame: FrameType | None = sys._current_frames().get(self._main_thread or -1)
        while frame is not None:
            if frame.f_globals.get("__name__") in WAITING_MODULES:
                return True
            frame = frame.f_back
        return False

    def _end_all(self, stopped: list[int]) -> None:
        """Write down who hangs, get everyone's stack, and leave; the ranks of other nodes see the file."""
        who = stopped or [self.rank]
        texts = []
        for rank in who:
            beat = read_beat(self._folder, rank) if rank != self.rank else self._beat()
            if beat is None:
                return  # it was being written: seen at the next look
            idle_s = beat["idle_s"] + time.monotonic() - beat["time"]
            how = "its process is stopped or holds the interpreter" if rank in stopped else "it shows no progress"
            texts.append(f"rank {rank} hangs: {how}, {idle_s:.0f} s in {_where(beat)} (watchdog_s is {self._watchdog_s:g})")
        message = f"{'; '.join(texts)}. The stacks of all ranks are in {self._folder}/rank_N.stack"
        try:
            with (self._folder / HANG_FILE).open("x") as file:
                file.write(message + "\n")
        except FileExistsError:
            return  # another rank was first: seen at the next look
        self._dump()
        sizes = {rank: _stack_path(self._folder, rank).stat().st_size for rank in self._pids if rank != self.rank}
        for rank in sizes:
            _signal(self._pids[rank], signal.SIGUSR2)
            _signal(self._pids[rank], signal.SIGCONT)  # a stopped process handles no other signal
        deadline = time.monotonic() + STACK_WAIT_S
        while time.monotonic() < deadline and any(_stack_path(self._folder, rank).stat().st_size == size for rank, size in sizes.items()):
            time.sleep(0.05)
        print(f"error: {message}", file=sys.stderr, flush=True)
        for rank in who:
            if rank != self.rank:
                _signal(self._pids[rank], signal.SIGKILL)
        os._exit(1)

    def _dump(self) -> None:
        self._stack_file.write(f"\n{time.strftime('%F %T')}, {self.where()}\n".encode())
        self._stack_file.flush()
        faulthandler.dump_traceback(self._stack_file, all_threads=True)

    def _beat(self) -> dict[str, Any]:
        now_s = time.monotonic()
        return {
            "pid": os.getpid(),
            "time": round(now_s, 3),
            "iteration": self._iteration,
            "phase": self._phase,
            "idle_s": round(now_s - self._progressed_s, 3),
            "waiting": self._is_waiting(),
        }

    def _write_beat(self) -> None:
        os.pwrite(self._beat_fd, json.dumps(self._beat()).encode().ljust(BEAT_BYTES), 0)

    def _say(self, text: str) -> None:
        print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)


def read_beat(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a rank wrote last; None if there is nothing to read.

    Returns: pid, time (of writing, in seconds of the node's monotonic clock), iteration, phase, idle_s (since the main thread showed
        progress) and waiting (whether it is waiting for other ranks).
    """
    try:
        return json.loads(_beat_path(folder, rank).read_bytes()[:BEAT_BYTES])
    except (FileNotFoundError, ValueError):
        return None  # not there yet, or just being written


def _where(beat: Mapping[str, Any]) -> str:
    phase = f"the phase {beat['phase']!r}" if beat["phase"] else "no phase"
    return phase if beat["iteration"] < 0 else f"{phase} of iteration {beat['iteration']}"


def _beat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.beat"


def _stack_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.stack"


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python needs a handler in order to report the signal to the watching thread."""
