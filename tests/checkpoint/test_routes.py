"""Every route of a swap, for real on a CPU: places by node and by rank, in host memory and with the device's kernels, parts of tensors.

What a GPU would add, its memory opened through CUDA IPC and NCCL between ranks, has not run.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tandem.engine import buckets
from tandem.engine.buckets import Region
from tandem.engine.checkpoint import device_writer, writer
from tandem.engine.checkpoint.planner import ROUTES
from tandem.engine.checkpoint.routes import Engine, arrange
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.checkpoint.transport import Transport
from tandem.engine.config import RolloutConfig, SwapConfig, SwapRoute
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import WeightTransferError
from tests.checkpoint.shard_sinks import ShardedSink
from tests.checkpoint.test_names import DENSE, MOE, random_hf_state
from tests.checkpoint.test_swap import Source, group
from tests.ranks import run_ranks

WAYS: list[tuple[SwapRoute, bool]] = [("host_memory", False), *((route, device) for route in ROUTES[1:] for device in (False, True))]
IDS = [f"{route}{', the device writes' * device}" for route, device in WAYS]
CASES = {
    "tp2 pp2, two engines of two": (DENSE, (2, 2, 1, 1), 2, ["a"] * 4),
    "tp2 pp2, two engines of two, two nodes": (DENSE, (2, 2, 1, 1), 2, ["a", "a", "b", "b"]),
    "ep3 moe, engines that want everything": (MOE | {"num_experts": 3}, (1, 1, 3, 1), 1, ["a", "a", "b", "b"]),
}


def config(route: SwapRoute, timeout_s: float = 120) -> SwapConfig:
    return SwapConfig(route=route, bucket_bytes=4096, device_bucket_bytes=8192, timeout_s=timeout_s)


def wanted_by(hf_config: dict[str, Any], process: int, tp: int) -> list[tuple[str, Region]] | None:
    """As an engine with tensor parallelism cuts: columns of what is summed afterwards, rows of other matrices, norms whole."""
    if tp == 1:
        return None
    found = []
    for name, tensor in random_hf_state(hf_config, 0).items():
        dim = None if tensor.dim() == 1 else 1 if "o_proj" in name or "down_proj" in name else 0
        region = tuple(
            (extent * process // tp, extent * (process + 1) // tp) if d == dim else (0, extent) for d, extent in enumerate(tensor.shape)
        )
        found.append((name, region))
    return found


def assert_parts(sink: ShardedSink, hf_config: dict[str, Any], version: int, tp: int) -> None:
    state = random_hf_state(hf_config, seed=version)
    assert sink.policy_version == version
    assert len(sink.parts) == tp
    for process, parts in enumerate(sink.parts):
        wanted = wanted_by(hf_config, process, tp) or [(name, tuple((0, n) for n in tensor.shape)) for name, tensor in state.items()]
        assert parts.keys() == set(wanted)
        for (name, region), tensor in parts.items():
            assert torch.equal(tensor, state[name][tuple(slice(*bounds) for bounds in region)]), (name, region)


def swap_on_every_route(case: str) -> list[tuple[int, int]]:
    """Two versions on each route. Returns bytes received by all engines and bytes between ranks."""
    hf_config, layout, tp, nodes = CASES[case]
    rank = dist.get_rank()
    source = Source(hf_config, layout, rank)
    stats = []
    for route, on_device in WAYS:
        wanted = [wanted_by(hf_config, process, tp) for process in range(tp)]
        sink = ShardedSink(wanted, opens_device_memory=on_device) if rank % tp == 0 else None
        swap = WeightSwap(source, sink, config(route), control_group=group(), node=nodes[rank])
        for version in (0, 1):
            source.set_version(version)
            with swap.serving(version):
                if sink is not None:
                    assert_parts(sink, hf_config, version, tp)
        assert swap.last_stats is not None
        assert swap.last_stats.route == route
        stats.append((swap.last_stats.num_bytes, swap.last_stats.moved_bytes))
        if sink is not None and route != "host_memory":
            read = sum(tensor.nbytes for parts in sink.parts for tensor in parts.values())
            assert sink.num_bytes == read, "only what a process wants lies in its buckets"
        swap.close()
    return stats


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_every_route_brings_every_process_the_bytes_it_wants(case: str) -> None:
    hf_config, _, tp, nodes = CASES[case]
    state = random_hf_state(hf_config, 0)
    per_engine = sum(
        torch.empty([stop - start for start, stop in region]).nbytes
        for process in range(tp)
        for _, region in wanted_by(hf_config, process, tp) or [(name, tuple((0, n) for n in t.shape)) for name, t in state.items()]
    )
    results = run_ranks(swap_on_every_route, len(nodes), case)
    for stats in results:
        assert [num_bytes for num_bytes, _ in stats] == [per_engine * (len(nodes) // tp)] * len(WAYS)
        assert len({moved for _, moved in stats[1:]}) == 1, "what ranks lack is the same on all routes by rank"
        assert stats[0][1] <= stats[1][1], "a node lacks no more than its ranks"
    assert results[0][1][1] > 0


def swap_embedded(routes: list[SwapRoute]) -> list[str | None]:
    rank = dist.get_rank()
    small = DENSE | {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
    source = Source(small, (2, 1, 1, 1), rank)
    engine = EmbeddedEngine(small, RolloutConfig(), dtype="float32", context_length=16, stop_token_ids=(), num_threads=1)
    engine.rollback()  # its start is not what the deadline is for
    digests = []
    for version, route in enumerate(routes):
        swap = WeightSwap(source, engine, config(route), control_group=group())
        with swap.serving(version):
            digests.append(engine.weights_digest)
        swap.close()
    engine.close()
    return digests


@pytest.mark.distributed
def test_the_embedded_engine_has_the_same_weights_on_every_route() -> None:
    results = run_ranks(swap_embedded, 2, [*ROUTES, "host_memory"])
    assert len({digest for digests in results for digest in digests}) == 1
    assert results[0][0] is not None


class Fault(Exception):
    pass


def inject(step: str, sink: ShardedSink) -> None:
    """Make one step of this rank's next swap fail. What is changed here is changed for the process, which ends with the test."""

    def at(sought: str, *, flip: bool = False):
        calls = []

        def fault(step: str, slot: torch.Tensor | None) -> None:
            calls.extend([step] * (step == sought))
            if step == sought and len(calls) == (3 if step == "load" else 1):
                if not flip:
                    raise Fault(step)
                assert slot is not None
                slot[0] ^= 1

        sink.fault = fault

    if step in ("receive", "load", "commit"):
        at(step)
    elif step == "bytes":
        at("load", flip=True)
    elif step == "write":
        fail_once(writer.EntryWork, "write")
        fail_once(device_writer.DeviceWork, "launch")
    elif step == "checksum":
        fail_once(buckets.SharedBuckets, "checksum")
        fail_once(device_writer.Launched, "finish")
    elif step == "send":
        fail_once(writer.torch.Tensor, "copy_")
        fail_once(device_writer.Packer, "pack")
    elif step == "link":
        fail_once(Transport, "_operation", RuntimeError("the connection is lost"))


