"""Runs a function on several ranks: forked after the imports, joined over gloo, and gone when it returns."""

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch's optimizers import it when they are built; once here saves seconds in every rank
import torch.distributed as dist


def run_ranks(fn: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """Call fn(*args) on `num_ranks` forked processes with torch.distributed initialised; returns their results in rank order.

    Results are written with torch.save. Each rank computes with one thread.
    Raises: RuntimeError with the traceback of the first rank that failed, or TimeoutError. No process outlives the call: each rank
        leads a process group of its own, which is killed at the end with everything that the rank started.
    """
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(fn, rank, num_ranks, args, Path(folder)) for rank in range(num_ranks)]
        try:
            failed = _wait(dict(zip(pids, range(num_ranks), strict=True)), time.monotonic() + timeout_s)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        if failed is not None:
            error = Path(folder) / f"error{failed}"
            raise RuntimeError(f"rank {failed} of {num_ranks} failed:\n{error.read_text() if error.exists() else 'it was killed'}")
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(num_ranks)]


def _fork(fn: Callable[..., Any], rank: int, num_ranks: int, args: tuple[Any, ...], folder: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks))
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
        result = fn(*args)
        torch.save(result, folder / f"result{rank}")
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
    finally:
        # The parent's exit handlers (pytest's among them) are not this process's; what it started dies with its process group.
        os._exit(code)


def _wait(running: dict[int, int], deadline: float) -> int | None:
    """Reap all ranks; the first that failed, or None. After a failure the others get a moment, then they are killed."""
    failed = None
    while running:
        pid, status = _reap(running)
        if pid:
            rank = running.pop(pid)
            if status and failed is None:
                failed, deadline = rank, min(deadline, time.monotonic() + 1.0)
        elif time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            for pid in list(running):
                os.waitpid(pid, 0)
            if failed is None:
                raise TimeoutError(f"ranks {sorted(running.values())} did not end in time")
            return failed
        else:
            time.sleep(0.005)
    return failed


def _reap(running: dict[int, int]) -> tuple[int, int]:
    """One of our ranks that has ended, and its status; (0, 0) if none has. Other children of this process are left alone."""
    for pid in running:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return pid, status
    return 0, 0
