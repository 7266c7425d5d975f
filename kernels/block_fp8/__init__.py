"""Matrices as 8-bit floats (e4m3) with one fp32 scale for each block of 128 x 128, as DeepSeek-V3's weights are stored.

    scale = amax of the block / 448, at least 2^-126; 1 for a block of zeros          weight ≈ fp8 * scale
    fp8 = weight * (1 / scale), rounded to nearest even

Blocks at the right and the bottom edge may be smaller. `kernels/block_fp8/triton.py` has the same formula for use within Triton
kernels, which agree with this one bit for bit (but for the sign of a NaN). Shapes: matrix [M, N].
"""

import torch

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
    scale = torch.empty(scale_shape(num_rows, num_columns), dtype=torch.float32, device=weight_MN.device)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = weight_MN[start : start + _ROWS_AT_ONCE].float()
        blocks = slice(start // BLOCK, start // BLOCK + -(-len(rows) // BLOCK))
        scale[blocks] = _scales(rows)
        inverse = scale[blocks].reciprocal().repeat_interleave(BLOCK, 0)[: len(rows)].repeat_interleave(BLOCK, 1)[:, :num_columns]
        # Only where 1 / scale was rounded up can a product exceed 448, by less than what rounds to it; infinities become NaN.
        out_MN[start : start + len(rows)] = (rows * inverse).clamp(-LARGEST, LARGEST).to(out_MN.dtype)
    return out_MN, scale


def _scales(rows_MN: torch.Tensor) -> torch.Tensor:
    padding = (0, -rows_MN.shape[1] % BLOCK, 0, -rows_MN.shape[0] % BLOCK)
    padded = torch.nn.functional.pad(rows_MN.abs(), padding)
    amax = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax(dim=(1, 3))
    # By a tensor: on a GPU torch multiplies by the reciprocal of a number, which rounds differently.
    scale = (amax / torch.full_like(amax, LARGEST)).clamp(min=SMALLEST_SCALE)
    return torch.where(amax == 0, 1.0, scale)


def dequantise(fp8_MN: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[M, N] fp32: what the block-scaled form stands for."""
    num_rows, num_columns = fp8_MN.shape
    wanted = scale_shape(num_rows, num_columns)
    if scale.shape != wanted:
        raise ValueError(f"scale is {tuple(scale.shape)}; a matrix of {num_rows} x {num_columns} has scales {wanted}")
    return fp8_MN.float() * scale.repeat_interleave(BLOCK, 0)[:num_rows].repeat_interleave(BLOCK, 1)[:, :num_columns]
