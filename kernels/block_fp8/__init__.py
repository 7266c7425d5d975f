"""Matrices as 8-bit floats (e4m3) with one fp32 scale for each block of 128 x 128, as DeepSeek-V3's weights are stored.

    scale = amax of the block / 448, at least 2^-126; 1 for a block of zeros          weight ≈ fp8 * scale
    fp8 = weight * (1 / scale), rounded to nearest even

Blocks at the right and the bottom edge may be smaller. Where several parts of a matrix share blocks, `largest_magnitudes` of all of them
come first, then `scales_of` those, then `encode` part by part: the bytes are those of `quantise`. `kernels/block_fp8/triton.py` has the
same formula for use within Triton kernels, and csrc/block_fp8.cpp for a CPU; they agree with this one bit for bit (but for the sign of a
NaN). Shapes: matrix [M, N].
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import torch

from tandem.kernels.backend import runs_native
from tandem.kernels.native import address, library_for

BLOCK = 128
LARGEST = 448.0  # finite e4m3 value
SMALLEST_SCALE = 2.0**-126  # the smallest normal number: its reciprocal is finite
_ROWS_AT_ONCE = 32 * BLOCK  # bounds the fp32 copies


def scale_shape(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Of a matrix of this size."""
    return -(-num_rows // BLOCK), -(-num_columns // BLOCK)


def quantise(weight_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The block-scaled form of a matrix, computed in fp32.

    Args:
        weight_MN: [M, N] fp32, bf16 or fp16, of any strides. A block with an infinite element or a NaN has such a scale too.
    Returns: [M, N] float8_e4m3fn, and the scales [ceil(M / 128), ceil(N / 128)] fp32.
    Raises: ValueError for another dtype or number of dimensions.
    """
    if weight_MN.dim() != 2 or weight_MN.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = f"{tuple(weight_MN.shape)} {weight_MN.dtype}"
        raise ValueError(f"weight_MN is {found}; blocks of 128 x 128 need a matrix [M, N] of float32, bfloat16 or float16")
    num_rows, num_columns = weight_MN.shape
    out_MN = torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn, device=weight_MN.device)
    largest = torch.zeros(scale_shape(num_rows, num_columns), dtype=torch.float32, device=weight_MN.device)
    largest_magnitudes(weight_MN, largest)
    scale = scales_of(largest)
    encode(weight_MN, scale, out_MN)
    return out_MN, scale


def largest_magnitudes(weight_MN: torch.Tensor, largest: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
    """Raise the number of every block to the largest |element| that it has in this part of a matrix.

    Args:
        weight_MN: [M, N] fp32, bf16 or fp16, of any strides: rows `row`, `row` + 1, … and columns `column`, … of the matrix.
        largest: fp32, one number for each block of the whole matrix. Becomes infinite, or NaN, where an element is.
    """
    library = _library_for(weight_MN, largest)
    if library is not None:
        library.tandem_largest_magnitudes(*_part(weight_MN, row, column), address(largest), ctypes.c_int64(largest.stride(0)))
        return
    for rows, first in _slabs(weight_MN, row):
        padding = (column % BLOCK, -(column + rows.shape[1]) % BLOCK, first % BLOCK, -(first + len(rows)) % BLOCK)
        found = torch.nn.functional.pad(rows.abs(), padding).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax(dim=(1, 3))
        blocks = largest[first // BLOCK :, column // BLOCK :][: found.shape[0], : found.shape[1]]
        torch.maximum(blocks, found, out=blocks)


def scales_of(largest: torch.Tensor) -> torch.Tensor:
    """The scales of blocks with these largest magnitudes: fp32, of any shape."""
    # By a tensor: on a GPU torch multiplies by the reciprocal of a number, which rounds differently.
    scale = (largest / torch.full_like(largest, LARGEST)).clamp(min=SMALLEST_SCALE)
    return torch.where(largest == 0, 1.0, scale)


def encode(weight_MN: torch.Tensor, scale: torch.Tensor, out_MN: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
    """Write part of a matrix with known scales.

    Args:
        weight_MN, row, column: see `largest_magnitudes`.
        scale: fp32, of all blocks of the whole matrix.
        out_MN: [M, N] float8_e4m3fn, of any strides.
    """
    library = _library_for(weight_MN, scale)
    if library is not None and out_MN.stride(-1) == 1:
        place = address(out_MN), ctypes.c_int64(out_MN.stride(0))
        library.tandem_encode_blocks(*_part(weight_MN, row, column), address(scale), ctypes.c_int64(scale.stride(0)), *place)
        return
    inverse = scale.reciprocal()
    done = 0
    for rows, first in _slabs(weight_MN, row):
        of_rows = torch.arange(first, first + len(rows), device=scale.device) // BLOCK
        of_columns = torch.arange(column, column + rows.shape[1], device=scale.device) // BLOCK
        # Only where 1 / scale was rounded up can a product exceed 448, by less than what rounds to it; infinities become NaN.
        values = (rows * inverse[of_rows][:, of_columns]).clamp(-LARGEST, LARGEST)
        out_MN[done : done + len(rows)] = values.to(out_MN.dtype)
        done += len(rows)


def _slabs(weight_MN: torch.Tensor, row: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Rows in fp32, and the number of the first of them; no block is in two slabs."""
    first, last = row, row + weight_MN.shape[0]
    while first < last:
        stop = min(last, (first // _ROWS_AT_ONCE + 1) * _ROWS_AT_ONCE)
        yield weight_MN[first - row : stop - row].float(), first
        first = stop


def _library_for(weight_MN: torch.Tensor, blocks: torch.Tensor) -> ctypes.CDLL | None:
    """The compiled twin of what follows, where there is one for these tensors."""
    plain = weight_MN.device.type == "cpu" and weight_MN.dtype in (torch.float32, torch.bfloat16) and blocks.stride(-1) == 1
    return library_for(weight_MN) if plain and (weight_MN.stride(-1) == 1 or not weight_MN.numel()) and runs_native(weight_MN) else None


def _part(weight_MN: torch.Tensor, row: int, column: int) -> tuple[Any, ...]:
    """A part of a matrix, as C takes it."""
    numbers = (*weight_MN.shape, weight_MN.stride(0), row, column)
    return address(weight_MN), int(weight_MN.dtype == torch.bfloat16), *map(ctypes.c_int64, numbers)


def dequantise(fp8_MN: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[M, N] fp32: what the block-scaled form stands for."""
    num_rows, num_columns = fp8_MN.shape
    wanted = scale_shape(num_rows, num_columns)
    if scale.shape != wanted:
        raise ValueError(f"scale is {tuple(scale.shape)}; a matrix of {num_rows} x {num_columns} has scales {wanted}")
    return fp8_MN.float() * scale.repeat_interleave(BLOCK, 0)[:num_rows].repeat_interleave(BLOCK, 1)[:, :num_columns]
