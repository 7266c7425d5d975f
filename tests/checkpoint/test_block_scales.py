"""Weights that are quantised on their way to the engines have the bytes of whole matrices quantised in one place, on any layout."""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tandem.engine.architecture import Architecture
from tandem.engine.buckets import Region
from tandem.engine.checkpoint.block_scales import BlockScales, cells_of, with_scales
from tandem.engine.checkpoint.names import HFView, NameMap
from tandem.engine.checkpoint.plan import Place, distinct_regions, make_plan
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.config import RolloutConfig, SwapConfig
from tandem.engine.quantised import FP8, is_quantised, problem_of_engine, quantised, scale_name
from tandem.engine.types import TensorMeta, WeightTransferError
from tandem.kernels.block_fp8 import BLOCK, dequantise, encode, quantise
from tests.checkpoint.shard_sinks import ShardedSink
from tests.checkpoint.sinks import MemorySink
from tests.checkpoint.test_names import CONFIGS, DENSE, MOE, megatron_shards, random_hf_state
from tests.checkpoint.test_routes import WAYS, wanted_by
from tests.checkpoint.test_swap import Source, group
from tests.ranks import run_ranks

# No side is a multiple of 128 but that of the queries; cut in two, hardly any cut lies between two blocks.
WIDE = DENSE | {"hidden_size": 136, "head_dim": 34, "intermediate_size": 280, "num_hidden_layers": 1}
WIDE_MOE = MOE | WIDE | {"model_type": "qwen3_moe", "moe_intermediate_size": 140, "mlp_only_layers": []}


def box(region: Region) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in region)


def quantised_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint of the state holds."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        found[name] = tensor
        if is_quantised(name):
            found[name], found[scale_name(name)] = quantise(tensor)
    return found


def random_grid(draw: random.Random, shape: tuple[int, int]) -> list[Region]:
    """A matrix in parts: bands of random heights, each cut into columns of its own, or all alike."""

    def cuts(extent: int) -> list[tuple[int, int]]:
        inner = draw.sample(range(1, extent), min(extent - 1, draw.choice([0, 0, 1, 2, 3])))
        if draw.random() < 0.3:
            inner = [bound for bound in (round(bound / BLOCK) * BLOCK for bound in inner) if 0 < bound < extent]
        return list(itertools.pairwise(sorted({0, *inner, extent})))

    columns = cuts(shape[1])
    alike = draw.random() < 0.5
    return [(rows, of_columns) for rows in cuts(shape[0]) for of_columns in (columns if alike else cuts(shape[1]))]


def random_case(seed: int) -> tuple[list[TensorMeta], list[list[tuple[str, Region]]]]:
    """Matrices and a vector whose parts are dealt to ranks, some to several."""
    draw = random.Random(seed)
    num_ranks = draw.randint(1, 6)
    tensors, holdings = [], [[] for _ in range(num_ranks)]
    for index in range(draw.randint(1, 3)):
        shape = draw.choice([1, 100, 128, 200, 256, 300, 640]), draw.choice([1, 64, 128, 130, 384, 500])
        name = f"model.layers.{index}.mlp.up_proj.weight"
        tensors.append(TensorMeta(name=name, shape=shape, dtype=torch.bfloat16))
        for region in random_grid(draw, shape):
            for rank in draw.sample(range(num_ranks), draw.randint(1, min(2, num_ranks))):
                holdings[rank].append((name, region))
    tensors.append(TensorMeta(name="model.norm.weight", shape=(8,), dtype=torch.bfloat16))
    holdings[0].append(("model.norm.weight", ((0, 8),)))
    return quantised(tensors), holdings


