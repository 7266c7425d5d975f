"""What is settled before the first swap and stays for all: who holds and wants what, the route, the plan, and the memory."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tandem.engine.buckets import (
    LOADED,
    MAX_PROCESSES,
    BucketSlice,
    BucketStream,
    DeviceWeightSink,
    Region,
    ShardedWeightSink,
    SharedBuckets,
    SharedMemoryHandle,
)
from tandem.engine.checkpoint.agreement import Agreement, Failure, raise_all
from tandem.engine.checkpoint.block_scales import Cells, cells_of, with_scales
from tandem.engine.checkpoint.measure import measure
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.checkpoint.plan import MAX_ENTRY_BYTES, Place, PlacePlan, Plan, Wanted, make_plan, volume
from tandem.engine.checkpoint.planner import Topology, choose, estimate, table, union_bytes
from tandem.engine.checkpoint.routes import Arrangement, Engine, Reader, arrange
from tandem.engine.checkpoint.transport import Transport
from tandem.engine.config import SwapConfig, SwapRoute
from tandem.engine.quantised import quantised
from tandem.engine.rollout_config import Quantization
from tandem.engine.types import TensorMeta, WeightSink, WeightSource

# Of swap.bucket_bytes. Counters, checksums and what the processes of both sides allocate during a swap have the rest: all of it together
# stays within as many buckets as there are slots.
_FILLED_16THS = 15


@dataclass(frozen=True, slots=True)
class Setup:
    """Of one rank."""

    route: SwapRoute
    table: str  # why it was chosen; "" where the configuration says it
    tensors: list[TensorMeta]
    plan: Plan
    received_bytes: int  # by all engines together
    num_engines: int
    place: PlacePlan | None  # whose buckets this rank writes
    buckets: SharedBuckets | None  # of that place
    readers: dict[int, list[int]]  # of that place: counter, ranks in whose lines it is
    streams: tuple[BucketStream, ...]  # of each process of the engine that this rank leads
    opened: tuple[SharedBuckets, ...]  # where those read; the place's own among them, if it has some
    transport: Transport
    cells: Cells  # of the scales of matrices that are quantised; empty where none is
    device: torch.device | None  # whose memory and kernels the buckets take; None: host memory

    @property
    def all_buckets(self) -> list[SharedBuckets]:
        """Those that this rank has open."""
        own = [self.buckets] if self.buckets is not None and self.buckets not in self.opened else []
        return [*self.opened, *own]

    @property
    def num_buckets(self) -> int:
        """Steps of a swap, the same on every rank."""
        return self.plan.num_steps

    @property
    def moved_bytes(self) -> int:
        """From rank to rank."""
        itemsize = {meta.name: meta.dtype.itemsize for meta in self.tensors}
        return sum(volume(each.region) * itemsize[each.name] * len(each.writers) for each in self.plan.transfers)

    def close(self) -> None:
        for buckets in self.all_buckets:
            buckets.close()


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a rank tells the others."""

    holdings: list[tuple[str, Region]]
    node: str
    pid: int
    wanted: tuple[Wanted | None, ...] | None  # of each process of its engine; None: it leads none
    opens_device_memory: bool
    is_on_gpu: bool
    error: str


