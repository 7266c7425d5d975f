"""SwiGLU with its gradient, each in one pass over memory.

Shapes: T rows (all leading axes together), F feed-forward width.
"""

from typing import Any

import torch

from tandem.kernels.backend import check_dtype, runs_triton
from tandem.kernels.operators import operator
from tandem.kernels.swiglu import reference

__all__ = ["swiglu", "weighted_swiglu"]


def swiglu(x_T2F: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last axis (arXiv:2002.05202), in the dtype of x: fp32, bf16 or fp16.

    Raises: ValueError if the last axis is odd, or for another dtype.
    """
    check_dtype("x_T2F", x_T2F)
    if x_T2F.shape[-1] % 2:
        raise ValueError(f"x_T2F is {tuple(x_T2F.shape)}; its last axis must hold gate and up, so it must be even")
    return _forward(x_T2F)


def weighted_swiglu(x_T2F: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """swiglu(x) times one factor for each row, rounded once: what an expert does between its two matrices.

    Args:
        x_T2F: [T, 2F] fp32, bf16 or fp16.
        weights_T: [T] fp32. Both get gradients.
    Raises: ValueError if the shapes, the dtypes or the devices do not fit.
    """
    check_dtype("x_T2F", x_T2F)
    if x_T2F.dim() != 2 or x_T2F.shape[-1] % 2:
        raise ValueError(f"x_T2F is {tuple(x_T2F.shape)}; it must be [T, 2F], gate and up of T rows")
    if weights_T.shape != x_T2F.shape[:1] or weights_T.dtype != torch.float32 or weights_T.device != x_T2F.device:
        found = f"{tuple(weights_T.shape)} {weights_T.dtype} on {weights_T.device}"
        raise ValueError(f"weights_T is {found}; it must be ({len(x_T2F)},) torch.float32 on {x_T2F.device}, one for each row of x_T2F")
    return _weighted_forward(x_T2F, weights_T)


@operator("swiglu")
def _forward(x_T2F: torch.Tensor) -> torch.Tensor:
    return _implementation(x_T2F).forward(x_T2F)


@operator("swiglu_backward")
def _backward(grad_TF: torch.Tensor, x_T2F: torch.Tensor) -> torch.Tensor:
    return _implementation(x_T2F).backward(grad_TF, x_T2F)


@operator("weighted_swiglu")
def _weighted_forward(x_T2F: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    return _implementation(x_T2F).weighted_forward(x_T2F, weights_T)


@operator("weighted_swiglu_backward")
def _weighted_backward(grad_TF: torch.Tensor, x_T2F: torch.Tensor, weights_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(x_T2F).weighted_backward(grad_TF, x_T2F, weights_T)


def _implementation(x_T2F: torch.Tensor) -> Any:
    if runs_triton(x_T2F):
        from tandem.kernels.swiglu import triton

        return triton
    return reference


@_forward.register_fake
@_weighted_forward.register_fake
def _(x_T2F: torch.Tensor, *_: Any) -> torch.Tensor:
    return x_T2F.new_empty((*x_T2F.shape[:-1], x_T2F.shape[-1] // 2))


@_backward.register_fake
def _(grad_TF: torch.Tensor, x_T2F: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x_T2F)


@_weighted_backward.register_fake
def _(grad_TF: torch.Tensor, x_T2F: torch.Tensor, weights_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x_T2F), torch.empty_like(weights_T)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


_forward.register_autograd(lambda ctx, grad_TF: _backward(grad_TF, *ctx.saved_tensors), keep=_keep)
_weighted_forward.register_autograd(lambda ctx, grad_TF: _weighted_backward(grad_TF, *ctx.saved_tensors), keep=_keep)