@pytest.mark.parametrize("block", range(4))
def test_every_scale_is_known_to_just_the_ranks_with_a_part_of_its_block(block: int) -> None:
    """400 layouts, block by block."""
    for seed in range(block * 100, block * 100 + 100):
        tensors, holdings = random_case(seed)
        cells = cells_of(tensors, holdings)
        known = with_scales(holdings, cells)
        shapes = {meta.name: meta.shape for meta in tensors}
        for name in cells:
            rows, columns = shapes[scale_name(name)]
            for row, column in itertools.product(range(rows), range(columns)):
                of_block = ((row * BLOCK, (row + 1) * BLOCK), (column * BLOCK, (column + 1) * BLOCK))
                parts = {region for of_rank in holdings for held, region in of_rank if held == name and overlaps(region, of_block)}
                around = [cell for cell in cells[name] if overlaps(cell, ((row, row + 1), (column, column + 1)))]
                assert len(around) == 1
                assert cells[name][around[0]] == (len(parts) > 1)
                for of_rank, knows in zip(holdings, known, strict=True):
                    has_part = any(held == name and region in parts for held, region in of_rank)
                    assert knows.count((scale_name(name), around[0])) == int(has_part)
        # The plan takes matrices and scales as it takes any other tensors.
        distinct_regions(tensors, known)
        nodes = ["a"] * len(holdings)
        plan = make_plan(tensors, known, nodes, [Place("all", tuple(range(len(holdings))))], 4096)
        assert sum(place.num_bytes for place in plan.places) == sum(meta.num_bytes for meta in tensors)


def overlaps(first: Region, second: Region) -> bool:
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(first, second, strict=True))


class Together:
    """Ranks that refresh one after the other, twice: what they tell the first time is known the second time."""

    def __init__(self) -> None:
        self.told: list[torch.Tensor] = []
        self.all_told = False

    def largest(self, step: str, numbers: torch.Tensor) -> None:
        if self.all_told:
            numbers.copy_(torch.stack(self.told).amax(0))
        else:
            self.told.append(numbers.clone())


def scales_of_ranks(tensors: Sequence[TensorMeta], views: Sequence[Sequence[HFView]]) -> list[BlockScales]:
    together = Together()
    cells = cells_of(tensors, [[(view.name, view.region) for view in of_rank] for of_rank in views])
    ranks: list[Any] = [BlockScales(together, cells, of_rank) for of_rank in views]  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        for rank in ranks:
            rank.refresh()
        together.all_told = True
    return ranks


@pytest.mark.parametrize("seed", range(40))
def test_parts_of_a_matrix_are_encoded_as_the_whole(seed: int) -> None:
    tensors, holdings = random_case(1000 + seed)
    torch.manual_seed(seed)
    whole = {meta.name: (torch.randn(meta.shape) * 10 ** random.Random(seed).uniform(-30, 30)).bfloat16() for meta in tensors}
    for tensor in whole.values():
        if seed % 4 == 0 and tensor.dim() == 2:
            tensor[: BLOCK + 3] = 0  # a row of blocks without scales of its own
    shapes = {meta.name: meta.shape for meta in tensors}
    views = [[HFView(name, shapes[name], region, whole[name][box(region)]) for name, region in of_rank] for of_rank in holdings]
    for of_rank, scales in zip(views, scales_of_ranks(tensors, views), strict=True):
        for view in scales.views:
            assert torch.equal(view.view, quantise(whole[view.name.removesuffix("_scale_inv")])[1][box(view.region)])
        for view in (view for view in of_rank if view.name in scales.of):
            out = torch.empty(view.region_shape, dtype=FP8)
            (row, _), (column, _) = view.region
            encode(view.view, scales.of[view.name], out, row=row, column=column)
            assert torch.equal(out.view(torch.uint8), quantise(whole[view.name])[0][box(view.region)].view(torch.uint8))


LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 1, 1), (2, 2, 1, 1), (1, 1, 2, 1), (2, 1, 2, 1), (2, 1, 1, 2), (1, 2, 4, 1), (8, 1, 1, 1)]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_shards_of_every_family_and_layout_have_the_scales_of_the_whole(family: str) -> None:
    wider = {"hidden_size": 136, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 34}
    config = CONFIGS[family] | wider
    if "moe_intermediate_size" in config:
        config |= {"moe_intermediate_size": 160, "mlp_only_layers": []}
    names = NameMap(config)
    tensors = quantised(names.tensors(torch.float32))
    state = random_hf_state(config, seed=3)
    expected = quantised_state(state)
    assert {(meta.name, meta.shape, meta.dtype) for meta in tensors} == {(n, tuple(t.shape), t.dtype) for n, t in expected.items()}
    for layout in LAYOUTS:
        if config["model_type"] == "deepseek_v3" and layout[0] > 4:
            continue
        ranks = megatron_shards(config, state, *layout)
        views = [[view for shard in of_rank for view in names.views(shard)] for of_rank in ranks]
        for scales in scales_of_ranks(tensors, views):
            for view in scales.views:
                assert torch.equal(view.view, expected[view.name][box(view.region)]), (layout, view.name)


# ---- swaps


def swap_on_every_way(config: dict[str, Any], layout: tuple[int, int, int, int], tp: int, nodes: list[str]) -> list[int]:
    """Two versions on each route into engines of `tp` processes. Returns the bytes that all received."""
    rank = dist.get_rank()
    source = Source(config, layout, rank)
    received = []
    for route, on_device in WAYS:
        # Scales are wanted whole: what a process wants of them is SGLang's business.
        states = [quantised_state(random_hf_state(config, seed)) for seed in (0, 1)]
        scales = [(name, tuple((0, n) for n in tensor.shape)) for name, tensor in states[0].items() if name.endswith("_scale_inv")]
        wanted = [None if (part := wanted_by(config, process, tp)) is None else [*part, *scales] for process in range(tp)]
        sink = ShardedSink(wanted, opens_device_memory=on_device) if rank % tp == 0 else None
        settings = SwapConfig(route=route, bucket_bytes=8192, device_bucket_bytes=16384, timeout_s=120)
        swap = WeightSwap(source, sink, settings, control_group=group(), node=nodes[rank], quantization="block_fp8")
        for version in (0, 1):
            source.set_version(version)
            with swap.serving(version):
                for parts in sink.parts if sink is not None else ():
                    assert {name for name, _ in parts} == set(states[0])
                    for (name, region), tensor in parts.items():
                        expected = states[version][name][box(region)]
                        assert torch.equal(tensor.view(torch.uint8), expected.contiguous().view(torch.uint8)), (route, name, region)
        assert swap.last_stats is not None
        received.append(swap.last_stats.num_bytes)
        swap.close()
    return received


