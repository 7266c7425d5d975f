"""RMSNorm in Triton. Rows stay in registers; the weight's gradient is summed in a fixed order, without atomics.

Shapes as in the package, with the leading axes of x flattened to T rows.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl

ELEMENTS_PER_TILE = 4096  # a tile holds one row, or several short ones
MAX_PROGRAMS = 1024  # of the backward pass; each keeps a part of the weight's gradient


def _tile(width: int) -> tuple[int, int]:
    """(rows of a tile, padded width)."""
    padded = 1 << max(0, width - 1).bit_length()
    return max(1, ELEMENTS_PER_TILE // padded), padded


def _num_warps(width: int) -> int:
    return 4 if width <= 4096 else 8 if width <= 8192 else 16


@triton.jit
def _forward_kernel(x, weight, out, rstd, num_rows, eps, H: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < num_rows) & (column[None, :] < H)
    place = row[:, None] * H + column[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1) / H + eps)
    gain = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(out + place, (values * scale[:, None] * gain[None, :]).to(out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale, mask=row < num_rows)


@triton.jit
def _backward_kernel(
    grad, x, weight, rstd, grad_x, grad_weight, num_rows, num_programs, H: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    column = tl.arange(0, WIDTH)
    # A row of a tile for itself, added up once: a sum over the rows of every tile would be one over all warps.
    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, num_rows, num_programs * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row[:, None] < num_rows) & (column[None, :] < H)
        place = row[:, None] * H + column[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        normed = values * scale
        total += above * normed
        # Read again for every tile: it is in the cache, and registers are what a wide row lacks.
        above = above * tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
        mean = tl.sum(above * normed, 1) / H
        tl.store(grad_x + place, ((above - normed * mean[:, None]) * scale).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + tl.program_id(0).to(tl.int64) * H + column, tl.sum(total, 0), mask=column < H)


def forward(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TH, rstd_T1)."""
    x_TH = x_TH.contiguous()
    width = x_TH.shape[-1]
    num_rows = x_TH.numel() // max(1, width)
    out_TH, rstd_T1 = torch.empty_like(x_TH), x_TH.new_empty((*x_TH.shape[:-1], 1), dtype=torch.float32)
    rows, padded = _tile(width)
    if num_rows:
        grid = (triton.cdiv(num_rows, rows),)
        _forward_kernel[grid](
            x_TH, weight_H.contiguous(), out_TH, rstd_T1, num_rows, eps, H=width, ROWS=rows, WIDTH=padded, num_warps=_num_warps(width)
        )
    return out_TH, rstd_T1


def backward(grad_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of the weight."""
    grad_TH, x_TH = grad_TH.contiguous(), x_TH.contiguous()
    width, num_rows = x_TH.shape[-1], rstd_T1.numel()
    grad_x_TH = torch.empty_like(x_TH)
    rows, padded = _tile(width)
    num_programs = min(MAX_PROGRAMS, max(1, triton.cdiv(num_rows, rows)))
    parts_PH = torch.zeros(num_programs, width, dtype=torch.float32, device=x_TH.device)
    if num_rows:
        _backward_kernel[(num_programs,)](
            grad_TH,
            x_TH,
            weight_H.contiguous(),
            rstd_T1,
            grad_x_TH,
            parts_PH,
            num_rows,
            num_programs,
            H=width,
            ROWS=rows,
            WIDTH=padded,
            num_warps=_num_warps(width),
        )
    return grad_x_TH, parts_PH.sum(0).to(weight_H.dtype)
