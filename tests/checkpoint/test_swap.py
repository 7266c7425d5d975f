"""Swaps over forked ranks with real shared memory, and what is left when something fails at each step."""

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tandem.engine import buckets
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.config import SwapConfig
from tandem.engine.types import BucketEntry, WeightShard, WeightTransferError
from tests.checkpoint.sinks import ForkedSink, MemorySink
from tests.checkpoint.test_names import DENSE, MOE, megatron_shards, random_hf_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

CHECKSUM = buckets.SharedBuckets.checksum
SMALL_BUCKETS = SwapConfig(bucket_bytes=4096, timeout_s=120)


class Source:
    """One rank of a model cut by hand; `version` makes its values."""

    def __init__(self, config: Mapping[str, Any], layout: tuple[int, int, int, int], rank: int) -> None:
        self.hf_config, self._layout, self._rank = config, layout, rank
        self.set_version(0)

    def set_version(self, version: int) -> None:
        state = random_hf_state(dict(self.hf_config), seed=version)
        ranks = megatron_shards(dict(self.hf_config), state, *self._layout)
        fresh = ranks[self._rank % len(ranks)]
        for shard, new in zip(self._shards, fresh, strict=True) if hasattr(self, "_shards") else ():
            shard.tensor.copy_(new.tensor)
        if not hasattr(self, "_shards"):
            self._shards = fresh

    def weight_shards(self) -> list[WeightShard]:
        return self._shards

    def weights_changed(self) -> None: ...


def assert_weights(weights: Mapping[str, torch.Tensor], config: dict[str, Any], version: int, dtype: torch.dtype = torch.float32) -> None:
    expected = random_hf_state(config, seed=version)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor.to(dtype)), name


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def serve_twice(
    config: dict[str, Any], layout: tuple[int, int, int, int], leaders: list[int], nodes: list[str], dtype: torch.dtype | None
) -> int:
    rank = dist.get_rank()
    source = Source(config, layout, rank)
    sink = MemorySink() if rank in leaders else None
    swap = WeightSwap(source, sink, SMALL_BUCKETS, control_group=group(), node=nodes[rank], dtype=dtype)
    for version in (0, 1, 2):
        source.set_version(version)
        with swap.serving(version):
            if sink is not None:
                assert sink.policy_version == version
                assert_weights(sink.weights, config, version, dtype or torch.float32)
    with swap.serving(2):
        pass
    if sink is not None:
        assert sink.num_prepared == 3, "a version that is served already is not moved again"
    stats = swap.last_stats
    swap.close()
    assert stats is not None
    return stats.num_bytes


CASES = {
    "one rank": (DENSE, (1, 1, 1, 1), [0], ["a"], None),
    "dp2, two engines": (DENSE, (1, 1, 1, 1), [0, 1], ["a", "a"], None),
    "tp2, one engine, bf16": (DENSE, (2, 1, 1, 1), [0], ["a", "a"], torch.bfloat16),
    "tp2, two nodes": (DENSE, (2, 1, 1, 1), [0, 1], ["a", "b"], None),
    "pp2 tied": (DENSE | {"tie_word_embeddings": True}, (1, 2, 1, 1), [1], ["a", "a"], None),
    "tp1 ep3 moe, the engine's node holds one rank": (MOE | {"num_experts": 3}, (1, 1, 3, 1), [0], ["a", "b", "b", "b"], None),
}


@pytest.mark.parametrize("case", CASES)
def test_every_engine_has_the_trainers_bytes_in_the_block(case: str):
    config, layout, leaders, nodes, dtype = CASES[case]
    received = run_ranks(serve_twice, len(nodes), config, layout, leaders, nodes, dtype)
    num_bytes = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in random_hf_state(config, 0).values())
    assert received == [num_bytes * len(leaders)] * len(nodes)


