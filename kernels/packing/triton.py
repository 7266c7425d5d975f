"""Packing in Triton: every part is cut into tiles, and one launch has a program for each tile of all of them.

A table in device memory tells each program what its part is. Shapes: G groups of R rows of N elements, M = G·R rows.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
import triton
import triton.language as tl

from tandem.kernels.block_fp8 import BLOCK
from tandem.kernels.block_fp8.triton import block_scale, casts_in_hardware, encode, largest_magnitude
from tandem.kernels.packing.layout import FP8, Part, loops

RUN = 16384  # elements of a long run that one program copies, half as many of 4 bytes to 4; else it copies a block of 128 x 128
ALIGNMENT = 16  # bytes, and elements of every stride, so that a thread loads and stores whole vectors
FEW_ROWS = 16  # of which a block would be mostly empty

# What a program does: 4 * cast + 2 * whether everything is aligned + whether a tile is one run.
_CASTS = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.float16, torch.float16): 1,  # of bytes
    (torch.float32, torch.bfloat16): 2,
    (torch.bfloat16, torch.float32): 3,
    (torch.float32, FP8): 4,
    (torch.bfloat16, FP8): 5,  # 6 and 7: the same two with scales that are given
    (FP8, FP8): 8,
}
_GIVEN = 2
_MAGNITUDES = {torch.float32: 9, torch.bfloat16: 10}
NUM_KINDS: tl.constexpr = tl.constexpr(44)
FIELDS: tl.constexpr = tl.constexpr(17)


@triton.jit
def _pack_kernel(bucket, table, part_of_tile, KINDS: tl.constexpr, HARDWARE: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr):
    """KINDS has a bit for each kind that occurs: what does not is not compiled."""
    part = table + tl.load(part_of_tile + tl.program_id(0)) * FIELDS
    kind = tl.load(part)
    for each in tl.static_range(NUM_KINDS):
        if (KINDS >> each) & 1:
            if kind == each:
                _pack_tile(bucket, part, each // 4, each // 2 % 2 > 0, each % 2 > 0, HARDWARE, BLOCK, RUN)


@triton.jit
def _pack_tile(
    bucket,
    part,
    CAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS_RUN: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    ROWS: tl.constexpr = 1 if IS_RUN else BLOCK
    COLUMNS: tl.constexpr = (RUN // 2 if CAST == 0 else RUN) if IS_RUN else BLOCK
    # As much at once as the registers hold: elements that are loaded one by one need an address each.
    IN_BLOCKS: tl.constexpr = CAST >= 4 and CAST != 8
    GIVEN: tl.constexpr = CAST == 6 or CAST == 7
    STEP: tl.constexpr = ROWS * COLUMNS // (1 if ALIGNED else (16 if IN_BLOCKS else 8))
    STEP_ROWS: tl.constexpr = STEP // COLUMNS if ROWS > 1 else 1
    STEP_COLUMNS: tl.constexpr = STEP // STEP_ROWS
    source_address, start = tl.load(part + 1), tl.load(part + 2)
    R, M, N = tl.load(part + 3).to(tl.int32), tl.load(part + 4).to(tl.int32), tl.load(part + 5)
    source_g, source_r, source_n = tl.load(part + 6), tl.load(part + 7), tl.load(part + 8)
    target_g, target_r = tl.load(part + 9), tl.load(part + 10)
    tile, across = tl.program_id(0) - tl.load(part + 11).to(tl.int32), tl.load(part + 12).to(tl.int32)
    down, right = tile // across, tile % across
    # The first tiles of part of a matrix begin where their blocks do: in front of it.
    above, left = tl.load(part + 15).to(tl.int32), tl.load(part + 16)
    first = right.to(tl.int64) * COLUMNS - left
    width = tl.minimum(N - first, COLUMNS).to(tl.int32)
    begin = tl.maximum(-first, 0).to(tl.int32)
    if CAST == 0:
        source, target = source_address.to(tl.pointer_type(tl.uint32)), (bucket + start).to(tl.pointer_type(tl.uint32))
    elif CAST == 1:
        source, target = source_address.to(tl.pointer_type(tl.uint16)), (bucket + start).to(tl.pointer_type(tl.uint16))
    elif CAST == 2:
        source, target = source_address.to(tl.pointer_type(tl.float32)), (bucket + start).to(tl.pointer_type(tl.bfloat16))
    elif CAST == 3:
        source, target = source_address.to(tl.pointer_type(tl.bfloat16)), (bucket + start).to(tl.pointer_type(tl.float32))
    elif CAST == 8:
        source, target = source_address.to(tl.pointer_type(tl.uint8)), bucket + start
    elif CAST == 4 or CAST == 6 or CAST == 9:
        source, target = source_address.to(tl.pointer_type(tl.float32)), bucket + start
    else:
        source, target = source_address.to(tl.pointer_type(tl.bfloat16)), bucket + start
    source += first * source_n
    target += first
    if ALIGNED:
        source, target, width = tl.multiple_of(source, 16), tl.multiple_of(target, 16), tl.multiple_of(width, 16)
        source_g, source_r = tl.multiple_of(source_g, 16), tl.multiple_of(source_r, 16)
        target_g, target_r = tl.multiple_of(target_g, 16), tl.multiple_of(target_r, 16)
        begin = tl.multiple_of(begin, 16)
        source_n = 1
    scale = 1.0
    if GIVEN:
        scales = tl.load(part + 13).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales + down * tl.load(part + 14) + right)
    largest = 0.0
    if IN_BLOCKS and not GIVEN:
        for step in range(0, ROWS * COLUMNS, STEP):
            row = down * ROWS - above + step // COLUMNS + tl.arange(0, STEP_ROWS)
            column = step % COLUMNS + tl.arange(0, STEP_COLUMNS)
            inside = ((row >= 0) & (row < M))[:, None] & ((column >= begin) & (column < width))[None, :]
            group, within = row // R, row % R
            values = tl.load(source + (group * source_g + within * source_r)[:, None] + column[None, :] * source_n, mask=inside, other=0)
            largest = tl.maximum(largest, largest_magnitude(values.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
        scale = block_scale(largest)
    if CAST >= 9:
        # Several parts may have elements of a block. As integers, positive floats have the same order.
        place = tl.load(part + 13).to(tl.pointer_type(tl.int32)) + down * tl.load(part + 14) + right
        tl.atomic_max(place, largest.to(tl.int32, bitcast=True))
    else:
        for step in range(0, ROWS * COLUMNS, STEP):
            row = down * ROWS - above + step // COLUMNS + tl.arange(0, STEP_ROWS)
            column = step % COLUMNS + tl.arange(0, STEP_COLUMNS)
            inside = ((row >= 0) & (row < M))[:, None] & ((column >= begin) & (column < width))[None, :]
            group, within = row // R, row % R
            values = tl.load(source + (group * source_g + within * source_r)[:, None] + column[None, :] * source_n, mask=inside, other=0)
            place = target + (group * target_g + within * target_r)[:, None] + column[None, :]
            if IN_BLOCKS:
                tl.store(place, encode(values.to(tl.float32), scale, HARDWARE), mask=inside)
            else:
                tl.store(place, values.to(target.dtype.element_ty), mask=inside)
    if CAST == 4 or CAST == 5:
        scales = (bucket + tl.load(part + 13)).to(tl.pointer_type(tl.float32))
        tl.store(scales + down * tl.load(part + 14) + right, scale)


class Launch:
    """The table of one bucket, and its launch. `only_magnitudes`: of the blocks, which go to the parts' given scales."""

    def __init__(self, parts: Sequence[Part], *, only_magnitudes: bool = False) -> None:
        rows: list[list[int]] = []
        num_tiles: list[int] = []
        tiles = 0
        for part in parts:
            if part.source.numel():
                fields, count = _fields(part, tiles, only_magnitudes)
                rows.append(fields)
                num_tiles.append(count)
                tiles += count
        self._kinds = sum(1 << kind for kind in {fields[0] for fields in rows})
        self._num_tiles = sum(num_tiles)
        device = parts[0].source.device
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)
        self._part_of_tile = torch.from_numpy(np.repeat(np.arange(len(rows), dtype=np.int32), num_tiles)).to(device)
        self._hardware = any(part.is_quantised for part in parts) and casts_in_hardware(parts[0].source)

    def pack(self, bucket: torch.Tensor) -> None:
        if self._num_tiles:
            _pack_kernel[self._num_tiles,](
                bucket, self._table, self._part_of_tile, KINDS=self._kinds, HARDWARE=self._hardware, BLOCK=BLOCK, RUN=RUN, num_warps=8
            )


