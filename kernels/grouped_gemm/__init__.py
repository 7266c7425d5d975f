"""The matrices of many experts on rows that are grouped by expert, with both gradients: one launch each, whatever the groups' sizes.

Shapes: M rows, E experts, H inputs and F outputs of each matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.grouped_gemm import reference
from tandem.kernels.operators import operator

__all__ = ["grouped_linear"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x_MH: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    """[M, F]: the rows offsets[e] to offsets[e + 1] times the transpose of matrix e. Summed in fp32, the same bits in every run.

    The matrices need not lie side by side: a layer's experts may be parameters of their own. On a GPU nothing waits for the offsets.

    Args:
        x_MH: [M, H] fp32, bf16 or fp16.
        weights_EFH: E contiguous matrices [F, H] of the same dtype and device; each gets its gradient, 0 for an expert without rows.
        offsets_E1: [E + 1] int32, rising from 0 to M. Their values are looked at on a CPU only: on a GPU that would wait for the device.
    Raises: ValueError if shapes, dtypes or devices do not fit.
    """
    _check(x_MH, weights_EFH, offsets_E1)
    return _forward(x_MH, weights_EFH, offsets_E1)


def _check(x_MH: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> None:
    if x_MH.dim() != 2 or x_MH.dtype not in DTYPES:
        raise ValueError(f"x_MH is {tuple(x_MH.shape)} {x_MH.dtype}; it must be [M, H] of fp32, bf16 or fp16")
    if not weights_EFH:
        raise ValueError("weights_EFH is empty; there must be at least one matrix")
    shape = (weights_EFH[0].shape[0], x_MH.shape[1])
    for i, weight_FH in enumerate(weights_EFH):
        if weight_FH.shape != shape or weight_FH.dtype != x_MH.dtype or weight_FH.device != x_MH.device or not weight_FH.is_contiguous():
            found = f"{tuple(weight_FH.shape)} {weight_FH.dtype} on {weight_FH.device}"
            wanted = f"{shape} {x_MH.dtype} on {x_MH.device}, like x_MH and the first matrix, and contiguous"
            raise ValueError(f"weights_EFH[{i}] is {found}; it must be {wanted}")
    if offsets_E1.shape != (len(weights_EFH) + 1,) or offsets_E1.dtype != torch.int32 or offsets_E1.device != x_MH.device:
        found = f"{tuple(offsets_E1.shape)} {offsets_E1.dtype} on {offsets_E1.device}"
        raise ValueError(f"offsets_E1 is {found}; {len(weights_EFH)} matrices need [{len(weights_EFH) + 1}] torch.int32 on {x_MH.device}")
    if offsets_E1.device.type == "cpu":
        ends = offsets_E1.tolist()
        if ends[0] != 0 or ends[-1] != len(x_MH) or ends != sorted(ends):
            raise ValueError(f"offsets_E1 is {ends[:8]}…, ending at {ends[-1]}; it must rise from 0 to {len(x_MH)}, the rows of x_MH")


@operator("grouped_linear")
def _forward(x_MH: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    return _implementation(x_MH).forward(x_MH, weights_EFH, offsets_E1)


@operator("grouped_linear_grad_rows")
def _grad_rows(grad_MF: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    return _implementation(grad_MF).grad_rows(grad_MF, weights_EFH, offsets_E1)


@operator("grouped_linear_grad_weights")
def _grad_weights(grad_MF: torch.Tensor, x_MH: torch.Tensor, offsets_E1: torch.Tensor) -> torch.Tensor:
    return _implementation(x_MH).grad_weights(grad_MF, x_MH, offsets_E1)


def _implementation(x_MH: torch.Tensor) -> Any:
    if runs_triton(x_MH):
        from tandem.kernels.grouped_gemm import triton

        return triton
    return reference


@_forward.register_fake
def _(x_MH: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    return x_MH.new_empty((len(x_MH), len(weights_EFH[0])))


@_grad_rows.register_fake
def _(grad_MF: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    return grad_MF.new_empty((len(grad_MF), weights_EFH[0].shape[1]))


@_grad_weights.register_fake
def _(grad_MF: torch.Tensor, x_MH: torch.Tensor, offsets_E1: torch.Tensor) -> torch.Tensor:
    return x_MH.new_empty((len(offsets_E1) - 1, grad_MF.shape[1], x_MH.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x_MH, weights_EFH, offsets_E1 = inputs
    ctx.save_for_backward(x_MH, offsets_E1, *weights_EFH)


def _gradients(ctx: Any, grad_MF: torch.Tensor) -> tuple[torch.Tensor | Sequence[torch.Tensor | None] | None, ...]:
    x_MH, offsets_E1, *weights_EFH = ctx.saved_tensors
    needs_x, need_weights, _ = ctx.needs_input_grad
    grad_MH = _grad_rows(grad_MF, weights_EFH, offsets_E1) if needs_x else None
    if not any(need_weights):
        return grad_MH, [None] * len(weights_EFH), None
    grads_EFH = _grad_weights(grad_MF, x_MH, offsets_E1)
    return grad_MH, [grads_EFH[e] if needs else None for e, needs in enumerate(need_weights)], None


_forward.register_autograd(_gradients, keep=_keep)