def corrupt(shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
    """Flip a bit of the first entry of a bucket with the tensor in question, after it was written."""
    for entry in entries:
        if entry.name == "model.layers.1.self_attn.o_proj.weight":
            with open(shared_memory_path, "r+b") as file:
                file.seek(entry.bucket_start)
                byte = file.read(1)[0]
                file.seek(entry.bucket_start)
                file.write(bytes([byte ^ 1]))


def stall(shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
    time.sleep(60)


def fail_second_swap(fault: str) -> tuple[str, int]:
    rank = dist.get_rank()
    """Version 0 is served; the swap to 1 fails on rank 1; returns the error, with version 0 checked on both engines."""
    source, sink = Source(DENSE, (2, 1, 1, 1), rank), MemorySink()
    config = SwapConfig(bucket_bytes=4096, timeout_s=5 if fault == "stalls" else 120)
    swap = WeightSwap(source, sink, config, control_group=group())
    with swap.serving(0):
        pass
    source.set_version(1)
    if rank == 1:
        if fault == "corrupt":
            sink.on_load = corrupt
        elif fault == "stalls":
            sink.on_load = stall
        elif fault == "prepare":
            sink.refuses = "no memory left"
        elif fault == "writer":
            calls: list[int] = []

            def checksum(self: buckets.SharedBuckets, slot: int, start: int, num_bytes: int) -> int:
                calls.append(start)
                if len(calls) == 5:
                    raise MemoryError("checksum went wrong")
                return CHECKSUM(self, slot, start, num_bytes)

            buckets.SharedBuckets.checksum = checksum
    with pytest.raises(WeightTransferError) as failure, swap.serving(1):
        raise AssertionError("the block must not be entered")
    assert sink.policy_version == 0
    assert_weights(sink.weights, DENSE, 0)
    if fault != "stalls":
        sink.on_load = None
        if fault == "writer" and rank == 1:
            buckets.SharedBuckets.checksum = CHECKSUM
        if fault == "prepare" and rank == 1:
            sink.refuses = ""
        with swap.serving(1):
            assert_weights(sink.weights, DENSE, 1)
    return str(failure.value), sink.policy_version


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("corrupt", r"rank 1, its engine: bucket \d+ of \d+, tensor model.layers.1.self_attn.o_proj.weight: .*checksum differs"),
        ("writer", r"rank 1, bucket \d+ of \d+, tensor model\.\S+: MemoryError: checksum went wrong"),
        ("prepare", r"rank 1, its engine: prepare: no memory left"),
        (
            "stalls",
            r"rank 1, its engine: TimeoutError: bucket 0 of \d+, tensors model\S+ to model\S+: the engine did not answer within 5 s",
        ),
    ],
)
def test_a_failure_on_one_rank_rolls_all_back_and_is_named(fault: str, message: str):
    results = run_ranks(fail_second_swap, 2, fault)
    errors = {error for error, _ in results}
    assert len(errors) == 1, "all ranks raise the same"
    assert re.search(message, errors.pop())


def kill_engine() -> str:
    rank = dist.get_rank()
    source, sink = Source(DENSE, (1, 1, 1, 1), rank), ForkedSink()
    swap = WeightSwap(source, sink, SMALL_BUCKETS, control_group=group())
    with swap.serving(0):
        assert_weights(sink.weights(), DENSE, 0)
    source.set_version(1)
    if rank == 1:
        sink.kill()
    with pytest.raises(WeightTransferError) as failure, swap.serving(1):
        pass
    if rank == 0:
        assert_weights(sink.weights(), DENSE, 0)
        assert sink.policy_version == 0
    sink.close()
    return str(failure.value)


def test_a_dead_engine_is_named_and_the_other_goes_on_with_the_old_version():
    for error in run_ranks(kill_engine, 2):
        assert "rank 1, its engine: prepare: " in error


def kill_rank(pids: Path) -> None:
    rank = dist.get_rank()
    """Rank 1 is killed by its own engine in the middle of a swap."""
    source = Source(DENSE, (1, 1, 1, 1), rank)

    def die(shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    sink = MemorySink()
    swap = WeightSwap(source, sink, SMALL_BUCKETS, control_group=group())
    with swap.serving(0):
        pass
    source.set_version(1)
    if rank == 1:
        sink.on_load = die
    with pytest.raises(WeightTransferError) as failure, swap.serving(1):
        pass
    assert_weights(sink.weights, DENSE, 0)
    pids.write_text(str(failure.value))


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "tandem" in name}


def test_a_killed_rank_is_named_and_leaves_no_shared_memory(tmp_path: Path):
    before = shared_memory()
    with pytest.raises(RuntimeError):
        run_ranks(kill_rank, 2, tmp_path / "error")
    assert "the process of rank 1 ended" in (tmp_path / "error").read_text()
    assert shared_memory() <= before


def disagree() -> None:
    rank = dist.get_rank()
    swap = WeightSwap(Source(DENSE, (1, 1, 1, 1), rank), MemorySink(), SMALL_BUCKETS, control_group=group())
    with pytest.raises(ValueError, match=f"policy versions 0 to 1; rank {rank} with {rank}"), swap.serving(rank):
        pass


def test_ranks_that_ask_for_different_versions_are_told():
    run_ranks(disagree, 2)


def bad_parameter() -> None:
    rank = dist.get_rank()
    source = Source(DENSE, (1, 1, 1, 1), rank)
    if rank == 1:
        source.weight_shards = lambda: [WeightShard(name="decoder.bogus", tensor=torch.zeros(1), tp_rank=0, tp_size=1)]
    swap = WeightSwap(source, MemorySink(), SMALL_BUCKETS, control_group=group())
    with pytest.raises(WeightTransferError, match=r"rank 1, planning: .*decoder.bogus"), swap.serving(0):
        pass


def test_a_parameter_without_a_name_fails_on_all_ranks():
    run_ranks(bad_parameter, 2)
