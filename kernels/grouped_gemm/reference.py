"""Grouped matrix products in plain torch: one large product per expert. It reads the offsets, so on a GPU it waits for them.

Shapes as in the package.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch


def _groups(offsets_E1: torch.Tensor) -> Iterator[slice]:
    return itertools.starmap(slice, itertools.pairwise(offsets_E1.tolist()))


def forward(x_MH: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    """[M, F]."""
    out_MF = x_MH.new_empty((len(x_MH), len(weights_EFH[0])))
    for weight_FH, rows in zip(weights_EFH, _groups(offsets_E1), strict=True):
        torch.mm(x_MH[rows], weight_FH.T, out=out_MF[rows])
    return out_MF


def grad_rows(grad_MF: torch.Tensor, weights_EFH: Sequence[torch.Tensor], offsets_E1: torch.Tensor) -> torch.Tensor:
    """[M, H]."""
    grad_MH = grad_MF.new_empty((len(grad_MF), weights_EFH[0].shape[1]))
    for weight_FH, rows in zip(weights_EFH, _groups(offsets_E1), strict=True):
        torch.mm(grad_MF[rows], weight_FH, out=grad_MH[rows])
    return grad_MH


def grad_weights(grad_MF: torch.Tensor, x_MH: torch.Tensor, offsets_E1: torch.Tensor) -> torch.Tensor:
    """[E, F, H] in the dtype of x."""
    grads_EFH = x_MH.new_empty((len(offsets_E1) - 1, grad_MF.shape[1], x_MH.shape[1]))
    for grad_FH, rows in zip(grads_EFH, _groups(offsets_E1), strict=True):
        torch.mm(grad_MF[rows].T, x_MH[rows], out=grad_FH)
    return grads_EFH
