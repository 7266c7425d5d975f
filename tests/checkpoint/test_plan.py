"""The transfer plan on random layouts, checked byte by byte."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from tandem.engine.checkpoint.plan import ALIGNMENT, Plan, Region, make_plan
from tandem.engine.types import TensorMeta


def random_case(seed: int):
    """A random model on a random mesh: row cuts, column cuts, replicas and several nodes."""
    draw = random.Random(seed)
    tp, dp, num_nodes = draw.choice([1, 2, 4]), draw.choice([1, 2, 3]), draw.choice([1, 2])
    num_ranks = tp * dp
    nodes = [f"node{rank * num_nodes // num_ranks}" for rank in range(num_ranks)]
    tensors, holdings = [], [[] for _ in range(num_ranks)]
    for index in range(draw.randint(1, 8)):
        shape = (tp * draw.randint(1, 30),) if draw.random() < 0.3 else (tp * draw.randint(1, 30), tp * draw.randint(1, 20))
        meta = TensorMeta(name=f"t{index}", shape=shape, dtype=draw.choice([torch.float32, torch.bfloat16]))
        tensors.append(meta)
        cut = draw.choice([None, 0, len(shape) - 1])
        stage = draw.randrange(dp) if draw.random() < 0.2 else None  # held by one replica only, as with pp or ep
        for rank in range(num_ranks):
            if stage is None or rank // tp == stage:
                part = rank % tp
                region: Region = tuple(
                    (part * extent // tp, (part + 1) * extent // tp) if dim == cut else (0, extent) for dim, extent in enumerate(shape)
                )
                holdings[rank].append((meta.name, region))
    leaders = sorted(draw.sample(range(num_ranks), draw.randint(1, num_ranks)))
    return tensors, holdings, nodes, leaders, draw.choice([256, 1000, 4096, 1 << 20])


def bytes_of(plan: Plan, tensors: list[TensorMeta], bucket: int, entry: int, region: Region) -> np.ndarray:
    """Positions within the bucket of every byte of a region."""
    where = plan.buckets[bucket][entry]
    meta = next(meta for meta in tensors if meta.name == where.name)
    elements = np.arange(torch.Size(meta.shape).numel()).reshape(meta.shape)[tuple(slice(*bounds) for bounds in region)]
    starts = elements.reshape(-1) * meta.dtype.itemsize - where.tensor_start + where.bucket_start
    return (starts[:, None] + np.arange(meta.dtype.itemsize)).reshape(-1)


@pytest.mark.parametrize("block", range(10))
def test_every_byte_of_every_engine_node_is_written_exactly_once(block: int):
    for seed in range(block * 40, block * 40 + 40):
        tensors, holdings, nodes, leaders, bucket_bytes = random_case(seed)
        plan = make_plan(tensors, holdings, nodes, leaders, bucket_bytes)
        assert plan == make_plan(tensors, holdings, nodes, leaders, bucket_bytes)
        longest_row = max(meta.num_bytes // meta.shape[0] for meta in tensors)
        assert plan.bucket_bytes <= max(bucket_bytes, longest_row) + ALIGNMENT
        assert plan.num_bytes == sum(meta.num_bytes for meta in tensors)

        covered = {meta.name: np.zeros(meta.num_bytes, int) for meta in tensors}
        for bucket in plan.buckets:
            for entry in bucket:
                assert entry.bucket_start % ALIGNMENT == 0
                covered[entry.name][entry.tensor_start : entry.tensor_start + entry.num_bytes] += 1
        assert all((count == 1).all() for count in covered.values())

        held = [set(held) for held in holdings]
        for node in {nodes[rank] for rank in leaders}:
            written = [np.zeros(plan.bucket_bytes, int) for _ in plan.buckets]
            for piece in plan.pieces:
                if piece.node != node:
                    continue
                name = plan.buckets[piece.bucket][piece.entry].name
                assert nodes[piece.writer] == node
                inside = [
                    all(a <= c and d <= b for (a, b), (c, d) in zip(region, piece.region, strict=True))
                    for held_name, region in held[piece.source]
                    if held_name == name
                ]
                assert any(inside), "the source holds the piece"
                if piece.source != piece.writer:
                    assert nodes[piece.source] != node, "nothing is sent that a rank of the node holds"
                np.add.at(written[piece.bucket], bytes_of(plan, tensors, piece.bucket, piece.entry, piece.region), 1)
            for index, bucket in enumerate(plan.buckets):
                expected = np.zeros(plan.bucket_bytes, int)
                for entry in bucket:
                    expected[entry.bucket_start : entry.bucket_start + entry.num_bytes] += 1
                assert (written[index] == expected).all()
                writers = {(piece.entry, piece.writer) for piece in plan.pieces if (piece.node, piece.bucket) == (node, index)}
                assert all((entry, rank) in writers for entry, rank in enumerate(plan.checksum_ranks[node][index]))


def test_replicas_share_the_writing_of_every_bucket():
    tensors = [TensorMeta(name=f"t{i}", shape=(64 + i, 64), dtype=torch.float32) for i in range(40)]
    holdings = [[(meta.name, ((0, meta.shape[0]), (0, 64))) for meta in tensors] for _ in range(4)]
    plan = make_plan(tensors, holdings, ["a"] * 4, [0, 2], 1 << 17)
    assert len(plan.buckets) > 4
    for index, bucket in enumerate(plan.buckets):
        load = Counter({rank: 0 for rank in range(4)})
        for piece in plan.pieces:
            if piece.bucket == index:
                load[piece.writer] += bucket[piece.entry].num_bytes
        assert max(load.values()) - min(load.values()) <= max(entry.num_bytes for entry in bucket)


def test_a_tensor_larger_than_a_bucket_is_cut_by_rows():
    meta = TensorMeta(name="w", shape=(10, 256), dtype=torch.float32)  # rows of 1 KiB
    plan = make_plan([meta], [[("w", ((0, 10), (0, 256)))]], ["a"], [0], 4096)
    assert [(entry.start, entry.stop) for (entry,) in plan.buckets] == [(0, 4), (4, 8), (8, 10)]


WHOLE = ("w", ((0, 4), (0, 4)))


@pytest.mark.parametrize(
    ("holdings", "message"),
    [
        ([[("w", ((0, 3), (0, 4)))]], "w: the ranks hold 12 of 16 elements"),
        ([[WHOLE], [("w", ((0, 2), (0, 4)))]], "overlap without being equal"),
        ([[WHOLE, ("v", ((0, 1),))]], "rank 0 holds v, which is no tensor of the model"),
        ([[("w", ((0, 5), (0, 4)))]], "does not lie in shape"),
    ],
)
def test_holdings_that_do_not_make_the_model_are_named(holdings, message: str):
    with pytest.raises(ValueError, match=message):
        make_plan([TensorMeta(name="w", shape=(4, 4), dtype=torch.float32)], holdings, ["a"] * len(holdings), [0], 4096)
