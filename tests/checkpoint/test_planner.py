"""The choice among the routes: on topologies that are made up, and for real on this machine."""

import pytest
import torch
import torch.distributed as dist

from tandem.engine.checkpoint.planner import ROUTES, Bandwidths, Estimate, Topology, choose, estimate, table
from tandem.engine.checkpoint.routes import Engine
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.config import SwapConfig
from tandem.engine.log import LogConfig, RunLog
from tandem.engine.types import TensorMeta
from tests.checkpoint.shard_sinks import ShardedSink
from tests.checkpoint.test_names import DENSE
from tests.checkpoint.test_swap import Source, group
from tests.ranks import run_ranks

GB = 1e9
H200 = Bandwidths(host_copy=10 * GB, device_copy=2000 * GB, host_device=50 * GB, in_node=300 * GB, between_nodes=40 * GB, latency_s=50e-6)
LAPTOP = Bandwidths(host_copy=5 * GB, in_node=1 * GB, latency_s=1e-4)
MATRIX = TensorMeta(name="w", shape=(8192, 8192), dtype=torch.bfloat16)
NUM_MATRICES = 64  # 8.6 GB together
TENSORS = [TensorMeta(name=f"w{i}", shape=MATRIX.shape, dtype=MATRIX.dtype) for i in range(NUM_MATRICES)]
MODEL_BYTES = sum(meta.num_bytes for meta in TENSORS)


