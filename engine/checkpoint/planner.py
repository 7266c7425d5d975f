"""Which route the weights take: seconds of each, estimated from bytes, topology and measured bandwidths. Pure.

A swap has four stages: fetching from GPUs to the host, gathering what ranks lack, writing the buckets, and loading them into the engines.
On GPUs they overlap bucket by bucket, so that the slowest counts, and the others with one bucket; on a CPU they share the cores, and add.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from tandem.engine.buckets import Region
from tandem.engine.checkpoint.plan import Holdings, Place, areas_of, distinct_regions, intersection, volume
from tandem.engine.checkpoint.routes import Arrangement, Engine, arrange
from tandem.engine.config import SwapRoute
from tandem.engine.types import TensorMeta

ROUTES: tuple[SwapRoute, ...] = get_args(SwapRoute)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidths:
    """Bytes per second that one rank gets while all others do the same; None where there is no such way."""

    host_copy: float
    device_copy: float | None = None
    host_device: float | None = None
    in_node: float | None = None  # from rank to rank
    between_nodes: float | None = None
    latency_s: float = 0.0  # seconds of one message between ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Who holds and who wants what."""

    tensors: Sequence[TensorMeta]
    holdings: Holdings
    nodes: Sequence[str]  # per rank
    engines: Sequence[Engine]
    has_device_buckets: bool = False  # whether buckets of a rank are in its GPU's memory
    bucket_bytes: int = 2 << 20
    device_bucket_bytes: int = 128 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Of one route. `seconds` None: it is impossible, and `reason` says why."""

    route: SwapRoute
    seconds: float | None
    moved_bytes: int = 0  # from rank to rank
    written_bytes: int = 0  # to buckets
    reason: str = ""


def estimate(topology: Topology, bandwidths: Bandwidths) -> list[Estimate]:
    """Every route's, in the order of ROUTES."""
    regions = distinct_regions(topology.tensors, topology.holdings)
    found = []
    for route in ROUTES:
        try:
            arrangement = arrange(route, topology.nodes, topology.engines)
        except ValueError as error:
            found.append(Estimate(route=route, seconds=None, reason=str(error)))
            continue
        traffic = _traffic(topology, regions, arrangement, broadcasts=route == "gather_and_broadcast")
        found.append(_estimate(route, topology, arrangement, traffic, bandwidths))
    return found


def choose(estimates: Sequence[Estimate]) -> Estimate:
    """The fastest possible one, of equal ones the first."""
    possible = [each for each in estimates if each.seconds is not None]
    return min(possible, key=lambda each: each.seconds or 0.0)


def table(estimates: Sequence[Estimate], chosen: SwapRoute) -> str:
    """For people: a line for each route."""
    lines = [f"weight swap: {chosen}"]
    for each in estimates:
        mark = "→" if each.route == chosen else " "
        if each.seconds is None:
            lines.append(f"{mark} {each.route:<20} impossible: {each.reason}")
        else:
            sizes = f"{each.written_bytes / 1e6:10,.1f} MB written, {each.moved_bytes / 1e6:10,.1f} MB between ranks"
            lines.append(f"{mark} {each.route:<20} {each.seconds * 1e3:10,.2f} ms  {sizes}; {each.reason}")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Traffic:
    """Bytes of a route."""

    written: list[int]  # per place
    received: list[dict[bool, float]]  # per place, by whether they come from another node
    sent: Mapping[int, Mapping[bool, float]]  # per rank
    num_senders: int  # most ranks that one place gets something from


