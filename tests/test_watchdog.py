"""Hangs and signals: who hangs is named with every rank's stack, and nothing outlives the run."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tandem.engine.watchdog import EXIT_SIGTERM, HANG_FILE, Watchdog, read_beat

WATCHDOG_S = 1.5
STEADY_WATCHDOG_S = 4.0  # where nobody hangs: a rank that is only starved must not seem to
END_S = 120  # generous: the machine may be busy


class Rank:
    """A forked process with a watchdog that runs a function; its output goes to a file."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        num_ranks: int,
        work: Callable[[Watchdog], None],
        *,
        grace_s: float = 30.0,
        watchdog_s: float = WATCHDOG_S,
    ) -> None:
        self.folder, self.rank = folder, rank
        self.pid = os.fork()
        if self.pid:
            return
        try:
            out = os.open(folder / f"rank_{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            watchdog = Watchdog(folder, rank=rank, watchdog_s=watchdog_s, grace_s=grace_s)
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
            pids: list[int | None] = [None] * num_ranks
            dist.all_gather_object(pids, os.getpid())
            watchdog.start({r: pid for r, pid in enumerate(pids) if pid is not None}, num_ranks)
            work(watchdog)
            watchdog.close()
            os._exit(0)
        finally:
            os._exit(3)

    def wait(self) -> int:
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"rank {self.rank} did not end")

    def until(self, phase: str) -> None:
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            beat = read_beat(self.folder, self.rank)
            if beat is not None and beat["phase"] == phase:
                return
            time.sleep(0.01)
        raise TimeoutError(f"rank {self.rank} never came to {phase}")

    @property
    def output(self) -> str:
        return (self.folder / f"rank_{self.rank}.out").read_text()

    @property
    def stack(self) -> str:
        return (self.folder / f"rank_{self.rank}.stack").read_text()


def wait_in_a_barrier(watchdog: Watchdog) -> None:
    watchdog.note("rollout", iteration=7)
    dist.barrier()


def spin_without_end(watchdog: Watchdog) -> None:
    watchdog.note("train", iteration=7)
    while True:
        sum(range(1000))


def work_steadily(watchdog: Watchdog) -> None:
    """Other ranks wait for this one longer than the deadline, which is fine: it gets on."""
    end = time.monotonic() + 1.1 * STEADY_WATCHDOG_S
    while time.monotonic() < end:
        watchdog.note("rollout", iteration=7)
        time.sleep(0.05)
    dist.barrier()


def hold_the_interpreter(watchdog: Watchdog) -> None:
    """A C function that never lets another thread run."""
    watchdog.note("grade", iteration=7)
    while True:
        ctypes.PyDLL(None).pause()  # returns after a signal


def test_a_stuck_loop_is_named_with_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    waiting, stuck = Rank(tmp_path, 0, 2, wait_in_a_barrier), Rank(tmp_path, 1, 2, spin_without_end)
    assert stuck.wait() == 1
    assert waiting.wait() in (1, 3)  # of its own accord, or because the barrier broke
    verdict = (tmp_path / HANG_FILE).read_text()
    assert verdict.startswith("rank 1 hangs: it shows no progress, ")
    assert "in the phase 'train' of iteration 7" in verdict
    assert verdict in stuck.output
    assert "in spin_without_end" in stuck.stack
    assert "in wait_in_a_barrier" in waiting.stack
    assert "distributed_c10d.py" in waiting.stack


def test_a_stopped_process_is_named_by_the_others_and_ended(tmp_path: Path) -> None:
    waiting, stopped = Rank(tmp_path, 0, 2, wait_in_a_barrier), Rank(tmp_path, 1, 2, spin_without_end)
    stopped.until("train")
    os.kill(stopped.pid, signal.SIGSTOP)
    assert waiting.wait() == 1
    assert stopped.wait() == -signal.SIGKILL
    assert "rank 1 hangs: its process is stopped or holds the interpreter" in waiting.output
    assert "in the phase 'train' of iteration 7" in waiting.output
    assert "in spin_without_end" in stopped.stack
    assert "in wait_in_a_barrier" in waiting.stack


