"""AdamW in Triton: tiles of all tensors in one grid, which finds them through a table of addresses. Names as in the package.

Megatron's distributed optimizer (megatron-core 0.16.1) gives each parameter's shard master weights and moments of their own; only
gradients and model weights lie in flat buffers, with padding between them, and the groups that are decayed or not are mixed there. So
there is no run of memory to go along, and a shard may begin at any element.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from tandem.kernels.adamw.inputs import Scalars, Tensors
from tandem.kernels.block_fp8 import BLOCK
from tandem.kernels.block_fp8.triton import block_scale, casts_in_hardware, encode, largest_magnitude

TILE = 1024  # elements of one program
NUM_WARPS = 8
VECTOR, CAST_VECTOR = 4, 16  # elements that a thread reads at once where addresses are multiples of so many
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(field, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.load(field).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, VECTOR * (pointer.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def _step_tile(
    row,
    place,
    inside,
    keep,
    lerp,
    beta2,
    square,
    inverse_root,
    eps,
    step_size,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    VECTOR: tl.constexpr,
):
    weights = _pointer(row, tl.float32, VECTOR) + place
    means = _pointer(row + 2, tl.float32, VECTOR) + place
    squares = _pointer(row + 3, tl.float32, VECTOR) + place
    grad = tl.load(_pointer(row + 1, GRAD, VECTOR) + place, mask=inside).to(tl.float32)
    weight = tl.load(weights, mask=inside)
    mean = tl.load(means, mask=inside)
    mean_square = tl.load(squares, mask=inside)
    # From the nearer end, as torch's lerp: exact for β1 = 0.
    mean = tl.where(lerp < 0.5, mean + lerp * (grad - mean), grad - (grad - mean) * (1 - lerp))
    mean_square = mean_square * beta2 + square * grad * grad
    denominator = tl.sqrt(mean_square) * inverse_root + eps
    weight = weight * keep - step_size * mean / denominator
    tl.store(weights, weight, mask=inside)
    tl.store(means, mean, mask=inside)
    tl.store(squares, mean_square, mask=inside)
    if COPY is not None:
        tl.store(_pointer(row + 4, COPY, VECTOR) + place, weight.to(COPY), mask=inside)


@triton.jit
def _step_kernel(
    table,
    owners,
    keep,
    lerp,
    beta2,
    square,
    inverse_root,
    eps,
    step_size,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """table: of each tensor the addresses of weight, grad, exp_avg, exp_avg_sq, copy; its size, its first tile, whether it is aligned."""
    tile = tl.program_id(0)
    row = table + tl.load(owners + tile).to(tl.int64) * 8
    start = (tile - tl.load(row + 6)) * TILE
    place = start + tl.arange(0, TILE)
    size = tl.load(row + 5)
    if (tl.load(row + 7) != 0) & (start + TILE <= size):
        _step_tile(row, place, None, keep, lerp, beta2, square, inverse_root, eps, step_size, GRAD, COPY, VECTOR)
    else:
        _step_tile(row, place, place < size, keep, lerp, beta2, square, inverse_root, eps, step_size, GRAD, COPY, 1)


@triton.jit
def _cast_block(
    row, corner, height, width, stride, scale_at, SOURCE: tl.constexpr, HARDWARE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """In strips, twice: the whole block in registers would leave room for one program. The second time it comes from the cache."""
    STRIP: tl.constexpr = BLOCK // 4
    rows, columns = tl.arange(0, STRIP)[:, None], tl.arange(0, BLOCK)[None, :]
    source, fp8 = _pointer(row, SOURCE, VECTOR) + corner, _pointer(row + 1, tl.uint8, VECTOR) + corner
    amax = 0.0
    for top in range(0, BLOCK, STRIP):
        at = (top + rows) * stride + columns
        if VECTOR > 1:  # and whole
            strip = tl.load(source + at)
        else:
            strip = tl.load(source + at, mask=(top + rows < height) & (columns < width), other=0.0)
        amax = tl.maximum(amax, largest_magnitude(strip.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    scale = block_scale(amax)
    tl.store(_pointer(row + 2, tl.float32, 1) + scale_at, scale)
    for top in range(0, BLOCK, STRIP):
        at = (top + rows) * stride + columns
        if VECTOR > 1:
            tl.store(fp8 + at, encode(tl.load(source + at).to(tl.float32), scale, HARDWARE))
        else:
            inside = (top + rows < height) & (columns < width)
            tl.store(fp8 + at, encode(tl.load(source + at, mask=inside, other=0.0).to(tl.float32), scale, HARDWARE), mask=inside)


@triton.jit
def _cast_kernel(table, owners, SOURCE: tl.constexpr, HARDWARE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """table: of each matrix the addresses of source, fp8 and scale; rows, columns, its first block, whether its rows are aligned."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * 7
    block = program - tl.load(row + 5)
    num_rows, num_columns = tl.load(row + 3), tl.load(row + 4)
    per_row = tl.cdiv(num_columns, BLOCK)
    top, left = block // per_row * BLOCK, block % per_row * BLOCK
    corner = top * num_columns + left
    height, width, stride = (num_rows - top).to(tl.int32), (num_columns - left).to(tl.int32), num_columns.to(tl.int32)
    if (tl.load(row + 6) != 0) & (height >= BLOCK) & (width >= BLOCK):
        corner, stride = tl.multiple_of(corner, VECTOR), tl.multiple_of(stride, VECTOR)
        _cast_block(row, corner, height, width, stride, block, SOURCE, HARDWARE, BLOCK, VECTOR)
    else:
        _cast_block(row, corner, height, width, stride, block, SOURCE, HARDWARE, BLOCK, 1)