def fail_once(owner: Any, name: str, error: Exception | None = None) -> None:
    plain = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        restore()
        raise error or Fault(name)

    def restore() -> None:
        setattr(owner, name, plain)

    RESTORE.append(restore)
    setattr(owner, name, failing)


RESTORE: list[Any] = []
STEPS = ["receive", "send", "write", "checksum", "load", "bytes", "commit"]


def fail_at_every_step(route: SwapRoute, on_device: bool, steps: list[str], timeout_s: float) -> dict[str, str]:
    """A swap that fails at each step on rank 1 leaves both engines on the old version, and the next one succeeds."""
    rank, tp = dist.get_rank(), 1
    source, sink = Source(DENSE, (2, 1, 1, 1), rank), ShardedSink([None], opens_device_memory=on_device)
    swap = WeightSwap(source, sink, config(route, timeout_s), control_group=group())
    with swap.serving(0):
        pass
    errors = {}
    for version, step in enumerate(steps):
        source.set_version(version + 1)
        if rank == 1:
            inject(step, sink)
        with pytest.raises(WeightTransferError) as failure, swap.serving(version + 1):
            raise AssertionError("the block must not be entered")
        errors[step] = str(failure.value)
        assert sink.policy_version == version
        assert_parts(sink, DENSE, version, tp)
        sink.fault = lambda step, slot: None
        while RESTORE:
            RESTORE.pop()()
        with swap.serving(version + 1):
            assert_parts(sink, DENSE, version + 1, tp)
    return errors


@pytest.mark.distributed
@pytest.mark.parametrize(("route", "on_device"), WAYS, ids=IDS)
def test_a_fault_at_any_step_leaves_all_on_the_old_version(route: SwapRoute, on_device: bool) -> None:
    steps = [step for step in STEPS if route != "host_memory" or step != "send"]
    ours, theirs = run_ranks(fail_at_every_step, 2, route, on_device, steps, 120.0)
    assert ours == theirs, "all ranks raise the same"
    for step in steps:
        assert "rank 1, " in ours[step], step
    assert "checksum differs" in ours["bytes"]
    assert "tensor " in ours["bytes"]
    assert "bucket 0 of" in ours["write"]
    assert "rank 1, commit: Fault: commit" in ours["commit"]


@pytest.mark.distributed
@pytest.mark.parametrize("route", ROUTES[1:])
def test_a_lost_connection_is_replaced(route: SwapRoute) -> None:
    """Rank 1 gives its messages up; rank 0 waits for one until its deadline. The next swap has connections of its own."""
    step = "link"
    for errors in run_ranks(fail_at_every_step, 2, route, False, [step], 2.0):
        assert "rank 1, bucket 0 of" in errors[step]
        assert "the connection is lost" in errors[step]


def test_routes_that_are_impossible_say_why() -> None:
    both = (None, None)
    assert [place.ranks for place in arrange("host_memory", ["a", "a", "b"], [Engine(1, both)]).places] == [(0, 1)]
    with pytest.raises(ValueError, match="process 1 of the engine of rank 1 belongs to rank 2, which is not on its node"):
        arrange("shard_to_shard", ["a", "a", "b"], [Engine(1, both)])
    with pytest.raises(ValueError, match="process 0 of the engine of rank 1 and one of rank 0's engine both belong to rank 1"):
        arrange("gather_and_broadcast", ["a", "a"], [Engine(0, both), Engine(1)])


def impossible() -> str:
    rank = dist.get_rank()
    sink = ShardedSink([None, None]) if rank == 1 else None
    swap = WeightSwap(Source(DENSE, (1, 1, 1, 1), rank), sink, config("shard_to_shard"), control_group=group())
    with pytest.raises(ValueError) as failure, swap.serving(0):
        pass
    return str(failure.value)


@pytest.mark.distributed
def test_a_configured_route_that_is_impossible_is_refused_on_all_ranks() -> None:
    for message in run_ranks(impossible, 2):
        assert message.startswith("swap.route is shard_to_shard, but process 1 of the engine of rank 1 belongs to rank 2")
        assert message.endswith("choose host_memory or auto")
