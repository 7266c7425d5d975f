"""The transfer plan on random layouts, checked element by element against what the ranks hold and the places want."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from tandem.engine.buckets import Region
from tandem.engine.checkpoint.plan import ALIGNMENT, Place, PlacePlan, Plan, make_plan
from tandem.engine.checkpoint.routes import Engine, arrange
from tandem.engine.types import TensorMeta


def cut(shape: tuple[int, ...], dim: int | None, part: int, parts: int) -> Region:
    return tuple((part * extent // parts, (part + 1) * extent // parts) if d == dim else (0, extent) for d, extent in enumerate(shape))


def random_case(seed: int):
    """A random model on a random mesh (tp, pp, ep, dp) and engines of random tp: cuts by row and column, experts, replicas, nodes."""
    draw = random.Random(seed)
    tp, pp, ep, dp = draw.choice([1, 2, 4]), draw.choice([1, 2]), draw.choice([1, 2]), draw.choice([1, 2])
    num_ranks = tp * pp * ep * dp
    num_nodes = draw.choice([n for n in (1, 2, 4) if num_ranks % n == 0])
    nodes = [f"node{rank * num_nodes // num_ranks}" for rank in range(num_ranks)]
    per_node = num_ranks // num_nodes
    engine_tp = draw.choice([n for n in (1, 2, 4) if per_node % n == 0])
    tensors, holdings, engine_cuts = [], [[] for _ in range(num_ranks)], []
    for index in range(draw.randint(1, 6)):
        sides = draw.choice([(8,), (8, 4), (8, 12), (4, 8, 4)])
        shape = tuple(side * draw.randint(1, 6) for side in sides)
        meta = TensorMeta(name=f"t{index}", shape=shape, dtype=draw.choice([torch.float32, torch.bfloat16]))
        tensors.append(meta)
        dims = [None, 0, len(shape) - 1]
        trainer_cut, stage, expert = draw.choice(dims), draw.randrange(pp), draw.choice([None, None, draw.randrange(ep)])
        engine_cuts.append(draw.choice(dims))
        for rank in range(num_ranks):
            t, e, p = rank % tp, rank // tp % ep, rank // (tp * ep) % pp
            if p == stage and expert in (None, e):
                holdings[rank].append((meta.name, cut(shape, trainer_cut, t, tp)))
    leaders = [rank for rank in range(0, num_ranks, engine_tp) if draw.random() < 0.8] or [0]

    def wanted(process: int):
        return tuple((meta.name, cut(meta.shape, dim, process, engine_tp)) for meta, dim in zip(tensors, engine_cuts, strict=True))

    everything = draw.random() < 0.3
    engines = [Engine(leader, (None,) * engine_tp if everything else tuple(map(wanted, range(engine_tp)))) for leader in leaders]
    return tensors, holdings, nodes, engines, draw.choice([256, 1000, 4096, 1 << 20])


def elements(tensors: list[TensorMeta], name: str, region: Region) -> tuple[np.ndarray, int]:
    """Flat positions of a region in its tensor, and the bytes of one."""
    meta = next(meta for meta in tensors if meta.name == name)
    positions = np.arange(torch.Size(meta.shape).numel()).reshape(meta.shape)
    return positions[tuple(slice(*bounds) for bounds in region)], meta.dtype.itemsize


def check_place(plan: PlacePlan, tensors: list[TensorMeta], holdings, nodes: list[str], *, near_first: bool) -> int:
    """By brute force: what is written where. Returns the bytes that come from other ranks."""
    wants = {meta.name: np.zeros(torch.Size(meta.shape).numel(), int) for meta in tensors}
    for name, region in plan.place.wanted or [(meta.name, tuple((0, extent) for extent in meta.shape)) for meta in tensors]:
        wants[name][elements(tensors, name, region)[0]] = 1
    brought = {name: np.zeros_like(count) for name, count in wants.items()}
    written = [[np.zeros(entry.num_bytes, int) for entry in bucket] for bucket in plan.buckets]
    held = {rank: {meta.name: np.zeros_like(wants[meta.name]) for meta in tensors} for rank in range(len(holdings))}
    for rank, of_rank in enumerate(holdings):
        for name, region in of_rank:
            held[rank][name][elements(tensors, name, region)[0]] = 1
    moved = 0
    for index, bucket in enumerate(plan.buckets):
        ends = 0
        for entry in bucket:
            assert entry.bucket_start % ALIGNMENT == 0
            assert entry.bucket_start >= ends
            ends = entry.bucket_start + entry.num_bytes
            positions, itemsize = elements(tensors, entry.name, entry.region)
            assert positions.size * itemsize == entry.num_bytes
            assert positions.flat[0] * itemsize == entry.tensor_start
            brought[entry.name][positions] += 1
        assert len(plan.checksum_ranks[index]) == len(bucket)
    for piece in plan.pieces:
        entry = plan.buckets[piece.bucket][piece.entry]
        positions, itemsize = elements(tensors, entry.name, piece.region)
        inside = np.searchsorted(elements(tensors, entry.name, entry.region)[0].reshape(-1), positions.reshape(-1))
        np.add.at(written[piece.bucket][piece.entry], (inside[:, None] * itemsize + np.arange(itemsize)).reshape(-1), 1)
        assert held[piece.source][entry.name][positions].all(), "the source holds the piece"
        assert piece.writer in plan.place.ranks
        if piece.source != piece.writer:
            moved += positions.size * itemsize
            assert not any(held[rank][entry.name][positions].any() for rank in plan.place.ranks), (
                "what a rank of the place holds stays there"
            )
            if near_first and nodes[piece.source] != nodes[piece.writer]:
                near = [rank for rank in held if nodes[rank] == nodes[piece.writer]]
                assert not any(held[rank][entry.name][positions].any() for rank in near)
    assert all((count == wants[name]).all() for name, count in brought.items()), "exactly what is wanted, once"
    assert all((count == 1).all() for bucket in written for count in bucket), "every byte of every entry is written once"
    writers = {(piece.bucket, piece.entry, piece.writer) for piece in plan.pieces}
    for index, ranks in enumerate(plan.checksum_ranks):
        assert all((index, entry, rank) in writers for entry, rank in enumerate(ranks))
    lacking = 0
    for meta in tensors:
        here = sum(held[rank][meta.name] for rank in plan.place.ranks) > 0
        lacking += int((wants[meta.name].astype(bool) & ~here).sum()) * meta.dtype.itemsize
    assert moved == lacking, "no more moves than no rank of the place holds"
    return moved


def check_transfers(plan: Plan, tensors: list[TensorMeta], moved: int) -> None:
    """The transfers are what the pieces wait for, and nothing else."""
    itemsize = {meta.name: meta.dtype.itemsize for meta in tensors}
    sizes = [elements(tensors, each.name, each.region)[0].size * itemsize[each.name] * len(each.writers) for each in plan.transfers]
    assert sum(sizes) == moved
    sent = Counter((each.bucket, each.name, each.region, each.source, writer) for each in plan.transfers for writer in each.writers)
    needed = Counter(
        (piece.bucket, place.buckets[piece.bucket][piece.entry].name, piece.region, piece.source, piece.writer)
        for place in plan.places
        for piece in place.pieces
        if piece.source != piece.writer
    )
    assert sent == needed
    assert [each.bucket for each in plan.transfers] == sorted(each.bucket for each in plan.transfers)


@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("route", ["host_memory", "shard_to_shard", "gather_and_broadcast"])
def test_every_place_gets_exactly_what_it_wants_and_only_that_moves(route, block: int) -> None:
    for seed in range(block * 20, block * 20 + 20):
        tensors, holdings, nodes, engines, bucket_bytes = random_case(seed)
        places = arrange(route, nodes, engines).places
        broadcasts = route == "gather_and_broadcast"
        plan = make_plan(tensors, holdings, nodes, places, bucket_bytes, broadcasts=broadcasts)
        assert plan == make_plan(tensors, holdings, nodes, places, bucket_bytes, broadcasts=broadcasts)
        longest_row = max(meta.num_bytes // meta.shape[0] for meta in tensors)
        assert plan.bucket_bytes <= max(bucket_bytes, longest_row) + ALIGNMENT
        moved = sum(check_place(place, tensors, holdings, nodes, near_first=not broadcasts) for place in plan.places)
        check_transfers(plan, tensors, moved)
        if broadcasts:
            told = [(each.bucket, each.name, each.region, each.source, frozenset(each.writers)) for each in plan.transfers]
            assert len(told) == len(set(told))
        else:
            assert all(len(each.writers) == 1 for each in plan.transfers)


def test_readers_of_one_place_with_other_cuts_get_the_union_once() -> None:
    """An engine of two processes, cut by rows, and one of three, cut by columns."""
    meta = TensorMeta(name="w", shape=(6, 6), dtype=torch.float32)
    whole = [("w", ((0, 6), (0, 6)))]
    wanted = (("w", ((0, 3), (0, 6))), ("w", ((0, 6), (2, 4))))
    plan = make_plan([meta], [whole], ["a"], [Place("here", (0,), wanted)], 4096)
    assert check_place(plan.places[0], [meta], [whole], ["a"], near_first=True) == 0
    assert plan.places[0].num_bytes == 4 * (18 + 6)


def test_replicas_share_the_writing_of_every_bucket() -> None:
    tensors = [TensorMeta(name=f"t{i}", shape=(64 + i, 64), dtype=torch.float32) for i in range(40)]
    holdings = [[(meta.name, ((0, meta.shape[0]), (0, 64))) for meta in tensors] for _ in range(4)]
    (place,) = make_plan(tensors, holdings, ["a"] * 4, [Place("a", (0, 1, 2, 3))], 1 << 17).places
    assert len(place.buckets) > 4
    for index, bucket in enumerate(place.buckets):
        load = Counter({rank: 0 for rank in range(4)})
        for piece in place.pieces:
            if piece.bucket == index:
                load[piece.writer] += bucket[piece.entry].num_bytes
        assert max(load.values()) - min(load.values()) <= max(entry.num_bytes for entry in bucket)


def test_replicas_share_the_sending() -> None:
    tensors = [TensorMeta(name=f"t{i}", shape=(64, 64), dtype=torch.float32) for i in range(12)]
    holdings = [[] if rank < 3 else [(meta.name, ((0, 64), (0, 64))) for meta in tensors] for rank in range(6)]
    plan = make_plan(tensors, holdings, ["a"] * 6, [Place(str(rank), (rank,)) for rank in range(3)], 1 << 17)
    assert set(Counter(each.source for each in plan.transfers).values()) == {12}


def test_a_broadcast_goes_to_all_that_lack_it() -> None:
    meta = TensorMeta(name="w", shape=(8, 8), dtype=torch.float32)
    holdings = [[("w", ((0, 4), (0, 8)))], [("w", ((4, 8), (0, 8)))], [], []]
    holdings[2], holdings[3] = holdings[0], holdings[1]
    places = [Place(str(rank), (rank,)) for rank in range(4)]
    plan = make_plan([meta], holdings, ["a", "a", "b", "b"], places, 4096, broadcasts=True)
    assert {(each.region[0], each.source, each.writers) for each in plan.transfers} == {((4, 8), 1, (0, 2)), ((0, 4), 0, (1, 3))}


def test_a_tensor_larger_than_a_bucket_is_cut_by_rows() -> None:
    meta = TensorMeta(name="w", shape=(10, 256), dtype=torch.float32)  # rows of 1 KiB
    plan = make_plan([meta], [[("w", ((0, 10), (0, 256)))]], ["a"], [Place("a", (0,))], 4096)
    assert [entry.region[0] for (entry,) in plan.places[0].buckets] == [(0, 4), (4, 8), (8, 10)]


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
def test_holdings_that_do_not_make_the_model_are_named(holdings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan([TensorMeta(name="w", shape=(4, 4), dtype=torch.float32)], holdings, ["a"] * len(holdings), [Place("a", (0,))], 4096)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((("v", ((0, 1),)),), "the place wants v, which is no tensor of the model"),
        ((("w", ((0, 5), (0, 4))),), "w: region .* does not lie in shape"),
    ],
)
def test_wishes_that_no_tensor_meets_are_named(wanted, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan([TensorMeta(name="w", shape=(4, 4), dtype=torch.float32)], [[WHOLE]], ["a"], [Place("the place", (0,), wanted)], 4096)