def test_a_process_that_holds_the_interpreter_is_named_by_the_others(tmp_path: Path) -> None:
    waiting, held = Rank(tmp_path, 0, 2, wait_in_a_barrier), Rank(tmp_path, 1, 2, hold_the_interpreter)
    assert waiting.wait() == 1
    assert held.wait() == -signal.SIGKILL
    assert "rank 1 hangs: its process is stopped or holds the interpreter" in waiting.output
    assert "in hold_the_interpreter" in held.stack


def test_ranks_that_wait_for_one_that_gets_on_do_not_hang(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, rank, 2, work, watchdog_s=STEADY_WATCHDOG_S) for rank, work in enumerate((wait_in_a_barrier, work_steadily))]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert not (tmp_path / HANG_FILE).exists()


def test_ranks_that_all_wait_for_each_other_hang(tmp_path: Path) -> None:
    def wait_for_one_more(watchdog: Watchdog) -> None:
        watchdog.note("pack", iteration=3)
        dist.recv(torch.zeros(1), src=1 - watchdog.rank)  # which the other never sends

    ranks = [Rank(tmp_path, rank, 2, wait_for_one_more) for rank in (0, 1)]
    assert all(rank.wait() in (1, 3) for rank in ranks)
    assert "in the phase 'pack' of iteration 3" in (tmp_path / HANG_FILE).read_text()
    assert all("in wait_for_one_more" in rank.stack for rank in ranks)


def test_a_rank_whose_peer_died_leaves_from_wherever_it_is(tmp_path: Path) -> None:
    def busy(watchdog: Watchdog) -> None:
        while True:
            watchdog.note("rollout", iteration=2)
            time.sleep(0.05)

    busy_rank, dead = Rank(tmp_path, 0, 2, busy), Rank(tmp_path, 1, 2, busy)
    dead.until("rollout")
    busy_rank.until("rollout")
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    assert busy_rank.wait() == 1
    assert "the process of rank 1 ended; leaving from the phase 'rollout' of iteration 2" in busy_rank.output


def test_sigterm_is_seen_at_once_and_the_end_of_the_grace_period_is_the_end(tmp_path: Path) -> None:
    def stuck_but_for_signals(watchdog: Watchdog) -> None:
        calls: list[float] = []
        watchdog.call_when_stopping(lambda: calls.append(watchdog.left_s), reserve_s=2.0)
        watchdog.note("rollout", iteration=2)
        while True:
            time.sleep(0.01)
            watchdog.note("rollout")
            if calls:
                print(f"called with {calls[0]:.2f} s left, {watchdog.stop_requested}", file=sys.stderr)
                calls.clear()

    rank = Rank(tmp_path, 0, 1, stuck_but_for_signals, grace_s=2.5)
    rank.until("rollout")
    started_s = time.monotonic()
    os.kill(rank.pid, signal.SIGTERM)
    assert rank.wait() == EXIT_SIGTERM
    assert time.monotonic() - started_s >= 2.5
    lines = rank.output.splitlines()
    assert lines[0] == "rank 0: SIGTERM; it leaves within 2.5 s"
    assert lines[1].startswith("called with ")
    assert float(lines[1].split()[2]) <= 2.0
    assert lines[-1].startswith("rank 0: the grace period of 2.5 s is over, in the phase 'rollout' of iteration 2")


def test_before_there_is_anything_to_save_sigterm_ends_at_once(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0, 1, spin_without_end)
    rank.until("train")
    os.kill(rank.pid, signal.SIGTERM)
    assert rank.wait() == EXIT_SIGTERM
    assert "where there is nothing to save" in rank.output


def test_after_close_signals_and_threads_are_what_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2), threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    watchdog = Watchdog(tmp_path, rank=0, watchdog_s=60.0, grace_s=1.0)
    watchdog.start({0: os.getpid()}, 1)
    os.kill(os.getpid(), signal.SIGUSR2)
    watchdog.close()
    watchdog.close()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2), threading.active_count()) == before
    assert len(os.listdir("/proc/self/fd")) == files
    assert "in test_after_close_signals_and_threads_are_what_they_were" in (tmp_path / "rank_0.stack").read_text()
