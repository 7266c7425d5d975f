"""Rows grouped by the expert that they are sent to, and summed back over their experts.

Shapes: T tokens, E experts, K at most the experts of one token, M rows (one for each pair of a token and an expert of its), H width.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tandem.kernels.backend import check_dtype, runs_triton
from tandem.kernels.operators import operator
from tandem.kernels.permute import reference

__all__ = ["Plan", "chunk_plan", "gather_weights", "permute", "route", "unpermute"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where rows come from and where they went, on the device. Rows of one expert stand together, in the order of the tokens."""

    source_M: torch.Tensor  # int32, the token of each row
    place_TK: torch.Tensor  # int32, the rows of each token in the order of its experts; -1 where it has fewer
    offsets_E1: torch.Tensor  # int32, where each expert's rows begin, and M


def route(map_TE: torch.Tensor, *, num_rows: int, max_per_token: int) -> Plan:
    """Counting sort of the pairs of token and expert. On a GPU nothing waits for the counts.

    Args:
        map_TE: [T, E] bool, whether the token is sent to the expert.
        num_rows: M, how many are True in all.
        max_per_token: K, at least as many as are True for one token.
    Raises: ValueError for another shape or dtype, and on a CPU for counts that the map does not have; on a GPU what they leave out is
        dropped.
    """
    if map_TE.dim() != 2 or map_TE.dtype != torch.bool:
        raise ValueError(f"map_TE is {tuple(map_TE.shape)} {map_TE.dtype}; it must be [T, E] of bool")
    if map_TE.device.type == "cpu":
        found, most = int(map_TE.sum()), int(map_TE.sum(1).max()) if len(map_TE) else 0
        if found != num_rows or most > max_per_token:
            wanted = f"num_rows is {num_rows} and max_per_token {max_per_token}"
            raise ValueError(f"map_TE sends {found} rows, at most {most} of one token, but {wanted}")
    return Plan(*_route(map_TE, num_rows, max_per_token))


def chunk_plan(lengths_C: torch.Tensor, order_C: torch.Tensor, *, num_rows: int) -> Plan:
    """Puts chunks of rows that follow each other into another order. Chunk `order_C[i]` becomes the i-th, K is 1.

    Args:
        lengths_C: [C] integers, whose sum is num_rows.
        order_C: [C] integers, a permutation; on the same device.
    """
    if lengths_C.shape != order_C.shape or lengths_C.dim() != 1 or lengths_C.device != order_C.device:
        found = f"{tuple(lengths_C.shape)} on {lengths_C.device} and order_C {tuple(order_C.shape)} on {order_C.device}"
        raise ValueError(f"lengths_C is {found}; both must be [C] on one device")
    lengths_C, order_C = lengths_C.long(), order_C.long()
    begins_C = lengths_C.cumsum(0) - lengths_C
    ends_C = lengths_C[order_C].cumsum(0)
    row_M = torch.arange(num_rows, device=lengths_C.device)
    chunk_M = torch.searchsorted(ends_C, row_M, right=True)
    shift_C = begins_C[order_C] - (ends_C - lengths_C[order_C])
    source_M = row_M + shift_C[chunk_M]
    place_M = torch.empty_like(row_M).scatter_(0, source_M, row_M)
    offsets_C1 = torch.nn.functional.pad(ends_C, (1, 0))
    return Plan(source_M.int(), place_M.int()[:, None], offsets_C1.int())


def permute(x_TH: torch.Tensor, plan: Plan) -> torch.Tensor:
    """[M, H]: a copy of its token for each row. The gradient of a token is the sum of its rows' in fp32, in the order of its experts."""
    _check("x_TH", x_TH, len(plan.place_TK), plan)
    return _gather(x_TH, plan.source_M, plan.place_TK)


def unpermute(y_MH: torch.Tensor, plan: Plan, weights_M: torch.Tensor | None = None) -> torch.Tensor:
    """[T, H]: the sum of each token's rows in fp32, in the order of its experts, 0 without any.

    Args:
        weights_M: [M] fp32, a factor of each row; it gets a gradient too. None: all are 1.
    """
    _check("y_MH", y_MH, len(plan.source_M), plan)
    if weights_M is None:
        return _gather_sum(y_MH, None, plan.source_M, plan.place_TK)
    if weights_M.shape != y_MH.shape[:1] or weights_M.dtype != torch.float32 or weights_M.device != y_MH.device:
        found = f"{tuple(weights_M.shape)} {weights_M.dtype} on {weights_M.device}"
        raise ValueError(f"weights_M is {found}; it must be ({len(y_MH)},) torch.float32 on {y_MH.device}, one for each row of y_MH")
    return _gather_sum(y_MH, weights_M, plan.source_M, plan.place_TK)