class Launches:
    """The launches of one step, with their tables on the device."""

    def __init__(self, tensors: Sequence[Tensors]) -> None:
        device = tensors[0].weight.device
        self._hardware = casts_in_hardware(tensors[0].weight)
        steps = _grouped(tensors, lambda x: (x.grad.dtype, None if x.copy is None else x.copy.dtype))
        self._steps = [(types, *_tables([_step_row(x) for x in part], device)) for types, part in steps.items()]
        casts = _grouped([x for x in tensors if x.fp8 is not None], lambda x: x.source.dtype)
        self._casts = [(dtype, *_tables([_cast_row(x) for x in part], device)) for dtype, part in casts.items()]

    def run(self, scalars: Scalars) -> None:
        """Step all tensors, then cast those that have an 8-bit form."""
        for (grad_dtype, copy_dtype), table, owners in self._steps:
            if len(owners):
                copy = None if copy_dtype is None else TYPES[copy_dtype]
                options: Any = {"TILE": TILE, "VECTOR": VECTOR, "num_warps": NUM_WARPS}
                inverted = scalars._replace(root=1 / scalars.root)
                _step_kernel[(len(owners),)](table, owners, *inverted, GRAD=TYPES[grad_dtype], COPY=copy, **options)
        for dtype, table, owners in self._casts:
            if len(owners):
                options = {"BLOCK": BLOCK, "VECTOR": CAST_VECTOR, "num_warps": NUM_WARPS}
                _cast_kernel[(len(owners),)](table, owners, SOURCE=TYPES[dtype], HARDWARE=self._hardware, **options)


def _grouped(tensors: Sequence[Tensors], key: Callable[[Tensors], Any]) -> dict[Any, list[Tensors]]:
    found: dict[Any, list[Tensors]] = {}
    for x in tensors:
        found.setdefault(key(x), []).append(x)
    return found


def _step_row(x: Tensors) -> tuple[list[int], list[int], bool, int]:
    """Addresses, sizes, whether vectors can be read, and the number of tiles."""
    size = x.weight.numel()
    addresses, is_aligned = _addresses((x.weight, x.grad, x.exp_avg, x.exp_avg_sq, x.copy), VECTOR)
    return addresses, [size], is_aligned, -(-size // TILE)


def _cast_row(x: Tensors) -> tuple[list[int], list[int], bool, int]:
    assert x.fp8 is not None
    assert x.scale is not None
    num_rows, num_columns = x.fp8.shape
    addresses, is_aligned = _addresses((x.source, x.fp8, x.scale), CAST_VECTOR)
    return addresses, [num_rows, num_columns], is_aligned and num_columns % CAST_VECTOR == 0, x.scale.numel()


def _addresses(tensors: Sequence[torch.Tensor | None], vector: int) -> tuple[list[int], bool]:
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    steps = [1 if x is None else vector * x.element_size() for x in tensors]
    return addresses, all(address % step == 0 for address, step in zip(addresses, steps, strict=True))


def _tables(rows: Sequence[tuple[list[int], list[int], bool, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of the table for each tensor, and the row of each program."""
    table, first = [], 0
    for addresses, sizes, is_aligned, num_programs in rows:
        table.append([*addresses, *sizes, first, int(is_aligned)])
        first += num_programs
    counts = torch.tensor([num_programs for *_, num_programs in rows])
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(counts)
    return torch.tensor(table, dtype=torch.int64, device=device), owners.to(device)