CASES = {
    "tp2, one engine of two": (WIDE, (2, 1, 1, 1), 2, ["a", "a"]),
    "tp2, groups cut, two engines on two nodes": (WIDE | {"num_key_value_heads": 1}, (2, 1, 1, 1), 1, ["a", "b"]),
    "ep2 moe": (WIDE_MOE, (1, 1, 2, 1), 1, ["a", "a", "b"]),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_every_route_brings_the_bytes_of_a_checkpoint(case: str) -> None:
    config, _, tp, nodes = CASES[case]
    received = run_ranks(swap_on_every_way, len(nodes), *CASES[case])
    plain = sum(tensor.nbytes for tensor in random_hf_state(config, 0).values()) * (len(nodes) // tp)
    assert all(len(set(of_rank)) == 1 and of_rank[0] < plain / 3 for of_rank in received), "of fp32, about a quarter"


def swap_broken_weights(value: float) -> str:
    rank = dist.get_rank()
    source, sink = Source(WIDE, (2, 1, 1, 1), rank), MemorySink() if rank == 0 else None
    settings = SwapConfig(route="host_memory", bucket_bytes=8192, timeout_s=120)
    swap = WeightSwap(source, sink, settings, control_group=group(), quantization="block_fp8")
    with swap.serving(0):
        pass
    source.set_version(1)
    if rank == 1:
        next(s for s in source.weight_shards() if s.name.endswith("linear_proj.weight")).tensor[129, 1] = value
    message = ""
    try:
        with swap.serving(1):
            pass
    except WeightTransferError as error:
        message = str(error)
    assert sink is None or sink.policy_version == 0
    source.set_version(2)
    with swap.serving(2):
        if sink is not None:
            expected = quantised_state(random_hf_state(WIDE, 2))
            assert all(torch.equal(sink.weights[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in expected.items())
    swap.close()
    return message


@pytest.mark.distributed
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_without_a_scale_are_named_and_the_old_version_serves(value: float) -> None:
    first, second = run_ranks(swap_broken_weights, 2, value)
    assert first == second
    where = (
        r"tensor model\.layers\.0\.self_attn\.o_proj\.weight has an element that is infinite or no number, in rows 128:256, columns 128:256"
    )
    assert re.search(rf"rank 1, quantising: ValueError: {where}", first)


# ---- what is quantised, and for whom


def test_projections_are_quantised_and_nothing_else() -> None:
    names = [meta.name for config in CONFIGS.values() for meta in NameMap(config).tensors(torch.float32)]
    left = {name.split(".")[-2] if name.endswith("weight") else name.split(".")[-1] for name in names if not is_quantised(name)}
    assert left == {
        *("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "q_a_layernorm"),
        *("kv_a_layernorm", "gate", "bias", "e_score_correction_bias"),
    }
    chosen = {name.split(".")[-2] for name in names if is_quantised(name)}
    assert chosen == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    }


def test_half_of_the_bytes_move() -> None:
    plain = NameMap(DENSE | {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "vocab_size": 128}).tensors(torch.bfloat16)
    assert 0.5 < sum(meta.num_bytes for meta in quantised(plain)) / sum(meta.num_bytes for meta in plain) < 0.52


@pytest.mark.parametrize(
    ("changes", "tp", "said"),
    [
        ({}, 1, None),
        ({}, 2, None),
        ({"num_key_value_heads": 2}, 4, None),  # SGLang gives each process a whole head
        (
            {"head_dim": 64, "num_key_value_heads": 2},
            2,
            r"with rollout\.tp=2 a process .* 64 rows of k_proj and v_proj, .* multiple of 128",
        ),
        ({"intermediate_size": 320}, 1, r"has 320 rows of gate_proj and up_proj"),
        ({"hidden_size": 200}, 2, None),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 192}, 1, r"192 rows of the experts' gate_proj and up_proj"),
    ],
)
def test_an_engine_that_cannot_hold_the_blocks_is_refused(changes: dict[str, Any], tp: int, said: str | None) -> None:
    sizes = {"hidden_size": 256, "head_dim": 128, "intermediate_size": 512, "moe_intermediate_size": 256, "mlp_only_layers": []}
    architecture = Architecture.from_hf(MOE | {"model_type": "qwen3"} | sizes | changes)
    problem = problem_of_engine(architecture, tp)
    assert (problem == "") if said is None else re.search(said, problem)


def test_the_embedded_engine_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"rollout\.quantization is 'block_fp8'; it needs rollout\.engine=sglang: the embedded engine computes"
    ):
        RolloutConfig(quantization="block_fp8")
    RolloutConfig(engine="sglang", quantization="block_fp8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_comes_back_is_as_near_as_three_bits_of_mantissa_allow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(300, 500) * torch.logspace(-6, 6, 500)).to(dtype)
    weight[:BLOCK, :BLOCK] = 0
    fp8, scale = quantise(weight)
    assert bool((scale > 0).all())
    assert float(scale[0, 0]) == 1.0
    back, exact = dequantise(fp8, scale).double(), weight.double()
    # Half a unit of the last place: 2^-4 of a number, or of the smallest normal one (2^-6) of the block.
    bound = torch.maximum(exact.abs(), 2.0**-6 * spread(scale, exact)) * 2.0**-4 * (1 + 1e-6)
    assert bool(((back - exact).abs() <= bound).all())


def spread(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scale.double().repeat_interleave(BLOCK, 0)[: like.shape[0]].repeat_interleave(BLOCK, 1)[:, : like.shape[1]]