def rows(part: int, parts: int):
    return tuple((meta.name, ((8192 * part // parts, 8192 * (part + 1) // parts), (0, 8192))) for meta in TENSORS)


def topology(nodes: list[str], *, trainer_tp: int, engine_tp: int, device: bool = True, pp: int = 1) -> Topology:
    """Trainer ranks in the order tp, pp, dp; engines of consecutive ranks, each of whose processes wants its rows."""
    holdings = []
    for rank in range(len(nodes)):
        stage = rank // trainer_tp % pp
        held = rows(rank % trainer_tp, trainer_tp)
        holdings.append([pair for i, pair in enumerate(held) if i * pp // NUM_MATRICES == stage])
    wanted = tuple(rows(process, engine_tp) for process in range(engine_tp)) if engine_tp > 1 else (None,)
    engines = [Engine(leader, wanted) for leader in range(0, len(nodes), engine_tp)]
    return Topology(tensors=TENSORS, holdings=holdings, nodes=nodes, engines=engines, has_device_buckets=device)


def node_names(num_nodes: int, per_node: int) -> list[str]:
    return [f"n{node}" for node in range(num_nodes) for _ in range(per_node)]


@pytest.mark.parametrize(
    ("name", "case", "bandwidths", "expected", "moved"),
    [
        # every GPU has already what its engine's process wants: nothing moves, and copies on the device are fastest
        ("same cuts", topology(node_names(1, 8), trainer_tp=8, engine_tp=8), H200, "shard_to_shard", 0),
        ("one GPU", topology(["n"], trainer_tp=1, engine_tp=1), H200, "shard_to_shard", 0),
        ("64 nodes of same cuts", topology(node_names(8, 8), trainer_tp=8, engine_tp=8), H200, "shard_to_shard", 0),
        # tp 8 to tp 1: each GPU lacks seven eighths; point to point a rank sends its shard seven times, all at once
        ("tp8 to tp1", topology(node_names(1, 8), trainer_tp=8, engine_tp=1), H200, "shard_to_shard", 7 * MODEL_BYTES),
        # one stage per node: half of what every GPU wants is on another node, whose link is slow: once is enough
        (
            "stages far apart",
            topology(node_names(4, 2), trainer_tp=1, engine_tp=1, pp=8),
            Bandwidths(host_copy=1 * GB, device_copy=2000 * GB, host_device=2 * GB, in_node=300 * GB, between_nodes=0.2 * GB),
            "host_memory",
            None,
        ),
        # a GPU that cannot share its memory: the host has to
        ("no device buckets", topology(node_names(1, 8), trainer_tp=8, engine_tp=8, device=False), H200, "host_memory", None),
        # a link that is next to nothing: the memory that a node shares saves it
        (
            "no link to speak of",
            topology(node_names(1, 8), trainer_tp=8, engine_tp=1),
            Bandwidths(host_copy=10 * GB, device_copy=2000 * GB, host_device=50 * GB, in_node=0.1 * GB),
            "host_memory",
            None,
        ),
        ("laptop, one rank", topology(["n"], trainer_tp=1, engine_tp=1, device=False), LAPTOP, "host_memory", 0),
        ("laptop, replicas", topology(["n"] * 4, trainer_tp=1, engine_tp=1, device=False), LAPTOP, "host_memory", 0),
        ("laptop, shards", topology(["n"] * 4, trainer_tp=4, engine_tp=1, device=False), LAPTOP, "host_memory", 0),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_the_fastest_route_is_chosen(name: str, case: Topology, bandwidths: Bandwidths, expected: str, moved: int | None) -> None:
    chosen = choose(estimate(case, bandwidths))
    assert chosen.route == expected, table(estimate(case, bandwidths), chosen.route)
    if moved is not None:
        assert chosen.moved_bytes == moved


def test_one_owner_of_everything_broadcasts() -> None:
    """Seven engines without a byte, and one rank that has all: sent once instead of seven times."""
    holdings = [rows(0, 1), *[()] * 7]
    case = Topology(
        tensors=TENSORS, holdings=holdings, nodes=node_names(8, 1), engines=[Engine(rank) for rank in range(8)], has_device_buckets=True
    )
    found = {each.route: each for each in estimate(case, H200)}
    assert choose(list(found.values())).route == "gather_and_broadcast"
    ratio = (found["shard_to_shard"].seconds or 0) / (found["gather_and_broadcast"].seconds or 1)
    assert ratio == pytest.approx(7, rel=0.1)
    assert found["gather_and_broadcast"].moved_bytes == found["shard_to_shard"].moved_bytes == 7 * MODEL_BYTES


def test_seconds_worked_out_by_hand() -> None:
    """Two ranks of one node, a half each; one engine that wants all: 1 GB/s everywhere, on a CPU, where stages add."""
    meta = TensorMeta(name="w", shape=(2, 500_000_000 // 4), dtype=torch.float32)
    case = Topology(
        tensors=[meta],
        holdings=[[("w", ((0, 1), (0, 125_000_000)))], [("w", ((1, 2), (0, 125_000_000)))]],
        nodes=["n", "n"],
        engines=[Engine(0)],
        bucket_bytes=1 << 40,
    )
    host, shard, broadcast = estimate(case, Bandwidths(host_copy=GB, in_node=GB))
    assert host.seconds == pytest.approx(0.5 + 1.0)  # both write a half, the engine loads all
    assert shard.seconds == pytest.approx(0.5 + 1.0 + 1.0)  # a half comes over, one rank writes all
    assert (host.moved_bytes, shard.moved_bytes, broadcast.moved_bytes) == (0, 500_000_000, 500_000_000)
    assert (host.written_bytes, shard.written_bytes) == (1_000_000_000, 1_000_000_000)


def test_an_impossible_route_is_shown_with_its_reason() -> None:
    case = Topology(tensors=[MATRIX], holdings=[[("w", ((0, 8192), (0, 8192)))]], nodes=["n"], engines=[Engine(0, (None, None))])
    found = estimate(case, LAPTOP)
    assert [each.seconds is None for each in found] == [False, True, True]
    shown = table(found, choose(found).route).splitlines()
    assert shown[0] == "weight swap: host_memory"
    assert shown[1].startswith("→ host_memory")
    assert "impossible: process 1 of the engine of rank 0 belongs to rank 1, which is not on its node" in shown[2]


def test_equal_ones_go_to_the_first() -> None:
    equal = [Estimate(route=route, seconds=1.0) for route in ROUTES]
    assert choose(equal).route == "host_memory"


def swap_as_measured(folder) -> tuple[str, list[str]]:
    rank = dist.get_rank()
    said: list[str] = []
    log = RunLog(folder / str(rank), rank=rank, num_ranks=2, config=LogConfig(), num_steps=1)
    pytest.MonkeyPatch().setattr(log, "say", said.append)  # this process ends with the test
    sink = ShardedSink([None])
    swap = WeightSwap(Source(DENSE, (2, 1, 1, 1), rank), sink, SwapConfig(bucket_bytes=4096), control_group=group(), log=log)
    with swap.serving(0):
        pass
    assert swap.last_stats is not None
    route = swap.last_stats.route
    swap.close()
    log.close()
    return route, said


@pytest.mark.distributed
def test_the_choice_by_what_was_measured_here_is_printed_and_used(tmp_path) -> None:
    """Ranks of one node on a CPU: their memory is the node's, and messages between them would only cost."""
    (route, said), other = run_ranks(swap_as_measured, 2, tmp_path)
    assert other[0] == route, "all ranks choose the same"
    lines = said[0].splitlines()
    assert lines[0] == f"weight swap: {route}"
    assert len(lines) == 1 + len(ROUTES)
    assert all(" ms " in line and "MB written" in line for line in lines[1:])
    assert next(line for line in lines[1:] if line.startswith("→")).split()[1] == route
