"""The serving phase: the rollout engines receive the trainer's weights in one transaction over all ranks.

    prepare → for each bucket: ranks write, engines verify and take over → all agree → commit, else roll back

Writing bucket n+1 overlaps with the engines' taking over of bucket n. Ranks of a node and their engines take turns through
counters in shared memory; all ranks agree through a process group of their own. Every wait has a deadline.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tandem.engine.buckets import (
    CHECKSUMMED,
    FAILED,
    LOADED,
    NUM_SLOTS,
    WRITTEN,
    BucketSlice,
    BucketStream,
    PeerFailed,
    PendingTransfer,
    SharedBuckets,
    StreamingWeightSink,
)
from tandem.engine.checkpoint.agreement import Agreement, Failure, raise_all
from tandem.engine.checkpoint.hand_over import HandOver
from tandem.engine.checkpoint.names import HFView, NameMap
from tandem.engine.checkpoint.plan import Plan, Region, make_plan
from tandem.engine.checkpoint.writer import BucketWork, make_bucket_work
from tandem.engine.config import SwapConfig
from tandem.engine.log import RunLog
from tandem.engine.types import TensorMeta, WeightSink, WeightSource, WeightTransferError

# A rank may spend one deadline on a bucket and one on its engine before it comes to say so.
_AGREE_FACTOR = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapStats:
    """What one swap moved, as this rank saw it."""

    policy_version: int
    num_bytes: int  # received by all engines together
    num_engines: int
    num_buckets: int
    duration_s: float

    @property
    def gigabytes_per_s(self) -> float:
        return self.num_bytes / self.duration_s / 1e9


@dataclass(frozen=True, slots=True)
class _Setup:
    """What follows from the plan and stays the same for all swaps."""

    tensors: list[TensorMeta]
    plan: Plan
    num_engines: int
    node: str
    node_ranks: list[int]
    node_leaders: list[int]
    buckets: SharedBuckets | None  # None on a node without an engine
    stream: BucketStream | None  # for the engine that this rank leads


class WeightSwap:
    """Keeps the rollout engines at the trainer's weights. Every rank has one, and calls it at the same points.

    Args:
        source: this rank's parameters. Their layout must stay the same; their storage may move.
        sink: the engine that this rank leads, None on the others.
        control_group: group of all ranks that take part, on a CPU backend.
        dtype: type in which the engines receive the weights; None: that of the parameters.
        node: name of the machine that this rank shares memory on; None: found out.
        log: where swaps are timed, as the phase "swap".
        revive: called after a swap that failed; replaces this rank's engine if it died, and tells whether it did. If one was replaced on
            any rank, the swap is tried once more.
    """

    def __init__(
        self,
        source: WeightSource,
        sink: WeightSink | None,
        config: SwapConfig,
        *,
        control_group: dist.ProcessGroup,
        dtype: torch.dtype | None = None,
        node: str | None = None,
        log: RunLog | None = None,
        revive: Callable[[], bool] | None = None,
    ) -> None:
        self._source, self._sink, self._config, self._dtype = source, sink, config, dtype
        self._log, self._revive = log, revive
        self._node = _node_name() if node is None else node
        self._agreement = Agreement(control_group, timeout_s=_AGREE_FACTOR * config.timeout_s, who_is_lost=self._check_peers)
        self._rank = self._agreement.rank
        self._names = NameMap(source.hf_config)
        self._setup: _Setup | None = None
        self._work: list[BucketWork] = []
        self._addresses: list[tuple[str, int]] = []
        self._num_swaps = 0
        self._policy_version = -1
        self._handed: HandOver | None = None
        self.last_stats: SwapStats | None = None

    @contextmanager
    def serving(self, policy_version: int) -> Iterator[None]:
        """A block in which every engine serves the trainer's present weights as `policy_version`.

        Nothing is moved if all engines serve this version already. A collective: all ranks enter together.

        Raises: WeightTransferError on every rank, naming rank, bucket and tensor, when anything failed anywhere; the old
            version then goes on serving. (An engine that fails in `commit` itself, after all have verified everything,
            is named too; the others then have the new version, and the next `serving` starts with a transfer to all.)
        """
        behind = self._sink is not None and self._sink.policy_version != policy_version
        needed, highest, lowest = self._agreement.reduce_max("enter the serving phase", int(behind), policy_version, -policy_version)
        if highest != -lowest:
            raise ValueError(
                f"ranks entered the serving phase with policy versions {-lowest} to {highest}; rank {self._rank} with {policy_version}"
            )
        if needed or self._policy_version != policy_version:
            with self._log.phase("swap") if self._log is not None else nullcontext({}) as args:
                try:
                    stats = self._swap(policy_version)
                except WeightTransferError:
                    replaced = self._revive is not None and self._revive()
                    if not any(self._agreement.reduce_max("look at the engines", int(replaced))):
                        raise
                    stats = self._swap(policy_version)
                args.update(bytes=stats.num_bytes, gigabytes_per_s=stats.gigabytes_per_s)
        yield

    def close(self) -> None:
        """Release the shared memory. The engines are not touched."""
        if self._setup is not None and self._setup.buckets is not None:
            self._work = []
            self._setup.buckets.close()
            self._setup = None

    def _swap(self, policy_version: int) -> SwapStats:
        start = time.perf_counter()
        if self._handed is not None and self._handed.is_stuck:
            raise WeightTransferError(f"rank {self._rank}: the engine still has not answered the previous swap")
        self._num_swaps += 1
        if self._setup is None:
            self._setup = self._make_setup()
        setup = self._setup
        failures: list[Failure] = []
        try:
            self._refresh_work(setup)
        except ValueError as error:
            self._fail(setup, failures, "reading the parameters", error)
        pending = self._start_receiving(setup, policy_version, failures)
        self._write(setup, pending, failures)
        self._end_receiving(setup, pending, failures)
        self._agree(setup, failures, "verify")
        self._policy_version = -1  # until all engines are known to have the same
        if self._sink is not None:
            try:
                self._sink.commit()
            except Exception as error:
                self._fail(setup, failures, "commit", error)
        self._agree(setup, failures, "commit")
        self._policy_version = policy_version
        self.last_stats = SwapStats(
            policy_version=policy_version,
            num_bytes=setup.plan.num_bytes * setup.num_engines,
            num_engines=setup.num_engines,
            num_buckets=len(setup.plan.buckets),
            duration_s=time.perf_counter() - start,
        )
        return self.last_stats

    # ---- once: who holds what, the plan, the memory

    def _make_setup(self) -> _Setup:
        """Gather all layouts, plan, and open the node's memory. Every rank raises if one cannot."""
        views, tensors, error = self._local_views()
        holdings: list[tuple[str, Region]] = [(view.name, view.region) for view in views]
        facts = self._agreement.gather("plan the swap", (holdings, self._node, self._sink is not None, os.getpid(), error))
        raise_all([Failure(rank, "planning", fact[4]) for rank, fact in enumerate(facts) if fact[4]])
        nodes = [fact[1] for fact in facts]
        leaders = [rank for rank, fact in enumerate(facts) if fact[2]]
        if not leaders:
            raise ValueError("no rank leads a rollout engine; give a sink to at least one")
        plan = make_plan(tensors, [fact[0] for fact in facts], nodes, leaders, self._config.bucket_bytes)

        node_ranks = [rank for rank, node in enumerate(nodes) if node == self._node]
        node_leaders = [rank for rank in leaders if rank in node_ranks]
        pids = {rank: facts[rank][3] for rank in node_ranks}
        sizes = (node_ranks, pids, plan.bucket_bytes, max(map(len, plan.buckets)))
        buckets, error = None, ""
        if node_leaders and self._rank == node_ranks[0]:
            try:
                buckets = SharedBuckets(*sizes)
            except OSError as cause:
                error = f"cannot create shared memory: {cause}"
        handles = self._agreement.gather("create shared memory", (buckets.handle if buckets is not None else None, error))
        raise_all([Failure(rank, "setting up", fact[1]) for rank, fact in enumerate(handles) if fact[1]])
        if node_leaders and buckets is None:
            try:
                buckets = SharedBuckets(*sizes, handle=handles[node_ranks[0]][0])
            except OSError as cause:
                error = f"cannot open the shared memory of rank {node_ranks[0]}: {cause}"
        errors = self._agreement.gather("open shared memory", error)
        raise_all([Failure(rank, "setting up", text) for rank, text in enumerate(errors) if text])
        stream = None
        if self._sink is not None and buckets is not None:
            layout = tuple(
                tuple(BucketSlice(entry.name, entry.tensor_start, entry.num_bytes, entry.bucket_start) for entry in bucket)
                for bucket in plan.buckets
            )
            handle, timeout_s = handles[node_ranks[0]][0], self._config.timeout_s
            stream = BucketStream(
                tuple(tensors), layout, tuple(node_ranks), pids, plan.bucket_bytes, handle, leader=self._rank, timeout_s=timeout_s
            )
        return _Setup(tensors, plan, len(leaders), self._node, node_ranks, node_leaders, buckets, stream)

    def _local_views(self) -> tuple[list[HFView], list[TensorMeta], str]:
        """This rank's views, the model's tensors, and what was wrong with them ("" if nothing)."""
        try:
            shards = list(self._source.weight_shards())
            views = [view for shard in shards for view in self._names.views(shard)]
            if not shards:
                return [], [], "this rank has no parameters"
            dtype = self._dtype if self._dtype is not None else shards[0].tensor.dtype
            return views, self._names.tensors(dtype), ""
        except ValueError as error:
            return [], [], str(error)

    def _refresh_work(self, setup: _Setup) -> None:
        """Make the copies of every bucket from the live tensors, again only where a parameter has moved."""
        shards = list(self._source.weight_shards())
        addresses = [(shard.name, shard.tensor.data_ptr()) for shard in shards]
        if addresses != self._addresses:
            views = [view for shard in shards for view in self._names.views(shard)]
            self._work = make_bucket_work(self._rank, setup.node, setup.plan, setup.tensors, views, setup.buckets)
            self._addresses = addresses

    # ---- the transfer

    def _ticket(self, setup: _Setup, bucket: int) -> int:
        """Counter value of a bucket: rises over all swaps, so that counters are never reset."""
        return self._num_swaps * (len(setup.plan.buckets) + 1) + bucket + 1

    def _wait(
        self, setup: _Setup, ranks: list[int], counter: int, bucket: int, waited_for: str, pending: PendingTransfer | None = None
    ) -> None:
        assert setup.buckets is not None
        setup.buckets.wait(
            ranks,
            counter,
            self._ticket(setup, bucket),
            swap=self._num_swaps,
            timeout_s=self._config.timeout_s,
            waited_for=f"{waited_for} bucket {bucket}",
            check_also=pending.check if pending is not None else None,
        )

    def _write(self, setup: _Setup, pending: PendingTransfer | None, failures: list[Failure]) -> None:
        """This rank's part of every bucket. After a failure it only sends what ranks of other nodes wait for."""
        shared = setup.buckets
        for bucket, work in enumerate(self._work):
            where = f"bucket {bucket} of {len(self._work)}"
            try:
                work.exchange(self._agreement.group, self._config.timeout_s)
            except Exception as error:  # whatever it is, all ranks must roll back
                self._fail(setup, failures, where, error)
            try:
                if shared is None or failures:
                    continue
                if bucket >= NUM_SLOTS:
                    self._wait(setup, setup.node_leaders, LOADED, bucket - NUM_SLOTS, "load", pending)
                for entry in work.entries:
                    where = f"bucket {bucket} of {len(self._work)}, tensor {entry.name}"
                    entry.write(shared)
                shared.publish(self._rank, WRITTEN, self._ticket(setup, bucket))
                where = f"bucket {bucket} of {len(self._work)}"
                if work.shared_checksums:
                    self._wait(setup, setup.node_ranks, WRITTEN, bucket, "write")
                    for entry in work.late_checksums:
                        entry.checksum(shared)
                shared.publish(self._rank, CHECKSUMMED, self._ticket(setup, bucket))
            except PeerFailed:
                failures.append(Failure(self._rank, where, ""))
            except Exception as error:  # whatever it is, all ranks must roll back
                self._fail(setup, failures, where, error)

    def _start_receiving(self, setup: _Setup, policy_version: int, failures: list[Failure]) -> PendingTransfer | None:
        """Let this rank's engine take over the buckets as they come: by itself, or handed to it one by one by a thread."""
        if self._sink is None or setup.stream is None or setup.buckets is None:
            return None
        numbers = {"swap": self._num_swaps, "first_ticket": self._ticket(setup, 0)}
        self._handed = None
        try:
            if isinstance(self._sink, StreamingWeightSink):
                return self._sink.receive(setup.stream, policy_version, **numbers)
            self._handed = HandOver(self._sink, setup.buckets, setup.stream, policy_version, **numbers)
            return self._handed
        except Exception as error:  # whatever it is, all ranks must roll back
            self._fail(setup, failures, "its engine", error)
            return None

    def _end_receiving(self, setup: _Setup, pending: PendingTransfer | None, failures: list[Failure]) -> None:
        if pending is None:
            return
        try:
            pending.wait()
        except PeerFailed:
            failures.append(Failure(self._rank, "its engine", ""))
        except Exception as error:
            self._fail(setup, failures, "its engine", error)

    # ---- agreement

    def _fail(self, setup: _Setup, failures: list[Failure], where: str, error: Exception) -> None:
        """Note a failure and let this node's ranks see it."""
        failures.append(
            Failure(self._rank, where, f"{error}" if isinstance(error, WeightTransferError) else f"{type(error).__name__}: {error}")
        )
        if setup.buckets is not None:
            setup.buckets.publish(self._rank, FAILED, self._num_swaps)

    def _agree(self, setup: _Setup, failures: list[Failure], step: str) -> None:
        """Return if no rank failed; otherwise roll back and raise the same error on every rank."""
        try:
            (failed,) = self._agreement.reduce_max(step, int(bool(failures)))
            if not failed:
                return
        except WeightTransferError:
            self._rollback()
            raise
        self._rollback()
        everyone = self._agreement.gather("tell why the swap failed", failures)
        raise_all([failure for of_rank in everyone for failure in of_rank if failure.reason])

    def _rollback(self) -> None:
        """Let the engine forget the transaction. One that does not answer, or died, has nothing to forget."""
        if self._sink is not None and not (self._handed is not None and self._handed.is_stuck):
            with suppress(Exception):
                self._sink.rollback()

    def _check_peers(self) -> None:
        if self._setup is not None and self._setup.buckets is not None:
            self._setup.buckets.check_peers()


def _node_name() -> str:
    """Equal for processes that can open each other's memory: same boot of a machine, same process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