def _traffic(
    topology: Topology, regions: Mapping[str, Mapping[Region, tuple[int, ...]]], arrangement: Arrangement, *, broadcasts: bool
) -> _Traffic:
    nodes = topology.nodes
    written, received = [], []
    sent: defaultdict[int, defaultdict[bool, float]] = defaultdict(lambda: defaultdict(float))
    senders: list[set[tuple[int, ...]]] = []
    told: set[tuple[str, Region, tuple[int, ...]]] = set()  # what a broadcast has sent already
    for place in arrangement.places:
        here = set(place.ranks)
        total, missing, owners_of_missing = 0, {False: 0.0, True: 0.0}, set()
        for meta, areas in areas_of(topology.tensors, place):
            for area in areas:
                for region, owners in regions[meta.name].items():
                    part = intersection(region, area)
                    if part is None:
                        continue
                    num_bytes = volume(part) * meta.dtype.itemsize
                    total += num_bytes
                    if not here.isdisjoint(owners):
                        continue
                    near = [rank for rank in owners if nodes[rank] == nodes[place.ranks[0]]]
                    is_far = not near
                    missing[is_far] += num_bytes
                    owners_of_missing.add(owners)
                    sources = owners if broadcasts else near or owners
                    if broadcasts and (meta.name, part, owners) in told:
                        continue
                    told.add((meta.name, part, owners))
                    for rank in sources:
                        sent[rank][is_far] += num_bytes / len(sources)
        written.append(total)
        received.append(missing)
        senders.append(owners_of_missing)
    return _Traffic(written, received, sent, max(map(len, senders), default=0))


def _estimate(route: SwapRoute, topology: Topology, arrangement: Arrangement, traffic: _Traffic, bandwidths: Bandwidths) -> Estimate:
    moved = round(sum(sum(received.values()) for received in traffic.received))
    on_gpu = bandwidths.device_copy is not None and bandwidths.host_device is not None
    on_device = on_gpu and topology.has_device_buckets and route != "host_memory"

    def link_s(num_bytes: Mapping[bool, float], num_ranks: int = 1) -> float:
        speeds = {False: bandwidths.in_node, True: bandwidths.between_nodes}
        # a rank that has nothing to send over a link that nobody measured takes no time for it
        return sum(count / (speeds[is_far] or 1.0) / num_ranks for is_far, count in num_bytes.items() if count)

    copy = bandwidths.device_copy if on_device and bandwidths.device_copy is not None else bandwidths.host_copy
    stages = defaultdict(float)
    for place, written, received in zip(arrangement.places, traffic.written, traffic.received, strict=True):
        num_ranks = len(place.ranks)
        if on_gpu and not on_device:
            assert bandwidths.host_device is not None
            stages["fetching to the host"] = max(stages["fetching to the host"], written / num_ranks / bandwidths.host_device)
        stages["writing"] = max(stages["writing"], written / num_ranks / copy)
        stages["gathering"] = max(stages["gathering"], link_s(received, num_ranks))
    for rank, sent in traffic.sent.items():
        place = arrangement.place_of(rank)
        got = 0.0
        if route == "gather_and_broadcast" and place is not None:  # one order for all: a rank cannot send and receive at a time
            got = link_s(traffic.received[place])
        stages["gathering"] = max(stages["gathering"], link_s(sent) + got)
    wishes = {wanted for engine in topology.engines for wanted in engine.wanted}
    loaded = max(union_bytes(topology.tensors, Place("", (), wanted)) for wanted in wishes)
    stages["loading"] = loaded / (bandwidths.host_device if on_gpu and not on_device and bandwidths.host_device else copy)
    bucket_bytes = topology.device_bucket_bytes if on_device else topology.bucket_bytes
    num_buckets = max(1, -(-max(traffic.written) // bucket_bytes))
    stages["gathering"] += bandwidths.latency_s * num_buckets * traffic.num_senders
    slowest = max(stages, key=lambda stage: stages[stage])
    total = sum(stages.values())
    seconds = stages[slowest] + (total - stages[slowest]) / num_buckets if on_gpu else total
    where = "GPU memory" if on_device else "host memory"
    places = f"{len(arrangement.places)} place{'s' if len(arrangement.places) > 1 else ''} in {where}"
    return Estimate(
        route=route,
        seconds=seconds,
        moved_bytes=moved,
        written_bytes=sum(traffic.written),
        reason=f"{places}, mostly {slowest} ({stages[slowest] * 1e3:,.2f} ms)",
    )


def union_bytes(tensors: Sequence[TensorMeta], place: Place) -> int:
    """Bytes that the readers of a place want together."""
    return sum(volume(area) * meta.dtype.itemsize for meta, areas in areas_of(tensors, place) for area in areas)