def _fields(part: Part, first_tile: int, only_magnitudes: bool) -> tuple[list[int], int]:
    """A row of the table, and the number of the part's tiles."""
    (groups, rows, size), source, target = loops(part)
    is_run = not part.is_quantised and (size >= RUN or groups * rows < FEW_ROWS)
    cast = _CASTS[part.source.dtype, part.dtype]
    above, left, scales = 0, 0, (0, 0)
    if part.given_scales is not None:
        cast = _MAGNITUDES[part.source.dtype] if only_magnitudes else cast + _GIVEN
        above, left = part.row % BLOCK, part.column % BLOCK
        scales = part.given_scales[part.row // BLOCK :, part.column // BLOCK :].data_ptr(), part.given_scales.stride(0)
    elif part.scale_start is not None:
        scales = part.scale_start, part.scales[1]
    tile = (1, RUN // 2 if cast == 0 else RUN) if is_run else (BLOCK, BLOCK)
    down, across = -(-(above + groups * rows) // tile[0]), -(-(left + size) // tile[1])
    address = part.source.data_ptr()
    multiples = (address, part.start, size, left, *source[:2], *target[:2])
    aligned = (source[2] == 1 or size == 1) and not any(value % ALIGNMENT for value in multiples)
    kind = 4 * cast + 2 * aligned + is_run
    fields = [kind, address, part.start, rows, groups * rows, size, *source, *target[:2], first_tile, across, *scales, above, left]
    return fields, prod((down, across))
