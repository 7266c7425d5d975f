"""SwiGLU with its gradient, each in one pass over memory.

Shapes: T rows (all leading axes together), F feed-forward width.
"""

from typing import Any

import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.swiglu import reference

__all__ = ["swiglu"]


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
