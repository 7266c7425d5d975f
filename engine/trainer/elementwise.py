"""Norm, rotary embedding and SwiGLU with hand-written gradients: few passes over memory in plain torch, on any device.

Shapes: T tokens, N heads, D head width, H width of the last axis, F feed-forward width.
"""

from typing import Any

import torch


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        x32_TH = x_TH.float()
        rstd_T1 = torch.linalg.vecdot(x32_TH, x32_TH)[..., None].div_(x_TH.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TH, weight_H, rstd_T1)
        return (x32_TH * rstd_T1).mul_(weight_H).to(x_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_TH,) = grad_outputs
        x_TH, weight_H, rstd_T1 = ctx.saved_tensors
        grad32_TH, x32_TH, weight32_H = grad_TH.float(), x_TH.float(), weight_H.float()
        width = x_TH.shape[-1]
        product_TH = (grad32_TH * x32_TH).view(-1, width)
        dot_T = product_TH @ weight32_H
        grad_weight_H = rstd_T1.view(-1) @ product_TH
        grad_x_TH = (grad32_TH * weight32_H).mul_(rstd_T1)
        grad_x_TH.addcmul_(x32_TH, (dot_T.view(rstd_T1.shape) * rstd_T1.pow(3)).div_(width), value=-1)
        return grad_x_TH.to(x_TH.dtype), grad_weight_H.to(weight_H.dtype), None


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis, in fp32, returned in the dtype of x."""
    return _RMSNorm.apply(x_TH, weight_H, eps)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return _rotate(x_TND, cos_T1D, sin_T1D)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_TND,) = grad_outputs
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _rotate(grad_TND, cos_T1D, -sin_T1D), None, None


def _rotate(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    first, second = x_TND.float().chunk(2, dim=-1)
    out = torch.empty(x_TND.shape, dtype=torch.float32, device=x_TND.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos_T1D, out=out_first).addcmul_(second, sin_T1D, value=-1)
    torch.mul(second, cos_T1D, out=out_second).addcmul_(first, sin_T1D)
    return out.to(x_TND.dtype)


def rope(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) by the angles whose cosine and sine are [T, 1, D/2] fp32, in fp32."""
    return _Rope.apply(x_TND, cos_T1D, sin_T1D)


def interleaved_rope(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """As `rope` for pairs (x[2d], x[2d + 1]). The result has the first of every pair in its first half, the second in its second.

    Queries and keys are laid out alike, so their products are those of the rotation in place.
    """
    return rope(x_TND.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos_T1D, sin_T1D)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T2F: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_T2F)
        gate, up = x_T2F.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_TF,) = grad_outputs
        (x_T2F,) = ctx.saved_tensors
        gate, up = x_T2F.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_T2F = torch.empty_like(x_T2F)
        grad_gate, grad_up = grad_T2F.chunk(2, dim=-1)
        torch.mul(grad_TF, silu, out=grad_up)
        # silu' = sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)
        torch.mul(slope.mul_(up), grad_TF, out=grad_gate)
        return grad_T2F


def swiglu(x_T2F: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last axis."""
    return _SwiGLU.apply(x_T2F)
