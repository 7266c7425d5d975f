"""A packed bucket holds, byte for byte, what torch's copies and casts put there."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.engine.checkpoint.names import NameMap
from tandem.kernels import backend
from tandem.kernels.block_fp8 import quantise, scale_shape, scales_of
from tandem.kernels.packing import CASTS, Magnitudes, Packer, Part
from tandem.kernels.packing.layout import Loops, loops
from tests.checkpoint.test_names import CONFIGS, megatron_shards, random_hf_state

BACKENDS: list[Any] = ["reference", "triton"]
FP8 = torch.float8_e4m3fn
GUARD = 0xA5  # bytes that belong to no part


def packed(parts: Sequence[Part], choice: Any, spare: int = 0) -> torch.Tensor:
    with backend.chosen(choice):
        packer = Packer(parts)
    bucket = torch.full((packer.num_bytes + spare,), GUARD, dtype=torch.uint8, device=DEVICE)
    packer.pack(bucket)
    return bucket.cpu()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu()


def cut(rng: random.Random, dtype: torch.dtype) -> torch.Tensor:
    """Part of a larger tensor: rows, columns, rows in groups, a transposed matrix, a vector, one element; at aligned places or any."""
    unit = rng.choice([1, 16])
    rows, columns = rng.randint(1, 6) * unit + rng.randrange(2), rng.randint(1, 12) * unit
    whole = (torch.randn(3 * rows + 5, columns + 2 * unit) * 10 ** rng.uniform(-2, 2)).to(dtype).to(DEVICE)
    return rng.choice(
        [
            lambda: whole[2 : 2 + rows],
            lambda: whole[:, unit : unit + columns],
            lambda: whole[: 3 * rows].view(3, rows, -1)[:, rows // 2 :],
            lambda: whole[: 3 * rows].view(3, rows, -1)[:, : rows // 2 + 1, :columns],
            lambda: whole[:rows, :columns].T,
            lambda: whole[0],
            lambda: whole[:, 1],
            lambda: whole[1, 1],
            lambda: whole[:0],
        ]
    )()


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_bucket_of_cuts_and_casts(seed: int, choice: Any) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    casts = sorted(CASTS, key=str)
    parts: list[Part] = []
    wanted: list[tuple[int, torch.Tensor]] = []
    end = 0
    for index in range(21):
        dtype, to = casts[index % len(casts)]
        source = cut(rng, dtype)
        if to == FP8 and dtype != FP8 and source.dim() < 2:
            source = source.view(1, -1)
        start = -(-end // 256) * 256 if rng.random() < 0.6 else -(-end // 4) * 4 + 4
        after = start + source.numel() * to.itemsize
        if to != FP8 or dtype == FP8:
            parts.append(Part(source=source, start=start, dtype=to))
            wanted.append((start, bytes_of(source.to(to))))
            end = after
            continue
        fp8, scale = quantise(source.reshape(-1, source.shape[-1]))
        scale_start = -(-after // 4) * 4
        parts.append(Part(source=source, start=start, dtype=to, scale_start=scale_start))
        wanted += [(start, bytes_of(fp8)), (scale_start, bytes_of(scale))]
        end = scale_start + scale.numel() * 4
    expected = torch.full((end + 7,), GUARD, dtype=torch.uint8)
    for start, values in wanted:
        expected[start : start + len(values)] = values
    found = packed(parts, choice)
    expected = expected[: len(found)]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("choice", BACKENDS)
def test_long_runs_and_large_blocks_go_on_from_tile_to_tile(choice: Any) -> None:
    torch.manual_seed(0)
    run = torch.randn(2 * 16384 + 48, device=DEVICE)
    odd = torch.randn(3, 16384 + 5, device=DEVICE)
    block = torch.randn(130, 2, 144, device=DEVICE)[:, 1]
    fp8, scale = quantise(block)
    parts = [
        Part(source=run, start=0, dtype=torch.bfloat16),
        Part(source=odd[:, 1:], start=65536 * 2, dtype=torch.bfloat16),
        Part(source=block, start=65536 * 4, dtype=torch.float32),
        Part(source=block, start=65536 * 6, dtype=FP8, scale_start=65536 * 7),
    ]
    found = packed(parts, choice)
    for start, tensor in zip((0, 131072, 262144, 393216, 458752), (run.bfloat16(), odd[:, 1:].bfloat16(), block, fp8, scale), strict=True):
        assert torch.equal(found[start : start + tensor.numel() * tensor.element_size()], bytes_of(tensor))


@pytest.mark.parametrize("choice", BACKENDS)
def test_columns_of_a_wider_matrix_leave_its_other_columns(choice: Any) -> None:
    """What a rank writes of a matrix that tensor parallelism cuts by columns, with the scales of its blocks."""
    torch.manual_seed(1)
    whole = torch.randn(200, 3 * 128, device=DEVICE)
    wanted = torch.full((200 * 384 * 2,), GUARD, dtype=torch.uint8).view(torch.bfloat16).view(200, 384).clone()
    wanted[:, 128:256] = whole[:, 128:256].bfloat16()
    part = Part(source=whole[:, 128:256].contiguous(), start=256, dtype=torch.bfloat16, strides=(384, 1))
    assert torch.equal(packed([part], choice, spare=256)[: 200 * 384 * 2], bytes_of(wanted))
    fp8, scale = quantise(whole)
    parts = [
        Part(
            source=whole[:, start : start + 128],
            start=start,
            dtype=FP8,
            strides=(384, 1),
            scale_start=200 * 384 + start // 32,
            scale_stride=3,
        )
        for start in (0, 128, 256)
    ]
    assert torch.equal(packed(parts, choice), torch.cat([bytes_of(fp8), bytes_of(scale)]))


def test_the_tensors_are_read_anew_each_time() -> None:
    for choice in BACKENDS:
        source = torch.zeros(40, device=DEVICE)
        with backend.chosen(choice):
            packer = Packer([Part(source=source, start=0, dtype=torch.float32)])
        source += 3
        bucket = torch.zeros(160, dtype=torch.uint8, device=DEVICE)
        packer.pack(bucket)
        assert torch.equal(bucket.view(torch.float32), source)


def test_neighbouring_dimensions_of_one_run_are_one_loop() -> None:
    whole = torch.zeros(4, 6, 8, 10)

    def found(source: torch.Tensor, strides: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> Loops:
        return loops(Part(source=source, start=0, dtype=dtype, strides=strides))

    assert found(whole) == Loops((1, 1, 1920), (0, 0, 1), (0, 0, 1))
    assert found(whole[:, 2:5]) == Loops((1, 4, 240), (0, 480, 1), (0, 240, 1))
    assert found(whole[:, 2:5, 1:]) == Loops((4, 3, 70), (480, 80, 1), (210, 70, 1))
    assert found(whole[0, 0].T) == Loops((1, 10, 8), (0, 1, 10), (0, 8, 1))
    assert found(whole[0, 0], (30, 1)) == Loops((1, 8, 10), (0, 10, 1), (0, 30, 1))
    assert found(whole[0, :, :, 0], (80, 10)) == Loops((1, 48, 1), (0, 10, 1), (0, 10, 1))
    assert found(torch.zeros(())) == Loops((1, 1, 1), (0, 0, 1), (0, 0, 1))
    assert found(whole, dtype=FP8) == Loops((1, 192, 10), (0, 10, 1), (0, 10, 1))
    assert found(whole[:, 2:5], dtype=FP8) == Loops((4, 24, 10), (480, 10, 1), (240, 10, 1))


# All cuts of the name map: query, key and value in groups, gates and ups, columns, vocabularies, experts, biases.


QUICK = {("qwen3_moe", (4, 2, 2, 2)), ("qwen2", (4, 1, 1, 1)), ("deepseek_v3", (2, 1, 1, 1))}
ALL = {(name, layout) for name in CONFIGS for layout in ((2, 1, 1, 1), (4, 2, 2, 2), (8, 1, 4, 1))}


@pytest.mark.parametrize(
    ("name", "layout"), [*sorted(QUICK), *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(ALL - QUICK))]
)
def test_every_rank_packs_its_cuts_of_a_model_into_place(name: str, layout: tuple[int, int, int, int]) -> None:
    """One bucket for the whole model; every rank writes what it holds; against the model, and against one copy for each view."""
    rng = random.Random(f"{name}{layout}")
    config: dict[str, Any] = {**CONFIGS[name], "num_hidden_layers": 2}
    state = random_hf_state(config, seed=1)
    names = NameMap(config)
    starts, end = {}, 0
    for meta in names.tensors(torch.bfloat16):
        starts[meta.name] = end
        end += -(-meta.num_bytes // 256) * 256
    metas = {meta.name: meta for meta in names.tensors(torch.bfloat16)}
    copied, found = (torch.zeros(end, dtype=torch.uint8) for _ in range(2))
    on_device = found.to(DEVICE)
    for shards in megatron_shards(config, state, *layout):
        parts = []
        for view in (view for shard in shards for view in names.views(shard)):
            meta, start = metas[view.name], starts[view.name]
            tensor = copied[start : start + meta.num_bytes].view(meta.dtype).view(meta.shape)
            view.copy_to(tensor[tuple(slice(*bounds) for bounds in view.region)])
            # In two pieces, as entries of buckets are, which may cut a group of rows.
            num_rows = view.region_shape[0]
            middle = rng.randrange(num_rows + 1)
            inner = [bounds[0] for bounds in view.region[1:]]
            strides = tuple(tensor.stride())
            for first, last in ((0, middle), (middle, num_rows)):
                for a, _, source in view.rows(first, last) if last > first else ():
                    at = sum(i * stride for i, stride in zip([view.region[0][0] + a, *inner], strides, strict=True))
                    grouped = source.dim() > len(strides)
                    target = (strides[0] * source.shape[1], *strides) if grouped else strides
                    parts.append(Part(source=source.to(DEVICE), start=start + at * meta.dtype.itemsize, dtype=meta.dtype, strides=target))
        with backend.chosen("triton"):
            Packer(parts).pack(on_device)
    found = on_device.cpu()
    assert torch.equal(found, copied)
    for meta in metas.values():
        bytes_here = found[starts[meta.name] : starts[meta.name] + meta.num_bytes]
        assert torch.equal(bytes_here, bytes_of(state[meta.name].to(meta.dtype))), meta.name


def test_what_does_not_fit_is_named() -> None:
    source = torch.zeros(4, 6)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            Packer([Part(**({"source": source, "start": 0, "dtype": torch.float32} | changes))])

    refused(r"parts\[0\]: torch.float64 is to become torch.float32; what there is: .*float32 → bfloat16", source=source.double())
    refused(r"start is 2; it must be a multiple of 4, the bytes of torch.float32", start=2)
    refused(r"strides is \(1,\), the source has shape \(4, 6\)", strides=(1,))
    refused(r"scale_start is None, dtype torch.float8_e4m3fn; float8_e4m3fn has scales", dtype=FP8)
    given = {"dtype": FP8, "given_scales": torch.ones(1, 1)}
    refused(r"scales are \(1, 1\); a source of shape \(4, 6\) from row 125 and column 0 on needs at least \(2, 1\)", **given, row=125)
    refused(r"given ones are fp32 beside the source, and then none lie in the bucket", **given, scale_start=0)
    refused(r"scale_start is None, dtype torch.float32; float8_e4m3fn has scales, others have none", **(given | {"dtype": torch.float32}))
    refused(r"scale_start is 64, dtype torch.float32; float8_e4m3fn has scales, others have none", scale_start=64)
    refused(r"scale_start is 6, scale_stride None; they must be a multiple of 4 and at least 1", dtype=FP8, scale_start=6)
    refused(r"the source has shape \(6,\); blocks of 128 x 128 need a matrix", source=source[0], dtype=FP8, scale_start=64)
    refused(r"is 4 nested runs, the last 1 elements apart", source=torch.zeros(4, 4, 4, 4)[:3, :3, :3, :3])
    refused(r"is 2 nested runs, the last 6 elements apart", dtype=FP8, scale_start=64, strides=(1, 6))
    other = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match=r"parts\[1\] is on meta, parts\[0\] on cpu; all must be on one device"):
        Packer([Part(source=source, start=0, dtype=torch.float32), Part(source=other, start=96, dtype=torch.float32)])
    packer = Packer([Part(source=source, start=32, dtype=torch.float32)])
    with pytest.raises(ValueError, match=r"bucket is \(200,\) torch.int8 on cpu; it must have one contiguous dimension of torch.uint8"):
        packer.pack(torch.zeros(200, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"bucket has 127 bytes at address \d+; the parts need 128 at a multiple of 16"):
        packer.pack(torch.zeros(127, dtype=torch.uint8))


def test_no_parts_and_empty_parts_write_nothing() -> None:
    for choice in BACKENDS:
        assert len(packed([], choice)) == 0
        empty = Part(source=torch.zeros(0, 5, device=DEVICE), start=8, dtype=torch.bfloat16)
        assert packed([empty], choice, spare=20).tolist() == [GUARD] * 20
    assert scale_shape(0, 5) == (0, 1)


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("seed", range(2))
def test_parts_of_a_matrix_with_given_scales_have_the_bytes_of_the_whole(seed: int, choice: Any) -> None:
    """Cut anywhere, the rows of a part in groups or not; the magnitudes of its blocks are found part by part as well."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, columns, dtype = [(144, 144, torch.bfloat16), (156, 131, torch.float32)][seed]
    whole = (torch.randn(rows, columns) * 10 ** rng.uniform(-20, 20)).to(dtype).to(DEVICE)
    whole[:130, :129] = 0
    fp8, scale = quantise(whole)
    unit = [16, 1][seed]
    row_cuts = [0, *sorted(rng.sample(range(1, rows // 12), 2)), rows // 12]
    column_cuts = [0, rng.randrange(unit, columns, unit), columns]
    largest = torch.zeros_like(scale)
    cuts = []
    for (top, bottom), (left, right) in itertools.product(itertools.pairwise(row_cuts), itertools.pairwise(column_cuts)):
        source = whole[top * 12 : bottom * 12, left:right]
        cuts.append((source.unflatten(0, (-1, 12)) if rng.random() < 0.5 else source, top * 12, left))
    with backend.chosen(choice):
        magnitudes = Magnitudes([(source, largest, row, column) for source, row, column in cuts])
    magnitudes.find()
    assert torch.equal(scales_of(largest), scale)
    parts, end = [], 0
    for source, row, column in cuts:
        parts.append(Part(source=source, start=end, dtype=FP8, given_scales=scale, row=row, column=column))
        end = -(-(end + source.numel()) // 16) * 16 + 3 * (unit == 1)
    bucket = packed(parts, choice)
    for part, (_, row, column) in zip(parts, cuts, strict=True):
        expected = fp8[row:, column:][: part.source.shape[:-1].numel(), : part.source.shape[-1]]
        assert torch.equal(bucket[part.start : part.end], bytes_of(expected))


@pytest.mark.parametrize("choice", BACKENDS)
def test_the_magnitude_of_a_block_with_an_infinite_element_is_none(choice: Any) -> None:
    whole = torch.ones(200, 140, device=DEVICE)
    whole[3, 4], whole[150, 139] = -torch.inf, torch.nan
    largest = torch.zeros(2, 2, device=DEVICE)
    with backend.chosen(choice):
        Magnitudes([(whole[:100], largest, 0, 0), (whole[100:], largest, 100, 0)]).find()
    assert largest[0].tolist() == [torch.inf, 1.0]
    assert largest[1, 0] == 1.0
    assert largest[1, 1].isnan()
