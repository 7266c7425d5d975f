"""What a part of a bucket is, and the three nested loops that its copy comes to. Pure: no element is touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from tandem.kernels.block_fp8 import scale_shape

FP8 = torch.float8_e4m3fn
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
CASTS = {
    *((dtype, dtype) for dtype in _PLAIN),
    *((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)),
    *((torch.float32, FP8), (torch.bfloat16, FP8), (FP8, FP8)),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor, and where and how it lies in a bucket.

    What becomes float8_e4m3fn is a matrix (all dimensions but the last are rows) in blocks of 128 x 128, whose fp32 scales lie in the
    bucket too (kernels/block_fp8); or it is part of a matrix whose scales are given.
    """

    source: torch.Tensor  # of any strides: a cut of a parameter, rows in groups, transposed
    start: int  # byte of the bucket where its first element lies
    dtype: torch.dtype  # in the bucket
    strides: tuple[int, ...] | None = None  # in the bucket, in elements; None: contiguous
    scale_start: int | None = None  # byte where its first scale lies
    scale_stride: int | None = None  # fp32 numbers from one row of scales to the next; None: as many as a row has
    given_scales: torch.Tensor | None = None  # those of all blocks of a matrix, where they are known; the bucket then has none
    row: int = 0  # of that matrix, where the source begins
    column: int = 0

    @property
    def is_quantised(self) -> bool:
        return self.dtype == FP8 and self.source.dtype != FP8

    @property
    def target_strides(self) -> tuple[int, ...]:
        if self.strides is not None:
            return self.strides
        shape = self.source.shape
        return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))

    @property
    def scales(self) -> tuple[tuple[int, int], int]:
        """Shape of the scales, and their rows' distance."""
        *rows, columns = self.source.shape
        shape = scale_shape(prod(rows), columns)
        return shape, shape[1] if self.scale_stride is None else self.scale_stride

    @property
    def end(self) -> int:
        """Byte after the last one that is written; 0 if none is."""
        if not self.source.numel():
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.source.shape, self.target_strides, strict=True))
        end = self.start + (last + 1) * self.dtype.itemsize
        if self.scale_start is None:
            return end
        (rows, columns), stride = self.scales
        return max(end, self.scale_start + ((rows - 1) * stride + columns) * 4)


class Loops(NamedTuple):
    """Element [g, r, n] is copied from g·source[0] + r·source[1] + n·source[2] to the like of the target, whose last stride is 1."""

    sizes: tuple[int, int, int]
    source: tuple[int, int, int]
    target: tuple[int, int, int]


def check(part: Part, index: int) -> None:
    """Raises: ValueError for what no kernel copies, naming the part by its index."""
    name = f"parts[{index}]"
    shape, target = tuple(part.source.shape), part.target_strides
    if (part.source.dtype, part.dtype) not in CASTS:
        offered = ", ".join(sorted(f"{source} → {dtype}".replace("torch.", "") for source, dtype in CASTS))
        raise ValueError(f"{name}: {part.source.dtype} is to become {part.dtype}; what there is: {offered}")
    if len(target) != len(shape) or any(stride < 0 for stride in target):
        raise ValueError(
            f"{name}: strides is {target}, the source has shape {shape}; it must have one stride of at least 0 for each dimension"
        )
    if part.start < 0 or part.start % part.dtype.itemsize:
        raise ValueError(f"{name}: start is {part.start}; it must be a multiple of {part.dtype.itemsize}, the bytes of {part.dtype}")
    has_scales = part.scale_start is not None or part.given_scales is not None
    if has_scales != part.is_quantised or (part.scale_stride is not None and part.scale_start is None):
        raise ValueError(f"{name}: scale_start is {part.scale_start}, dtype {part.dtype}; float8_e4m3fn has scales, others have none")
    if part.is_quantised and len(shape) < 2:
        raise ValueError(f"{name}: the source has shape {shape}; blocks of 128 x 128 need a matrix")
    if part.given_scales is not None:
        rows, columns = scale_shape(part.row + prod(shape[:-1]), part.column + shape[-1])
        found = tuple(part.given_scales.shape)
        if part.scale_start is not None or part.given_scales.dtype != torch.float32 or part.given_scales.device != part.source.device:
            what = f"{part.given_scales.dtype} on {part.given_scales.device}, scale_start is {part.scale_start}"
            raise ValueError(f"{name}: scales are {what}; given ones are fp32 beside the source, and then none lie in the bucket")
        if len(found) != 2 or not (part.row >= 0 and part.column >= 0) or found[0] < rows or found[1] < columns:
            where = f"from row {part.row} and column {part.column} on"
            raise ValueError(f"{name}: scales are {found}; a source of shape {shape} {where} needs at least {(rows, columns)}")
    elif part.scale_start is not None and (part.scale_start < 0 or part.scale_start % 4 or part.scales[1] < part.scales[0][1]):
        found = f"scale_start is {part.scale_start}, scale_stride {part.scale_stride}"
        raise ValueError(f"{name}: {found}; they must be a multiple of 4 and at least {part.scales[0][1]}, the scales of a row")
    if part.source.numel():
        loops(part, index)


def loops(part: Part, index: int = 0) -> Loops:
    """The copy of one part as three loops: neighbouring dimensions that are one run of both sides become one."""
    dims = list(zip(part.source.shape, part.source.stride(), part.target_strides, strict=True))
    inner = [dims.pop()] if part.is_quantised else []
    merged = _merged(dims)
    if not part.is_quantised and merged and merged[-1][2] == 1:
        inner = [merged.pop()]
    size, source, target = inner[0] if inner else (1, 1, 1)
    if len(merged) > 2 or (target != 1 and size > 1):
        shape, strides = tuple(part.source.shape), part.source.stride()
        raise ValueError(
            f"parts[{index}]: a source of shape {shape} and strides {strides} to strides {part.target_strides} is {len(merged) + 1} nested "
            f"runs, the last {target} elements apart in the bucket; there may be 3, the last side by side"
        )
    (groups, *group), (rows, *row) = [(1, 0, 0)] * (2 - len(merged)) + merged
    return Loops((groups, rows, size), (group[0], row[0], source), (group[1], row[1], 1))


def _merged(dims: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(size, stride, stride), outermost first, without dimensions of one element and of one run with the next."""
    found: list[tuple[int, int, int]] = []
    for size, source, target in dims:
        if size == 1:
            continue
        if found and found[-1][1] == size * source and found[-1][2] == size * target:
            found[-1] = found[-1][0] * size, source, target
        else:
            found.append((size, source, target))
    return found
