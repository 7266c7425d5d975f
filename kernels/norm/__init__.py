"""RMSNorm with its gradient: one pass over memory forward, one backward.

Shapes: T rows (all leading axes together), H width of the last axis.
"""

from typing import Any

import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.norm import reference

__all__ = ["rms_norm"]


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (arXiv:1910.07467), in fp32, returned in the dtype of x.

    Args:
        x_TH: [..., H] fp32, bf16 or fp16.
        weight_H: [H], floating point.
        eps: positive.
    Raises: ValueError if the widths or devices differ.
    """
    if weight_H.shape != x_TH.shape[-1:] or weight_H.device != x_TH.device:
        found = f"weight_H is {tuple(weight_H.shape)} on {weight_H.device} and x_TH {tuple(x_TH.shape)} on {x_TH.device}"
        raise ValueError(f"{found}; the weight must be as long as the last axis of x, on the same device")
    return _RMSNorm.apply(x_TH, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        if runs_triton(x_TH):
            from tandem.kernels.norm import triton

            out_TH, rstd_T = triton.forward(x_TH, weight_H, eps)
        else:
            out_TH, rstd_T = reference.forward(x_TH, weight_H, eps)
        ctx.save_for_backward(x_TH, weight_H, rstd_T)
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x_TH, weight_H, rstd_T = ctx.saved_tensors
        if runs_triton(x_TH):
            from tandem.kernels.norm import triton

            return *triton.backward(grad_outputs[0], x_TH, weight_H, rstd_T), None
        return *reference.backward(grad_outputs[0], x_TH, weight_H, rstd_T), None