def make_setup(
    agreement: Agreement,
    config: SwapConfig,
    source: WeightSource,
    sink: WeightSink | None,
    names: NameMap,
    node: str,
    dtype: torch.dtype | None,
    quantization: Quantization | None,
) -> Setup:
    """Gather all layouts, choose the route, plan, and open the memory. Every rank raises if one cannot.

    Raises: WeightTransferError; ValueError on all ranks for a route that is impossible.
    """
    rank = agreement.rank
    tensors, device, mine = _local_facts(source, sink, names, node, dtype, quantization)
    facts: list[_Facts] = agreement.gather("plan the swap", mine)
    raise_all([Failure(rank, "planning", fact.error) for rank, fact in enumerate(facts) if fact.error])
    cells = cells_of(tensors, [fact.holdings for fact in facts])
    nodes, holdings = [fact.node for fact in facts], with_scales([fact.holdings for fact in facts], cells)
    engines = [Engine(rank, fact.wanted) for rank, fact in enumerate(facts) if fact.wanted is not None]
    if not engines:
        raise ValueError("no rank leads a rollout engine; give a sink to at least one")
    takes_device = all(fact.opens_device_memory for fact in facts if fact.wanted is not None)

    route, why = config.route, ""
    if route == "auto":
        topology = Topology(
            tensors=tensors,
            holdings=holdings,
            nodes=nodes,
            engines=engines,
            has_device_buckets=takes_device and all(fact.is_on_gpu for fact in facts),
            bucket_bytes=config.bucket_bytes,
            device_bucket_bytes=config.device_bucket_bytes,
        )
        estimates = estimate(topology, measure(agreement, nodes, device))
        route = choose(estimates).route
        why = table(estimates, route)
    try:
        arrangement = arrange(route, nodes, engines)
    except ValueError as error:
        raise ValueError(f"swap.route is {route}, but {error}; choose host_memory or auto") from error
    on_device = device if takes_device and route != "host_memory" else None
    bucket_bytes = config.device_bucket_bytes if on_device is not None else config.bucket_bytes * _FILLED_16THS // 16
    plan = make_plan(
        tensors,
        holdings,
        nodes,
        arrangement.places,
        bucket_bytes,
        max_entry_bytes=MAX_ENTRY_BYTES if on_device is None else bucket_bytes,
        broadcasts=route == "gather_and_broadcast",
    )
    own = arrangement.place_of(rank)
    buckets, opened, handles = _open_memory(agreement, arrangement, plan, facts, on_device)
    streams = _streams(agreement, arrangement, plan, facts, handles, tensors, config.timeout_s)
    readers: dict[int, list[int]] = {}
    for reader in arrangement.readers:
        if reader.place == own:
            readers.setdefault(LOADED + reader.process, []).append(reader.line)
    return Setup(
        route=route,
        table=why,
        tensors=tensors,
        plan=plan,
        received_bytes=sum(union_bytes(tensors, Place("", (), wanted)) for engine in engines for wanted in engine.wanted),
        num_engines=len(engines),
        place=None if own is None else plan.places[own],
        buckets=buckets,
        readers=readers,
        streams=streams,
        opened=opened,
        transport=Transport(
            agreement.group, plan, device=torch.device("cpu") if on_device is None else on_device, timeout_s=config.timeout_s
        ),
        cells=cells,
        device=on_device,
    )


def _local_facts(
    source: WeightSource,
    sink: WeightSink | None,
    names: NameMap,
    node: str,
    dtype: torch.dtype | None,
    quantization: Quantization | None,
) -> tuple[list[TensorMeta], torch.device, _Facts]:
    """The model's tensors, where this rank's parameters are, and what it tells; an error in place of what could not be found out."""
    tensors: list[TensorMeta] = []
    holdings: list[tuple[str, Region]] = []
    device, error = torch.device("cpu"), ""
    wanted: tuple[Wanted | None, ...] | None = None if sink is None else (None,)
    try:
        shards = list(source.weight_shards())
        if not shards:
            raise ValueError("this rank has no parameters")
        device = shards[0].tensor.device
        holdings = [(view.name, view.region) for shard in shards for view in names.views(shard)]
        tensors = names.tensors(dtype if dtype is not None else shards[0].tensor.dtype)
        if quantization is not None:
            tensors = quantised(tensors)
        if isinstance(sink, ShardedWeightSink):
            wanted = tuple(None if regions is None else tuple(regions) for regions in sink.wanted_regions())
            if not 0 < len(wanted) <= MAX_PROCESSES:
                raise ValueError(f"the engine has {len(wanted)} processes; there may be 1 to {MAX_PROCESSES}")
    except Exception as cause:  # whatever it is, all ranks must hear of it
        error = str(cause) if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"
    opens = isinstance(sink, DeviceWeightSink) and sink.opens_device_memory
    return tensors, device, _Facts(holdings, node, os.getpid(), wanted, opens, device.type == "cuda", error)


