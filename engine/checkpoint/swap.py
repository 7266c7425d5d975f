"""The serving phase: the rollout engines receive the trainer's weights in one transaction over all ranks.

    prepare → for each bucket: ranks write, engines verify and take over → all agree → commit, else roll back

Writing bucket n+1 overlaps with the engines' taking over of bucket n. Ranks and the engines that read their buckets take turns through
counters in shared memory; all ranks agree through a process group of their own. Every wait has a deadline. Where the buckets are, and
what ranks send to each other, is the route's (routes.py), which is chosen before the first swap (swap_setup.py).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tandem.engine.buckets import CHECKSUMMED, NUM_SLOTS, WRITTEN, PeerFailed, PendingTransfer, StreamingWeightSink
from tandem.engine.checkpoint.agreement import Agreement, Failure, raise_all
from tandem.engine.checkpoint.block_scales import BlockScales
from tandem.engine.checkpoint.device_writer import DeviceWork, Launched, make_device_work
from tandem.engine.checkpoint.hand_over import HandOver
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.checkpoint.swap_setup import Setup, make_setup, node_name
from tandem.engine.checkpoint.writer import BucketWork, make_bucket_work
from tandem.engine.config import SwapConfig, SwapRoute
from tandem.engine.log import RunLog
from tandem.engine.rollout_config import Quantization
from tandem.engine.types import EngineDiedError, WeightSink, WeightSource, WeightTransferError

# A rank may spend one deadline on a bucket and one on its engine before it comes to say so.
_AGREE_FACTOR = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapStats:
    """What one swap moved, as this rank saw it."""

    policy_version: int
    route: SwapRoute
    num_bytes: int  # received by all engines together
    moved_bytes: int  # from rank to rank
    num_engines: int
    num_buckets: int
    duration_s: float

    @property
    def gigabytes_per_s(self) -> float:
        return self.num_bytes / self.duration_s / 1e9


class WeightSwap:
    """Keeps the rollout engines at the trainer's weights. Every rank has one, and calls it at the same points.

    Args:
        source: this rank's parameters. Their layout must stay the same; their storage may move.
        sink: the engine that this rank leads, None on the others.
        control_group: group of all ranks that take part, on a CPU backend.
        dtype: type in which the engines receive the weights; None: that of the parameters.
        quantization: of the matrices (engine/quantised.py), on the way to the buckets; None: they have that type too.
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
        quantization: Quantization | None = None,
        node: str | None = None,
        log: RunLog | None = None,
        revive: Callable[[], bool] | None = None,
    ) -> None:
        self._source, self._sink, self._config, self._dtype = source, sink, config, dtype
        self._quantization: Quantization | None = quantization
        self._log, self._revive = log, revive
        self._node = node_name() if node is None else node
        self._agreement = Agreement(control_group, timeout_s=_AGREE_FACTOR * config.timeout_s, who_is_lost=self._check_peers)
        self._rank = self._agreement.rank
        self._names = NameMap(source.hf_config)
        self._setup: Setup | None = None
        self._work: list[BucketWork] | list[DeviceWork] = []
        self._scales: BlockScales | None = None
        self._addresses: list[tuple[str, int]] = []
        self._num_swaps = 0
        self._policy_version = -1
        self._handed: HandOver | None = None
        self._has_committed = False  # and not settled
        self._where = ""  # what is being written, for messages
        self.last_stats: SwapStats | None = None

    @contextmanager
    def serving(self, policy_version: int) -> Iterator[None]:
        """A block in which every engine serves the trainer's present weights as `policy_version`.

        Nothing is moved if all engines serve this version already. A collective: all ranks enter together.

        Raises: WeightTransferError on every rank, naming rank, bucket and tensor, when anything failed anywhere; the old
            version then goes on serving. Where an engine fails in `commit` itself, those that have committed revert.
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
                args.update(bytes=stats.num_bytes, gigabytes_per_s=stats.gigabytes_per_s, route=stats.route)
        yield

    def close(self) -> None:
        """Release the shared memory. The engines are not touched."""
        self._work, self._scales, self._addresses = [], None, []
        if self._setup is not None:
            self._setup.close()
            self._setup = None

    def _swap(self, policy_version: int) -> SwapStats:
        start = time.perf_counter()
        if self._handed is not None and self._handed.is_stuck:
            raise WeightTransferError(f"rank {self._rank}: the engine still has not answered the previous swap")
        self._num_swaps += 1
        if self._setup is None:
            self._setup = make_setup(
                self._agreement, self._config, self._source, self._sink, self._names, self._node, self._dtype, self._quantization
            )
            if self._log is not None and self._setup.table:
                self._log.say(self._setup.table)
        setup = self._setup
        failures: list[Failure] = []
        try:
            self._refresh_work(setup)
        except ValueError as error:
            self._fail(setup, failures, "reading the parameters", error)
        if self._quantization is not None:
            self._refresh_scales(setup, failures)
        pending = self._start_receiving(setup, policy_version, failures)
        self._write(setup, pending, failures)
        self._end_receiving(setup, pending, failures)
        self._agree(setup, failures, "verify")
        self._policy_version = -1  # until all engines are known to have the same
        if self._sink is not None:
            try:
                self._sink.commit()
                self._has_committed = True
            except Exception as error:
                self._fail(setup, failures, "commit", error)
        self._agree(setup, failures, "commit")
        self._has_committed = False
        if self._sink is not None:
            with suppress(EngineDiedError):  # it is replaced when it is needed
                self._sink.settle()
        self._policy_version = policy_version
        self.last_stats = SwapStats(
            policy_version=policy_version,
            route=setup.route,
            num_bytes=setup.received_bytes,
            moved_bytes=setup.moved_bytes,
            num_engines=setup.num_engines,
            num_buckets=setup.num_buckets,
            duration_s=time.perf_counter() - start,
        )
        return self.last_stats

    def _refresh_work(self, setup: Setup) -> None:
        """Make the copies of every bucket from the live tensors, again only where a parameter has moved."""
        shards = list(self._source.weight_shards())
        addresses = [(shard.name, shard.tensor.data_ptr()) for shard in shards]
        if addresses != self._addresses:
            self._scales = None
            views = [view for shard in shards for view in self._names.views(shard)]
            scales: dict[str, torch.Tensor] = {}
            if self._quantization is not None:
                self._scales = BlockScales(self._agreement, setup.cells, views)
                views += self._scales.views
                scales = self._scales.of
            of = self._rank, setup.plan, setup.place, setup.tensors, views, setup.buckets, scales
            self._work = make_bucket_work(*of) if setup.device is None else make_device_work(*of, setup.device)
            self._addresses = addresses

    def _refresh_scales(self, setup: Setup, failures: list[Failure]) -> None:
        """Find the scales of the present weights; without weights, still hear what the others tell."""
        scales = self._scales if self._scales is not None else BlockScales(self._agreement, setup.cells, ())
        try:
            scales.refresh()
        except WeightTransferError:
            raise  # a rank is gone
        except Exception as error:
            self._fail(setup, failures, "quantising", error)

    # ---- the transfer

    def _ticket(self, setup: Setup, bucket: int) -> int:
        """Counter value of a bucket: rises over all swaps, so that counters are never reset."""
        return self._num_swaps * (setup.num_buckets + 1) + bucket + 1

    def _wait(
        self, setup: Setup, ranks: Sequence[int], counter: int, bucket: int, waited_for: str, pending: PendingTransfer | None = None
    ) -> None:
        assert setup.buckets is not None

        def check_engine() -> None:
            assert pending is not None
            try:
                pending.check()
            except PeerFailed:
                self._show_failed(setup)
                raise

        setup.buckets.wait(
            ranks,
            counter,
            self._ticket(setup, bucket),
            swap=self._num_swaps,
            timeout_s=self._config.timeout_s,
            waited_for=f"{waited_for} bucket {bucket}",
            check_also=check_engine if pending is not None else None,
        )

    def _write(self, setup: Setup, pending: PendingTransfer | None, failures: list[Failure]) -> None:
        """This rank's part of every bucket. After a failure it only sends what other ranks wait for."""
        launched: tuple[int, Launched] | None = None
        for bucket, work in enumerate(self._work):
            self._where = f"bucket {bucket} of {len(self._work)}"
            try:
                work.exchange(setup.transport)
            except Exception as error:  # whatever it is, all ranks must roll back
                self._fail(setup, failures, self._where, error)
            if setup.place is None or failures or bucket >= len(setup.place.buckets):
                continue
            try:
                if bucket >= NUM_SLOTS:
                    for counter, ranks in setup.readers.items():
                        self._wait(setup, ranks, counter, bucket - NUM_SLOTS, "load", pending)
                if isinstance(work, DeviceWork):
                    assert setup.buckets is not None
                    following = bucket, work.launch(setup.buckets)
                    self._finish(setup, launched)  # while the device writes the next one
                    launched = following
                else:
                    self._write_from_host(setup, bucket, work)
            except PeerFailed:
                failures.append(Failure(self._rank, self._where, ""))
            except Exception as error:
                self._fail(setup, failures, self._where, error)
        try:
            self._finish(setup, None if failures else launched)
        except Exception as error:
            self._fail(setup, failures, self._where, error)

    def _write_from_host(self, setup: Setup, bucket: int, work: BucketWork) -> None:
        shared, place, where = setup.buckets, setup.place, self._where
        assert shared is not None
        assert place is not None
        for entry in work.entries:
            self._where = f"{where}, tensor {entry.name}"
            entry.write(shared)
        shared.publish(self._rank, WRITTEN, self._ticket(setup, bucket))
        self._where = where
        if work.shared_checksums:
            self._wait(setup, place.place.ranks, WRITTEN, bucket, "write")
            for entry in work.late_checksums:
                entry.checksum(shared)
        shared.publish(self._rank, CHECKSUMMED, self._ticket(setup, bucket))

    def _finish(self, setup: Setup, launched: tuple[int, Launched] | None) -> None:
        """Wait until the device has written a bucket, and let the engine have it."""
        if launched is None:
            return
        bucket, work = launched
        self._where = f"bucket {bucket} of {len(self._work)}"
        assert setup.buckets is not None
        work.finish(setup.buckets)
        setup.buckets.publish(self._rank, CHECKSUMMED, self._ticket(setup, bucket))

    def _start_receiving(self, setup: Setup, policy_version: int, failures: list[Failure]) -> PendingTransfer | None:
        """Let this rank's engine take over the buckets as they come: by itself, or handed to it one by one by a thread."""
        if self._sink is None:
            return None
        numbers = {"swap": self._num_swaps, "first_ticket": self._ticket(setup, 0)}
        self._handed = None
        try:
            if isinstance(self._sink, StreamingWeightSink):
                return self._sink.receive(setup.streams[0], policy_version, **numbers)
            self._handed = HandOver(self._sink, setup.opened[0], setup.streams[0], policy_version, **numbers)
            return self._handed
        except Exception as error:  # whatever it is, all ranks must roll back
            self._fail(setup, failures, "its engine", error)
            return None

    def _end_receiving(self, setup: Setup, pending: PendingTransfer | None, failures: list[Failure]) -> None:
        if pending is None:
            return
        try:
            pending.wait()
        except PeerFailed:
            failures.append(Failure(self._rank, "its engine", ""))
        except Exception as error:
            self._fail(setup, failures, "its engine", error)

    # ---- agreement

    def _fail(self, setup: Setup, failures: list[Failure], where: str, error: Exception) -> None:
        """Note a failure and let those see it that wait for this rank's buckets, or for its engine."""
        failures.append(
            Failure(self._rank, where, f"{error}" if isinstance(error, WeightTransferError) else f"{type(error).__name__}: {error}")
        )
        self._show_failed(setup)

    def _show_failed(self, setup: Setup) -> None:
        for buckets in setup.all_buckets:
            buckets.fail(self._num_swaps)

    def _agree(self, setup: Setup, failures: list[Failure], step: str) -> None:
        """Return if no rank failed; otherwise roll back and raise the same error on every rank."""
        try:
            (failed,) = self._agreement.reduce_max(step, int(bool(failures)))
            if not failed:
                return
        except WeightTransferError:
            self._rollback()
            raise
        self._rollback()
        everyone = self._agreement.gather("tell why the swap failed", (failures, setup.transport.is_broken))
        if any(is_broken for _, is_broken in everyone):
            self.close()  # the next swap begins with connections of its own
        raise_all([failure for of_rank, _ in everyone for failure in of_rank if failure.reason])

    def _rollback(self) -> None:
        """Let the engine forget the transaction, committed or not. One that does not answer, or died, has nothing to forget."""
        if self._sink is not None and not (self._handed is not None and self._handed.is_stuck):
            with suppress(Exception):
                if self._has_committed:
                    self._sink.revert()
                else:
                    self._sink.rollback()
        self._has_committed = False

    def _check_peers(self) -> None:
        for buckets in self._setup.all_buckets if self._setup is not None else ():
            buckets.check_peers()
