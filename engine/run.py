"""Run: the ranks, their process groups, the run folder and its log. The only reader of environment variables."""

import contextlib
import dataclasses
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from tandem.engine.causes import cause_outside
from tandem.engine.config import RunConfig
from tandem.engine.data.sampler import PromptSampler
from tandem.engine.errors import RunEnded, Stopped
from tandem.engine.feasibility import check_run
from tandem.engine.hardware import describe_hardware, explain
from tandem.engine.log import RunLog
from tandem.engine.rollout.budget import new_group
from tandem.engine.types import Group, Prompt
from tandem.engine.watchdog import HANG_FILE, Watchdog
from tandem.kernels import backend as kernels


def launched_rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def single_process_group() -> Iterator[None]:
    """torch.distributed with this process as the only rank, for commands that are no run."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Run:
    """One rank's view of the run. A context manager: leaving it closes the log and the process groups.

    `control` is a gloo group over all ranks for what is not on a GPU: plans, counts, rows of tokens.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._owns_process_group = not dist.is_initialized()
        if self._owns_process_group:  # by torchrun, or one process alone
            self.rank, self.num_ranks = launched_rank(), int(os.environ.get("WORLD_SIZE", "1"))
            self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            self.ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        else:  # by a caller that forked the ranks, all on this machine
            self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
            self.local_rank, self.ranks_per_node = self.rank, self.num_ranks
        check_run(config, num_ranks=self.num_ranks, ranks_per_node=self.ranks_per_node)
        self.is_leader = self.rank % config.rollout.tp == 0
        self.leaders = tuple(range(0, self.num_ranks, config.rollout.tp))
        self.dir = Path(config.run_dir or Path("runs") / config.name).absolute()
        self.hardware = describe_hardware(ranks_per_node=self.ranks_per_node)
        self.num_threads = max(1, self.hardware.num_cores // self.ranks_per_node)
        self.first_step = 0

    def __enter__(self) -> Self:
        self.dir.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(self.num_threads)
        kernels.choose(self.config.kernels)
        if self.hardware.gpus:
            torch.cuda.set_device(self.local_rank)
        backend = "cpu:gloo,cuda:nccl" if self.hardware.gpus else "gloo"
        timeout = timedelta(seconds=self.config.timeout_s)
        if not self._owns_process_group:
            pass
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        self.control = group
        self.watchdog = self._start_watchdog()
        self.log = RunLog(
            self.dir,
            rank=self.rank,
            num_ranks=self.num_ranks,
            config=self.config.log,
            num_steps=self.config.steps,
            on_progress=self.watchdog.note,
        )
        if self.rank == 0:
            for line in (*explain(self.hardware, self.config), f"Kernels: {kernels.describe(on_gpu=bool(self.hardware.gpus))}."):
                print(line, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        reason = ""
        if error is None or isinstance(error, Stopped):
            self.log.flush()
            dist.barrier(group=self.control)  # rank 0 then merges the traces of all
        elif isinstance(error, Exception):
            reason = cause_outside(error, self.rank, self.dir, self.watchdog)
        self.watchdog.close()
        try:
            self.log.close()
        except OSError:
            if error is None:
                raise
        if self._owns_process_group:
            dist.destroy_process_group()
        if reason:
            raise RunEnded(reason) from error

    def _start_watchdog(self) -> Watchdog:
        logs = self.dir / "logs"
        watchdog = Watchdog(logs, rank=self.rank, watchdog_s=self.config.watchdog_s, grace_s=self.config.grace_s)
        if self.rank == 0:
            (logs / HANG_FILE).unlink(missing_ok=True)
        node = self.rank // self.ranks_per_node
        pids = dict(enumerate(self.gather(os.getpid())))
        watchdog.start({rank: pid for rank, pid in pids.items() if rank // self.ranks_per_node == node}, self.num_ranks)
        return watchdog

    def save_config(self) -> None:
        """Write config.json. A collective; refuses to go on with another run's checkpoints.

        Raises: ValueError on all ranks if the folder holds a run of another model, seed or data.
        """
        path, config, problem = self.dir / "config.json", json.loads(json.dumps(self.config.to_dict())), ""
        if self.rank == 0 and path.exists():
            before = json.loads(path.read_text())
            for name in ("model", "seed", "data"):
                if before[name] != config[name] and not problem:
                    problem = (
                        f"{self.dir} holds a run with {name} {before[name]}, and this one has {config[name]}; "
                        "choose another --run_dir or delete the folder"
                    )
        problem = self.gather(problem)[0]
        if problem:
            raise ValueError(problem)
        if self.rank == 0:
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(config, indent=1))
            unfinished.replace(path)

    def steps(self) -> Iterator[int]:
        """The iterations still to do."""
        for step in range(self.first_step, self.config.steps):
            self.watchdog.note("", iteration=step)
            yield step

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. For small things: it is pickled."""
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, value: int) -> int:
        """The sum over all ranks."""
        total = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(total, group=self.control)
        return int(total)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on some rank."""
        some = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(some, dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in some]

    def share(self, total: int | None) -> int | None:
        """This leader's part of a number that holds for all ranks; the parts sum to it."""
        if total is None:
            return None
        if not self.is_leader:
            return 0
        index = self.leaders.index(self.rank)
        return total // len(self.leaders) + (index < total % len(self.leaders))

    def draw(self, sampler: PromptSampler | None, in_flight: Sequence[Group], *, step: int) -> list[Group]:
        """New groups for this leader, so that with those in flight on all ranks there are `sampling.groups_in_flight`.

        A collective. The sampler lives on rank 0; prompts are dealt so that every leader ends with the same number of groups, or one more.
        """
        flights = self.gather([group.prompt.id for group in in_flight])
        dealt: list[list[tuple[int, Prompt]]] = [[] for _ in range(self.num_ranks)]
        if sampler is not None:
            busy = {prompt_id for of_rank in flights for prompt_id in of_rank}
            num_missing = max(0, self.config.sampling.groups_in_flight - sum(map(len, flights)))
            first_serial = sampler.num_drawn
            for serial, prompt in enumerate(sampler.draw(num_missing, step=step, exclude=busy), start=first_serial):
                least = min(self.leaders, key=lambda rank: (len(flights[rank]) + len(dealt[rank]), rank))
                dealt[least].append((serial, prompt))
        box: list[Any] = [None]
        dist.scatter_object_list(box, dealt if self.rank == 0 else None, src=0, group=self.control)
        num_samples = self.config.sampling.num_samples
        return [new_group(prompt, num_samples, first_iteration=step, serial=serial) for serial, prompt in box[0]]

    def observe(self, sampler: PromptSampler | None, groups: Sequence[Group]) -> None:
        """Tell rank 0's sampler the success rates of the groups just scored on all ranks. A collective.

        A group that nobody could grade says nothing about its prompt.
        """
        graded = [group for group in groups if any(verdict.graded for verdict in group.verdicts)]
        rates = self.gather([(group.prompt.id, group.success_rate) for group in graded])
        if sampler is not None:
            for prompt_id, rate in sorted(rate for of_rank in rates for rate in of_rank):
                sampler.observe(prompt_id, rate)

    def exchange(self, parcels: Sequence[Any]) -> list[Any]:
        """Send parcels[r] to rank r and return what the ranks sent here, in rank order. A collective (all-to-all of bytes)."""
        blobs = [np.frombuffer(pickle.dumps(parcel, protocol=5), dtype=np.uint8) for parcel in parcels]
        num_sent = torch.tensor([len(blob) for blob in blobs], dtype=torch.int64)
        num_received = torch.empty_like(num_sent)
        dist.all_to_all_single(num_received, num_sent, group=self.control)
        sent, received = torch.from_numpy(np.concatenate(blobs)), torch.empty(int(num_received.sum()), dtype=torch.uint8)
        dist.all_to_all_single(received, sent, num_received.tolist(), num_sent.tolist(), group=self.control)
        return [pickle.loads(part.numpy().tobytes()) for part in received.split(num_received.tolist())]

    def resolve(self, **changes: Any) -> None:
        """Replace top-level fields of the configuration by what was settled at start-up, before `save_config`."""
        self.config = dataclasses.replace(self.config, **changes)
