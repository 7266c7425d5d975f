"""Context parallelism for packed sequences: which rank holds which tokens, and how each attends to all of them.

Every sequence is cut into 2 * cp nearly equal chunks, and rank r takes chunks r and 2 * cp - 1 - r of each, so that all ranks have
the same causal work (zig-zag), sequence by sequence and for any length. A shared prompt and what each response adds to it are cut
one by one: a response's tokens all see the whole prompt, and beyond it the same triangle as a sequence's.

Attention then has two ways. With all-gather a rank has its own queries and the keys and values of all ranks. With Ulysses
(arXiv:2309.14509) ranks exchange heads for tokens: each computes its part of the heads for all tokens, which is equal work whatever the
mask, and less is sent. That needs a key/value head for every rank (`mesh_rules.splits_heads`).

Shapes: S tokens and T positions of a microbatch, C ranks, L tokens and O positions of one rank (with a few padded ones at its end),
N and G heads, D head width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


def split_tokens(cu_seqlens: NDArray[np.int64], cp_size: int, token_multiple: int, min_tokens: int = 0) -> NDArray[np.int64]:
    """The tokens that each rank holds: [C, L] indices into the S tokens, -1 for padding at the end.

    Pure: all ranks compute the same split. L is the longest rank's count, at least `min_tokens`, rounded up to `token_multiple`.

    Args:
        cu_seqlens: [Q+1] offsets of what is cut: sequences, or the nodes of shared prompts.
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
    return _padded(tokens, -(-length // token_multiple) * token_multiple)


def split_positions(rank_T: NDArray[np.int64], cp_size: int) -> NDArray[np.int64]:
    """The positions of each rank: [C, O] indices into the T positions, in their order, -1 for padding at the end.

    Args:
        rank_T: which rank holds the token of each position.
    """
    positions = [np.flatnonzero(rank_T == rank) for rank in range(cp_size)]
    return _padded(positions, max(len(part) for part in positions))


def _padded(parts: Sequence[NDArray[np.int64]], length: int) -> NDArray[np.int64]:
    padded = np.full((len(parts), length), -1, dtype=np.int64)
    for rank, part in enumerate(parts):
        padded[rank, : len(part)] = part
    return padded


def token_order(split_CL: NDArray[np.int64], num_tokens: int) -> NDArray[np.int64]:
    """Where each of the S tokens lies when the ranks' parts are laid end to end: [S]. The same for positions."""
    flat = split_CL.reshape(-1)
    held = np.flatnonzero(flat >= 0)
    order_S = np.empty(num_tokens, dtype=np.int64)
    order_S[flat[held]] = held
    return order_S


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


class _Exchange(torch.autograd.Function):
    """[C, ...]: part c goes to rank c, and its part for this rank takes the place. The gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x_C: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(x_C, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_C,) = grad_outputs
        return _all_to_all(grad_C, ctx.group), None


def _all_to_all(x_C: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x_C = x_C.contiguous()
    out_C = torch.empty_like(x_C)
    dist.all_to_all_single(out_C, x_C, group=group)
    return out_C


def scatter_heads(tensors: Sequence[torch.Tensor], order_S: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """From all heads of this rank's tokens to this rank's heads of all S tokens, in the order of the microbatch; one message.

    Args:
        tensors: each [L, heads, width], of one dtype; the ranks divide the heads.
    Returns: each [S, heads / C, width]; a view, whose rows lie apart.
    """
    num_ranks = group.size()
    shapes = [(x.shape[1] // num_ranks, x.shape[2]) for x in tensors]
    widths = [heads * width for heads, width in shapes]
    for_ranks = torch.cat([x.reshape(len(x), num_ranks, -1) for x in tensors], dim=-1).transpose(0, 1)
    from_ranks = _Exchange.apply(for_ranks, group).flatten(0, 1).index_select(0, order_S)
    return [x.unflatten(-1, shape) for x, shape in zip(from_ranks.split(widths, dim=-1), shapes, strict=True)]


def gather_heads(x_SND: torch.Tensor, order_S: torch.Tensor, num_local: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The way back of one tensor: [S, heads / C, width] to [L, heads, width], 0 in padding."""
    for_ranks = x_SND.new_zeros((group.size() * num_local, *x_SND.shape[1:])).index_copy(0, order_S, x_SND)
    from_ranks = _Exchange.apply(for_ranks.unflatten(0, (group.size(), num_local)), group)
    return from_ranks.transpose(0, 1).flatten(1, 2)


def gather_keys(x_LGD: torch.Tensor, order_S: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Keys or values of all S tokens in the order of the microbatch, from the part that each rank holds."""
    return _GatherKeys.apply(x_LGD, group).index_select(0, order_S)


def gather_replicated(x_O: torch.Tensor, order_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Values of all T positions on every rank, for a loss that every rank computes alike."""
    if group.size() > 1:
        x_O = _GatherReplicated.apply(x_O, group)
    return x_O.index_select(0, order_T)
