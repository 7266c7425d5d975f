"""SwiGLU with its gradient, each in one pass over memory.

Shapes: T rows (all leading axes together), F feed-forward width.
"""

from typing import Any

import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.swiglu import reference

__all__ = ["swiglu", "weighted_swiglu"]


def swiglu(x_T2F: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last axis (arXiv:2002.05202), in the dtype of x: fp32, bf16 or fp16.

    Raises: ValueError if the last axis is odd.
    """
    if x_T2F.shape[-1] % 2:
        raise ValueError(f"x_T2F is {tuple(x_T2F.shape)}; its last axis must hold gate and up, so it must be even")
    return _SwiGLU.apply(x_T2F)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T2F: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_T2F)
        if runs_triton(x_T2F):
            from tandem.kernels.swiglu import triton

            return triton.forward(x_T2F)
        return reference.forward(x_T2F)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (x_T2F,) = ctx.saved_tensors
        if runs_triton(x_T2F):
            from tandem.kernels.swiglu import triton

            return triton.backward(grad_outputs[0], x_T2F)
        return reference.backward(grad_outputs[0], x_T2F)


def weighted_swiglu(x_T2F: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """swiglu(x) times one factor for each row, rounded once: what an expert does between its two matrices.

    Args:
        x_T2F: [T, 2F] fp32, bf16 or fp16.
        weights_T: [T] fp32. Both get gradients.
    Raises: ValueError if the shapes, the weights' dtype or the devices do not fit.
    """
    if x_T2F.dim() != 2 or x_T2F.shape[-1] % 2:
        raise ValueError(f"x_T2F is {tuple(x_T2F.shape)}; it must be [T, 2F], gate and up of T rows")
    if weights_T.shape != x_T2F.shape[:1] or weights_T.dtype != torch.float32 or weights_T.device != x_T2F.device:
        found = f"{tuple(weights_T.shape)} {weights_T.dtype} on {weights_T.device}"
        raise ValueError(f"weights_T is {found}; it must be ({len(x_T2F)},) torch.float32 on {x_T2F.device}, one for each row of x_T2F")
    return _WeightedSwiGLU.apply(x_T2F, weights_T)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T2F: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_T2F, weights_T)
        if runs_triton(x_T2F):
            from tandem.kernels.swiglu import triton

            return triton.weighted_forward(x_T2F, weights_T)
        return reference.weighted_forward(x_T2F, weights_T)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x_T2F, weights_T = ctx.saved_tensors
        if runs_triton(x_T2F):
            from tandem.kernels.swiglu import triton

            return triton.weighted_backward(grad_outputs[0], x_T2F, weights_T)
        return reference.weighted_backward(grad_outputs[0], x_T2F, weights_T)
