"""Context parallelism for packed sequences: which rank holds which tokens, and attention over the keys of all of them.

Every sequence is cut into 2 * cp nearly equal chunks, and rank r takes chunks r and 2 * cp - 1 - r of each, so that all ranks have
the same causal work (zig-zag), sequence by sequence and for any length. Keys and values are gathered from all ranks.

Shapes: T tokens of a microbatch, C ranks, L tokens of one rank (with a few padded ones at its end), G heads, D head width.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


def split_tokens(cu_seqlens: NDArray[np.int64], cp_size: int, token_multiple: int, min_tokens: int = 0) -> NDArray[np.int64]:
    """The tokens that each rank holds: [C, L] indices into the T tokens, -1 for padding at the end.

    Pure: all ranks compute the same split. L is the longest rank's count, at least `min_tokens`, rounded up to `token_multiple`.
    """
    ranks: list[list[NDArray[np.int64]]] = [[] for _ in range(cp_size)]
    if cp_size == 1:
        ranks[0].append(np.arange(cu_seqlens[-1]))
    else:
        cuts = np.arange(2 * cp_size + 1)
        for number, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
            bounds = start + cuts * (end - start) // (2 * cp_size)
            for i in range(cp_size):
                # Ranks take turns, so that the tokens left over by the division do not all fall to one.
                rank = (i + number) % cp_size
                for chunk in (i, 2 * cp_size - 1 - i):
                    ranks[rank].append(np.arange(bounds[chunk], bounds[chunk + 1]))
    tokens = [np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64) for parts in ranks]
    length = max(min_tokens, 1, max(len(part) for part in tokens))
    length = -(-length // token_multiple) * token_multiple
    split_CL = np.full((cp_size, length), -1, dtype=np.int64)
    for rank, part in enumerate(tokens):
        split_CL[rank, : len(part)] = part
    return split_CL


def token_order(split_CL: NDArray[np.int64], num_tokens: int) -> NDArray[np.int64]:
    """Where each of the T tokens lies when the ranks' parts are laid end to end: [T]."""
    flat = split_CL.reshape(-1)
    held = np.flatnonzero(flat >= 0)
    order_T = np.empty(num_tokens, dtype=np.int64)
    order_T[flat[held]] = held
    return order_T


class _GatherKeys(torch.autograd.Function):
    """[L, ...] of every rank to [C * L, ...]. Each rank's queries use all keys, so the gradients of all ranks are summed."""

    @staticmethod
    def forward(ctx: Any, x_L: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_gather(x_L, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        grad_L = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(grad_L, grad.contiguous(), group=ctx.group)
        return grad_L, None


class _GatherReplicated(torch.autograd.Function):
    """[L, ...] of every rank to [C * L, ...], on which all ranks then compute the same: the gradient is the own slice, once."""

    @staticmethod
    def forward(ctx: Any, x_L: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_gather(x_L, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        length = grad.shape[0] // ctx.group.size()
        start = ctx.group.rank() * length
        return grad[start : start + length], None


def _all_gather(x_L: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    out = x_L.new_empty((group.size() * x_L.shape[0], *x_L.shape[1:]))
    dist.all_gather_into_tensor(out, x_L.contiguous(), group=group)
    return out


def gather_keys(x_LGD: torch.Tensor, order_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Keys or values of all T tokens in the order of the microbatch, from the part that each rank holds."""
    return _GatherKeys.apply(x_LGD, group).index_select(0, order_T)


def gather_replicated(x_L: torch.Tensor, order_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Per-token values of all T tokens on every rank, for a loss that every rank computes alike."""
    if group.size() > 1:
        x_L = _GatherReplicated.apply(x_L, group)
    return x_L.index_select(0, order_T)