def gather_weights(weights_TE: torch.Tensor, plan: Plan) -> torch.Tensor:
    """[M]: the weight of each row's token and expert, from [T, E]."""
    num_experts = weights_TE.shape[1]
    if len(weights_TE) != len(plan.place_TK) or num_experts + 1 != len(plan.offsets_E1):
        wanted = (len(plan.place_TK), len(plan.offsets_E1) - 1)
        raise ValueError(f"weights_TE is {tuple(weights_TE.shape)}; the plan has {wanted[0]} tokens and {wanted[1]} experts")
    row_M = torch.arange(len(plan.source_M), device=weights_TE.device, dtype=torch.int32)
    expert_M = torch.searchsorted(plan.offsets_E1[1:], row_M, right=True)
    # Each cell is read at most once, so the gradient's scatter has nothing to add up.
    return weights_TE.reshape(-1).gather(0, plan.source_M.long() * num_experts + expert_M)


def _check(name: str, rows: torch.Tensor, num_rows: int, plan: Plan) -> None:
    check_dtype(name, rows)
    if rows.dim() != 2 or len(rows) != num_rows or rows.device != plan.source_M.device:
        found = f"{tuple(rows.shape)} on {rows.device}"
        raise ValueError(f"{name} is {found}; the plan needs {num_rows} rows on {plan.source_M.device}")


@operator("route")
def _route(map_TE: torch.Tensor, num_rows: int, max_per_token: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _implementation(map_TE).route(map_TE, num_rows, max_per_token)


@operator("permute_gather")
def _gather(rows_GH: torch.Tensor, source_M: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """[M, H]. G is T, the tokens, whose `place_TK` the gradient needs."""
    return _implementation(rows_GH).gather(rows_GH, source_M)


@operator("permute_gather_sum")
def _gather_sum(rows_MH: torch.Tensor, weights_M: torch.Tensor | None, source_M: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """[T, H]."""
    return _implementation(rows_MH).gather_sum(rows_MH, place_TK, weights_M)


@operator("unpermute_backward")
def _unpermute_gradients(
    grad_TH: torch.Tensor, y_MH: torch.Tensor, weights_M: torch.Tensor, source_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(y_MH).unpermute_gradients(grad_TH, y_MH, weights_M, source_M)


def _implementation(rows: torch.Tensor) -> Any:
    if runs_triton(rows):
        from tandem.kernels.permute import triton

        return triton
    return reference


@_route.register_fake
def _(map_TE: torch.Tensor, num_rows: int, max_per_token: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = map_TE.shape
    source_M, place_TK, offsets_E1 = (
        map_TE.new_empty(shape, dtype=torch.int32) for shape in ((num_rows,), (num_tokens, max_per_token), (num_experts + 1,))
    )
    return source_M, place_TK, offsets_E1


@_gather.register_fake
def _(rows_GH: torch.Tensor, source_M: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    return rows_GH.new_empty((len(source_M), rows_GH.shape[1]))


@_gather_sum.register_fake
def _(rows_MH: torch.Tensor, weights_M: torch.Tensor | None, source_M: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    return rows_MH.new_empty((len(place_TK), rows_MH.shape[1]))


@_unpermute_gradients.register_fake
def _(grad_TH: torch.Tensor, y_MH: torch.Tensor, weights_M: torch.Tensor, source_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(y_MH, memory_format=torch.contiguous_format), torch.empty_like(weights_M)


def _keep_plan(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    _, *plan = inputs
    ctx.save_for_backward(*plan)


def _summed_back(ctx: Any, grad_MH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _gather_sum(grad_MH, None, *ctx.saved_tensors), None, None


def _keep_rows(ctx: Any, inputs: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> None:
    y_MH, weights_M, source_M, place_TK = inputs
    ctx.is_weighted = weights_M is not None
    ctx.save_for_backward(*((y_MH, weights_M, source_M) if ctx.is_weighted else (source_M, place_TK)))


def _spread_back(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if ctx.is_weighted:
        return *_unpermute_gradients(grad_TH, *ctx.saved_tensors), None, None
    return _gather(grad_TH, *ctx.saved_tensors), None, None, None


_gather.register_autograd(_summed_back, keep=_keep_plan)
_gather_sum.register_autograd(_spread_back, keep=_keep_rows)
