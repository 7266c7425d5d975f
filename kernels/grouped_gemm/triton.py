"""Grouped matrix products in Triton. The matrices are found through a table of their addresses.

The number of tiles must be known before the groups' sizes are: a group ends with at most one tile that is not full, so M / ROWS + E
programs always suffice. One small kernel writes which group and row each begins with; those left over end at once.

Shapes as in the package.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tandem.kernels.backend import has_bulk_copies, is_amd

BAND = 8  # tiles of rows whose programs run side by side, so that they share the matrices' tiles in the L2 cache
TABLE_TILES = 32  # entries of the table that one program writes
ALIGNMENT = 16  # bytes of one vector load
AMD_STAGES = 2  # one tile in shared memory, of 64 KiB, and the next one in registers


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Of the output ROWS by COLUMNS, of the axis that is summed DEPTH."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tiles_for(x_MK: torch.Tensor, rows_per_group: float, num_columns: int) -> Tiles:
    """Of a product over rows. A group of few rows would leave most of a tall tile empty; before Hopper a wide one spills registers."""
    dtype, depth = x_MK.dtype, x_MK.shape[1]
    if dtype == torch.float32 or num_columns % 16 or depth % 16:
        # Where rows do not begin at a multiple of 16, elements are loaded one by one: large tiles would not fit into the registers.
        return Tiles(rows=64, columns=64, depth=32, num_warps=4, num_stages=2)
    wide = num_columns > 128 and (has_bulk_copies(x_MK) or is_amd(x_MK))
    num_stages = AMD_STAGES if is_amd(x_MK) else 4
    if rows_per_group <= 64:
        return Tiles(rows=64, columns=128, depth=64, num_warps=4, num_stages=num_stages)
    return Tiles(rows=128, columns=256 if wide else 128, depth=64, num_warps=8, num_stages=num_stages)


def weight_tiles_for(x_MH: torch.Tensor, num_outputs: int) -> Tiles:
    """Of the weights' gradient, ROWS outputs by COLUMNS inputs, summed over a group's rows."""
    num_inputs = x_MH.shape[1]
    if x_MH.dtype == torch.float32 or num_outputs % 16 or num_inputs % 16:
        return Tiles(rows=64, columns=64, depth=32, num_warps=4, num_stages=2)
    columns = 128 if min(num_outputs, num_inputs) <= 128 else 256
    return Tiles(rows=128, columns=columns, depth=64, num_warps=8, num_stages=AMD_STAGES if is_amd(x_MH) else 3)


@triton.jit
def _table_kernel(offsets, tile_group, tile_row, E, num_tiles, ROWS: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr):
    group = tl.arange(0, GROUPS)
    first = tl.load(offsets + group, mask=group < E, other=0)
    last = tl.load(offsets + group + 1, mask=group < E, other=0)
    count = (last - first + ROWS - 1) // ROWS
    ends = tl.cumsum(count, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    # Groups that end before a tile come before its own; one without rows ends where it begins.
    own = tl.sum((tile[:, None] >= ends[None, :]).to(tl.int32), 1)
    start = tl.sum(tl.where(group[None, :] == own[:, None], (first - (ends - count) * ROWS)[None, :], 0), 1)
    inside = tile < num_tiles
    tl.store(tile_group + tile, tl.where(own < GROUPS, own, -1), mask=inside)
    tl.store(tile_row + tile, start + tile * ROWS, mask=inside)


@triton.jit
def _rows_kernel(
    x,
    table,
    offsets,
    tile_group,
    tile_row,
    out,
    num_tiles,
    N,
    K,
    stride_k,
    stride_n,
    ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[m, n] = Σ_k x[m, k] w[k, n] with the group's w, whose strides say whether it is read transposed."""
    per_band = BAND * tl.cdiv(N, COLUMNS)
    first = tl.program_id(0) // per_band * BAND
    height = min(num_tiles - first, BAND)
    within = tl.program_id(0) % per_band
    tile = first + within % height
    group = tl.load(tile_group + tile)
    if group < 0:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, ROWS)
    is_row = row < tl.load(offsets + group + 1)
    column = within // height * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < N
    depth = tl.arange(0, DEPTH)
    weight = tl.multiple_of(tl.load(table + group).to(x.dtype), ALIGN)
    left = x + row.to(tl.int64)[:, None] * K + depth[None, :]
    right = weight + depth[:, None] * stride_k + column[None, :] * stride_n
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, K, DEPTH):
        if EVEN_K:
            a = tl.load(left, mask=is_row[:, None], other=0.0)
            b = tl.load(right, mask=is_column[None, :], other=0.0)
        else:
            is_depth = start + depth < K
            a = tl.load(left, mask=is_row[:, None] & is_depth[None, :], other=0.0)
            b = tl.load(right, mask=is_depth[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += DEPTH
        right += DEPTH * stride_k
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _weights_kernel(
    grad,
    x,
    grad_blocks,
    x_blocks,
    offsets,
    out,
    F,
    H,
    BULK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[e, f, h] = Σ_m grad[m, f] x[m, h] over the group's rows, in their order."""
    group = tl.program_id(1)
    num_across = tl.cdiv(H, COLUMNS)
    first_output, first_column = tl.program_id(0) // num_across * ROWS, tl.program_id(0) % num_across * COLUMNS
    output, column = first_output + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    is_output, is_column = output < F, column < H
    begin, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if BULK:
        end_whole = end - (end - begin) % DEPTH
        for start in range(begin, end_whole, DEPTH):
            a = grad_blocks.load([start, first_output])
            total = tl.dot(a.T, x_blocks.load([start, first_column]), total, input_precision=PRECISION)
        if end_whole < end:
            # The rows behind belong to the next group, whose numbers may be anything.
            is_row = (end_whole + tl.arange(0, DEPTH) < end)[:, None]
            a = tl.where(is_row, grad_blocks.load([end_whole, first_output]), 0.0)
            b = tl.where(is_row, x_blocks.load([end_whole, first_column]), 0.0)
            total = tl.dot(a.T, b, total, input_precision=PRECISION)
    else:
        row = (begin + tl.arange(0, DEPTH)).to(tl.int64)
        left = grad + row[None, :] * F + output[:, None]
        right = x + row[:, None] * H + column[None, :]
        for start in range(begin, end, DEPTH):
            is_row = start + tl.arange(0, DEPTH) < end
            a = tl.load(left, mask=is_output[:, None] & is_row[None, :], other=0.0)
            b = tl.load(right, mask=is_row[:, None] & is_column[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            left += DEPTH * F
            right += DEPTH * H
    place = (group.to(tl.int64) * F + output[:, None]) * H + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_output[:, None] & is_column[None, :])


def _precision(dtype: torch.dtype) -> str:
    """fp32 is not rounded to tf32; the others ignore it."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _fits_bulk_copies(rows_MK: torch.Tensor) -> bool:
    """Whether blocks of it are copied in bulk: 16-bit numbers (tiles of fp32 are small), whose rows begin at multiples of 16 bytes."""
    places = rows_MK.data_ptr(), rows_MK.shape[1] * rows_MK.element_size()
    fits = rows_MK.element_size() == 2 and all(place % ALIGNMENT == 0 for place in places)
    return fits and len(rows_MK) > 0 and has_bulk_copies(rows_MK)


def _blocks(rows_MK: torch.Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    return TensorDescriptor(rows_MK, list(rows_MK.shape), [rows_MK.shape[1], 1], [num_rows, num_columns])


def _addresses(weights_EFH: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """[E] int64 on the device of the matrices, and the bytes that all addresses are a multiple of."""
    addresses = [weight_FH.data_ptr() for weight_FH in weights_EFH]
    table_E = torch.tensor(addresses, dtype=torch.int64)
    device = weights_EFH[0].device
    if device.type == "cuda":
        table_E = table_E.pin_memory()  # copied without waiting
    aligned = all(address % ALIGNMENT == 0 for address in addresses)
    return table_E.to(device, non_blocking=True), ALIGNMENT if aligned else weights_EFH[0].element_size()


def _product(x_MK: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    x_MK = x_MK.contiguous()
    num_rows, num_groups = len(x_MK), len(weights_EFH)
    num_outputs, num_inputs = weights_EFH[0].shape
    depth, columns = (num_inputs, num_outputs) if transposed else (num_outputs, num_inputs)
    out_MN = x_MK.new_empty((num_rows, columns))
    if not out_MN.numel():
        return out_MN
    tiles = tiles_for(x_MK, num_rows / num_groups, columns)
    num_tiles = triton.cdiv(num_rows, tiles.rows) + min(num_groups, num_rows)
    tile_group, tile_row = (torch.empty(num_tiles, dtype=torch.int32, device=x_MK.device) for _ in range(2))
    _table_kernel[(triton.cdiv(num_tiles, TABLE_TILES),)](
        offsets_E1,
        tile_group,
        tile_row,
        num_groups,
        num_tiles,
        ROWS=tiles.rows,
        GROUPS=triton.next_power_of_2(num_groups),
        TILES=TABLE_TILES,
    )
    table_E, alignment = _addresses(weights_EFH)
    _rows_kernel[(num_tiles * triton.cdiv(columns, tiles.columns),)](
        x_MK,
        table_E,
        offsets_E1,
        tile_group,
        tile_row,
        out_MN,
        num_tiles,
        columns,
        depth,
        1 if transposed else num_inputs,
        num_inputs if transposed else 1,
        ALIGN=alignment,
        EVEN_K=depth % tiles.depth == 0,
        PRECISION=_precision(x_MK.dtype),
        BAND=BAND,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out_MN


def forward(x_MH: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    """[M, F]."""
    return _product(x_MH, weights_EFH, offsets_E1, transposed=True)


def grad_rows(grad_MF: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    """[M, H]."""
    return _product(grad_MF, weights_EFH, offsets_E1, transposed=False)


def grad_weights(grad_MF: torch.Tensor, x_MH: torch.Tensor, offsets_E1: torch.Tensor) -> torch.Tensor:
    """[E, F, H] in the dtype of x."""
    grad_MF, x_MH = grad_MF.contiguous(), x_MH.contiguous()
    num_outputs, num_inputs, num_groups = grad_MF.shape[1], x_MH.shape[1], len(offsets_E1) - 1
    grads_EFH = x_MH.new_empty((num_groups, num_outputs, num_inputs))
    tiles = weight_tiles_for(x_MH, num_outputs)
    bulk = _fits_bulk_copies(grad_MF) and _fits_bulk_copies(x_MH)
    if grads_EFH.numel():
        _weights_kernel[(triton.cdiv(num_outputs, tiles.rows) * triton.cdiv(num_inputs, tiles.columns), num_groups)](
            grad_MF,
            x_MH,
            _blocks(grad_MF, tiles.depth, tiles.rows) if bulk else None,
            _blocks(x_MH, tiles.depth, tiles.columns) if bulk else None,
            offsets_E1,
            grads_EFH,
            num_outputs,
            num_inputs,
            BULK=bulk,
            PRECISION=_precision(x_MH.dtype),
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return grads_EFH