def _open_memory(
    agreement: Agreement, arrangement: Arrangement, plan: Plan, facts: Sequence[_Facts], device: torch.device | None
) -> tuple[SharedBuckets | None, tuple[SharedBuckets, ...], list[SharedMemoryHandle | None]]:
    """The buckets that this rank writes, those that its engine reads, and the handles of all places (None where another node's)."""
    rank = agreement.rank
    own = arrangement.place_of(rank)
    opened: dict[int, SharedBuckets] = {}
    created, error = None, ""
    if own is not None and rank == arrangement.places[own].ranks[0]:
        try:
            created = opened[own] = SharedBuckets(*_sizes(arrangement, plan, own, facts), device=device)
        except (OSError, RuntimeError) as cause:
            error = f"cannot create shared memory: {cause}"
    told = agreement.gather("create shared memory", (created.handle if created is not None else None, error))
    errors = [text for _, text in told]
    handles = [told[place.ranks[0]][0] for place in arrangement.places]
    read = {reader.place for reader in arrangement.readers if reader.leader == rank}
    error = ""
    if not any(errors):
        for place in {*read, own} - {None} - opened.keys():
            assert place is not None
            try:
                # a GPU's memory is opened by those that read there, not by their leader: it needs the counters alone
                handle = replace(handles[place], device_slots=())
                opened[place] = SharedBuckets(*_sizes(arrangement, plan, place, facts), handle=handle)
            except OSError as cause:
                error = f"cannot open {arrangement.places[place].name}: {cause}"
    failures = [Failure(rank, "setting up", text) for rank, text in enumerate(errors) if text]
    failures += [Failure(rank, "setting up", text) for rank, text in enumerate(agreement.gather("open shared memory", error)) if text]
    if failures:
        for buckets in opened.values():
            with suppress(OSError):
                buckets.close()
        raise_all(failures)
    return (None if own is None else opened[own]), tuple(opened[place] for place in sorted(read)), handles


def _sizes(arrangement: Arrangement, plan: Plan, place: int, facts: Sequence[_Facts]) -> tuple[tuple[int, ...], dict[int, int], int, int]:
    """What all that open a place's buckets must say alike: lines, process ids, bytes of a slot, and most entries."""
    ranks = arrangement.places[place].ranks
    node = facts[ranks[0]].node
    pids = {rank: fact.pid for rank, fact in enumerate(facts) if fact.node == node}
    return ranks, pids, plan.bucket_bytes, max(map(len, plan.places[place].buckets), default=1)


def _streams(
    agreement: Agreement,
    arrangement: Arrangement,
    plan: Plan,
    facts: Sequence[_Facts],
    handles: Sequence[SharedMemoryHandle | None],
    tensors: Sequence[TensorMeta],
    timeout_s: float,
) -> tuple[BucketStream, ...]:
    """Of each process of the engine that this rank leads. The first one carries the others."""

    def of(reader: Reader) -> BucketStream:
        place = plan.places[reader.place]
        is_whole = place.place.wanted is None
        layout = tuple(
            tuple(
                BucketSlice(entry.name, entry.tensor_start, entry.num_bytes, entry.bucket_start, None if is_whole else entry.region)
                for entry in bucket
            )
            for bucket in place.buckets
        )
        ranks, pids, bucket_bytes, _ = _sizes(arrangement, plan, reader.place, facts)
        handle = handles[reader.place]
        assert handle is not None
        return BucketStream(
            tuple(tensors), layout, ranks, pids, bucket_bytes, handle, leader=reader.line, timeout_s=timeout_s, process=reader.process
        )

    streams = tuple(of(reader) for reader in arrangement.readers if reader.leader == agreement.rank)
    return (replace(streams[0], following=streams[1:]), *streams[1:]) if streams else ()


def node_name() -> str:
    """Equal for processes that can open each other's memory: same boot of a machine, same process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
