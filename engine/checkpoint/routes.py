"""The ways on which weights reach the engines, as places and those that read there. Pure.

host_memory            one place per node, in host memory: its ranks share the writing, all its engines read
shard_to_shard         one place per process of an engine, at the rank on whose GPU it runs: that rank writes what it holds, and other
                       ranks send it what it lacks
gather_and_broadcast   the same places; what several of them lack, one rank sends to all of them at once
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.checkpoint.plan import Place, Wanted
from tandem.engine.config import SwapRoute


@dataclass(frozen=True, slots=True)
class Engine:
    """What each of its processes wants, None: everything. Process p runs on the GPU of rank leader + p, where there is one."""

    leader: int
    wanted: tuple[Wanted | None, ...] = (None,)


@dataclass(frozen=True, slots=True)
class Reader:
    """A process of an engine."""

    leader: int
    process: int
    place: int  # index
    line: int  # the rank in whose line of the place's counters its own one is


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The places of a route, in the order of their ranks, and who reads there."""

    places: tuple[Place, ...]
    readers: tuple[Reader, ...]

    def place_of(self, rank: int) -> int | None:
        """The place whose buckets a rank writes."""
        return next((index for index, place in enumerate(self.places) if rank in place.ranks), None)


def arrange(route: SwapRoute, nodes: Sequence[str], engines: Sequence[Engine]) -> Arrangement:
    """The places of a route.

    Args:
        nodes: per rank, the node that it runs on.
    Raises: ValueError saying why the route is impossible.
    """
    return _by_node(nodes, engines) if route == "host_memory" else _by_rank(nodes, engines)


def _by_node(nodes: Sequence[str], engines: Sequence[Engine]) -> Arrangement:
    names = list(dict.fromkeys(nodes[engine.leader] for engine in engines))
    places = []
    for name in names:
        ranks = tuple(rank for rank, node in enumerate(nodes) if node == name)
        asked = [wanted for engine in engines if engine.leader in ranks for wanted in engine.wanted]
        together = {region: None for wanted in asked for region in wanted or ()}
        places.append(Place(f"the host memory of ranks {_runs(ranks)}", ranks, None if None in asked else tuple(together)))
    readers = [
        Reader(engine.leader, process, names.index(nodes[engine.leader]), engine.leader)
        for engine in engines
        for process in range(len(engine.wanted))
    ]
    return Arrangement(tuple(places), tuple(readers))


def _by_rank(nodes: Sequence[str], engines: Sequence[Engine]) -> Arrangement:
    places: list[Place] = []
    readers: list[Reader] = []
    leader_of: dict[int, int] = {}
    for engine in engines:
        for process, wanted in enumerate(engine.wanted):
            rank = engine.leader + process
            whose = f"process {process} of the engine of rank {engine.leader}"
            if rank >= len(nodes) or nodes[rank] != nodes[engine.leader]:
                raise ValueError(f"{whose} belongs to rank {rank}, which is not on its node")
            if rank in leader_of:
                raise ValueError(f"{whose} and one of rank {leader_of[rank]}'s engine both belong to rank {rank}")
            leader_of[rank] = engine.leader
            readers.append(Reader(engine.leader, process, len(places), rank))
            places.append(Place(f"the memory of rank {rank}", (rank,), wanted))
    return Arrangement(tuple(places), tuple(readers))


def _runs(ranks: Sequence[int]) -> str:
    """0–3, 6 for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ", ".join("–".join(map(str, run)) for run in runs)
