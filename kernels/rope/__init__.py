"""Rotary embedding with its gradient, which is the rotation back.

Shapes: T tokens, N heads, D head width.
"""

from typing import Any

import torch

from tandem.kernels.backend import check_dtype, runs_triton
from tandem.kernels.operators import operator
from tandem.kernels.rope import reference

__all__ = ["interleaved_rope", "rope"]


def rope(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) by the angles whose cosine and sine are given (arXiv:2104.09864), in fp32.

    Args:
        x_TND: [T, N, D] fp32, bf16 or fp16; a view with any strides of tokens and heads.
        cos_T1D, sin_T1D: [T, 1, D/2] fp32.
    Returns: [T, N, D] in the dtype of x, contiguous.
    Raises: ValueError if shapes, dtypes or devices do not fit.
    """
    check_dtype("x_TND", x_TND)
    need = (x_TND.shape[0], 1, x_TND.shape[-1] // 2)
    if x_TND.shape[-1] % 2 or tuple(cos_T1D.shape) != need or tuple(sin_T1D.shape) != need:
        shapes = f"x_TND {tuple(x_TND.shape)}, cos_T1D {tuple(cos_T1D.shape)}, sin_T1D {tuple(sin_T1D.shape)}"
        raise ValueError(f"{shapes} do not fit: need [T, N, D], [T, 1, D/2], [T, 1, D/2] with an even D")
    for name, angles_T1D in (("cos_T1D", cos_T1D), ("sin_T1D", sin_T1D)):
        if angles_T1D.dtype != torch.float32 or angles_T1D.device != x_TND.device:
            raise ValueError(f"{name} is {angles_T1D.dtype} on {angles_T1D.device}; it must be torch.float32 on {x_TND.device}, as x_TND")
    return _rotate(x_TND, cos_T1D, sin_T1D, False)


def interleaved_rope(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """As `rope` for pairs (x[2d], x[2d + 1]). The result has the first of every pair in its first half, the second in its second.

    Queries and keys are laid out alike, so their products are those of the rotation in place.
    """
    return rope(x_TND.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos_T1D, sin_T1D)


@operator("rope")
def _rotate(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor, back: bool) -> torch.Tensor:
    if runs_triton(x_TND):
        from tandem.kernels.rope import triton

        return triton.rotate(x_TND, cos_T1D, sin_T1D, back=back)
    return reference.rotate(x_TND, cos_T1D, -sin_T1D if back else sin_T1D)


@_rotate.register_fake
def _(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor, back: bool) -> torch.Tensor:
    return torch.empty_like(x_TND, memory_format=torch.contiguous_format)


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos_T1D, sin_T1D, ctx.back = inputs
    ctx.save_for_backward(cos_T1D, sin_T1D)


def _turned_back(ctx: Any, grad_TND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _rotate(grad_TND, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_turned_back, keep=_keep_angles)
