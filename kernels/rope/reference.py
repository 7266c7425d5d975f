"""Rotary embedding in few passes of plain torch. Shapes as in the package."""

import torch


def rotate(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """[T, N, D]."""
    first, second = x_TND.float().chunk(2, dim=-1)
    out = torch.empty(x_TND.shape, dtype=torch.float32, device=x_TND.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos_T1D, out=out_first).addcmul_(second, sin_T1D, value=-1)
    torch.mul(second, cos_T1D, out=out_second).addcmul_(first, sin_T1D)
    return out.to(x_TND.dtype)
