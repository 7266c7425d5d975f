"""A run as a user's ranks are: processes that nobody joins, so that a test can kill one and see what becomes of the others."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tandem.engine.config import RunConfig
from tandem.engine.errors import clear_errors
from tandem.engine.train import train


class Launched:
    """Ranks of one run, forked after the imports. Each leads a process group, so that what it starts can be found.

    Output of rank N goes to `folder`/rank_N.out.
    """

    def __init__(self, config: RunConfig, folder: Path, num_ranks: int = 2, prepare: Callable[[int], None] | None = None) -> None:
        """`prepare` is called in every rank before it trains, with its number."""
        assert config.run_dir is not None
        folder.mkdir(parents=True)
        self.logs, self.folder = Path(config.run_dir) / "logs", folder
        self.pids = [_fork(config, rank, num_ranks, folder, prepare) for rank in range(num_ranks)]
        self._statuses: dict[int, int] = {}

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def poll(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended (negative: the signal)."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._statuses[rank] = os.waitstatus_to_exitcode(status)
        return dict(self._statuses)

    def wait_until_stopped(self, rank: int, timeout_s: float) -> bool:
        """Wait until a rank has stopped (SIGSTOP, see tests/moments.py). False if it ended before."""
        deadline = time.monotonic() + timeout_s
        while rank not in self._statuses:
            ended, status = os.waitpid(self.pids[rank], os.WNOHANG | os.WUNTRACED)
            if ended and os.WIFSTOPPED(status):
                return True
            if ended:
                self._statuses[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"rank {rank} did not stop within {timeout_s:g} s\n{self.output()}")
            time.sleep(0.01)
        return False

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes in rank order. Raises: TimeoutError with the ranks' output; everything is killed then."""
        deadline = time.monotonic() + timeout_s
        while len(self.poll()) < len(self.pids):
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"ranks did not end within {timeout_s:g} s: {self._statuses}\n{self.output()}")
            time.sleep(0.01)
        return [self._statuses[rank] for rank in range(len(self.pids))]

    def left_behind(self, timeout_s: float) -> list[str]:
        """Processes that the ranks started and that outlive them by `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def engines(self) -> list[int]:
        """Process ids of the rollout engines."""
        return [int(line.split()[0]) for line in self._processes() if "embedded_worker" in line]

    def output(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("rank_*.out")))

    def kill(self) -> None:
        for pid in self.pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while len(self.poll()) < len(self.pids):
            time.sleep(0.01)

    def _processes(self) -> list[str]:
        """Of the ranks' process groups, without zombies: "PID COMMAND"."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if int(group) in self.pids and state != "Z":
                found.append(f"{entry.name} {command}")
        return found


def _fork(config: RunConfig, rank: int, num_ranks: int, folder: Path, prepare: Callable[[int], None] | None) -> int:
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(folder / f"rank_{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # pytest's own write elsewhere
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks))
        if prepare is not None:
            prepare(rank)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
        with clear_errors(rank):
            train(config)
        dist.destroy_process_group()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
