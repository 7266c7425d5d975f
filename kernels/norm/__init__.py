"""RMSNorm with its gradient: one pass over memory forward, one backward.

Shapes: T rows (all leading axes together), H width of the last axis.
"""

from typing import Any

import torch

from tandem.kernels.backend import check_dtype, runs_triton
from tandem.kernels.norm import reference
from tandem.kernels.operators import operator

__all__ = ["rms_norm"]


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (arXiv:1910.07467), in fp32, returned in the dtype of x.

    Args:
        x_TH: [..., H] fp32, bf16 or fp16.
        weight_H: [H], floating point.
        eps: positive.
    Raises: ValueError if the widths or devices differ, or for another dtype.
    """
    check_dtype("x_TH", x_TH)
    check_dtype("weight_H", weight_H)
    if weight_H.shape != x_TH.shape[-1:] or weight_H.device != x_TH.device:
        found = f"weight_H is {tuple(weight_H.shape)} on {weight_H.device} and x_TH {tuple(x_TH.shape)} on {x_TH.device}"
        raise ValueError(f"{found}; the weight must be as long as the last axis of x, on the same device")
    return _forward(x_TH, weight_H, eps)[0]


@operator("rms_norm")
def _forward(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TH, rstd_T1), the latter [..., 1] fp32."""
    return _implementation(x_TH).forward(x_TH, weight_H, eps)


@_forward.register_fake
def _(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x_TH, memory_format=torch.contiguous_format), x_TH.new_empty((*x_TH.shape[:-1], 1), dtype=torch.float32)


@operator("rms_norm_backward")
def _backward(
    grad_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(x_TH).backward(grad_TH, x_TH, weight_H, rstd_T1)


@_backward.register_fake
def _(grad_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x_TH, memory_format=torch.contiguous_format), torch.empty_like(weight_H)


def _implementation(x_TH: torch.Tensor) -> Any:
    if runs_triton(x_TH):
        from tandem.kernels.norm import triton

        return triton
    return reference


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, float], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_TH, weight_H, _ = inputs
    ctx.save_for_backward(x_TH, weight_H, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_TH: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return *_backward(grad_TH, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, keep=_keep)
