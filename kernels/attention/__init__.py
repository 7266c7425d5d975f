"""Attention over packed sequences, shared prompts and trees, with one mask for all of them.

One int32 per token describes the mask: query i sees key j iff j <= i < visible_end[j]. Plain packing: `visible_end` is the end of
the own sequence. A shared prompt's tokens are visible to the end of their group, a response's tokens to the end of the response.

Shapes: T tokens (queries), S tokens (keys; S = T but for context parallelism), N query heads, G key/value heads, D head width, which may
be another one for values (latent attention: 192 and 128).
"""

import math
from typing import Any, Literal, overload

import torch

from tandem.kernels.attention import reference
from tandem.kernels.attention.plan import AttentionPlan, plan_attention, plan_of
from tandem.kernels.backend import runs_triton
from tandem.kernels.operators import operator

__all__ = ["AttentionPlan", "packed_attention", "plan_attention"]

# Widths of a head that the Triton kernels have tiles for, of queries and keys and of values.
TRITON_WIDTHS, TRITON_VALUE_WIDTHS = (16, 32, 64, 128, 192), (16, 32, 64, 128)


@overload
def packed_attention(
    q_TND: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    visible_end_S: torch.Tensor,
    *,
    scale: float | None = ...,
    grad_start: int = ...,
    plan: AttentionPlan | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def packed_attention(
    q_TND: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    visible_end_S: torch.Tensor,
    *,
    scale: float | None = ...,
    grad_start: int = ...,
    plan: AttentionPlan | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def packed_attention(
    q_TND: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    visible_end_S: torch.Tensor,
    *,
    scale: float | None = None,
    grad_start: int = 0,
    plan: AttentionPlan | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention under the mask j <= i < visible_end[j], differentiable in q, k and v.

    Args:
        q_TND: [T, N, D] fp32, bf16 or fp16 (fp64 in plain torch only).
        k_SGD, v_SGD: [S, G, D] and [S, G, any width], same dtype; N is a multiple of G. S = T unless `plan` holds a part of the queries.
            On a GPU, D is one of TRITON_WIDTHS and a value's width one of TRITON_VALUE_WIDTHS; tokens and heads may be strided.
        visible_end_S: [S] integer, exclusive end of the queries that see each key; visible_end[j] > j, and it nests. Not read when
            there is a plan.
        scale: factor of the scores, above 0; None is 1 / sqrt(D).
        grad_start: a place among the keys. Queries below it get no gradient and give none, keys and values below it get none (an
            approximation that drops the gradient through a stale prefix; 0 is exact). Neither is computed.
        plan: what `plan_attention` returned for this mask, to share it between layers. None: made here, which waits for a GPU.
        return_lse: also return the logarithm of each softmax's denominator, by which attention over parts of the keys is put together.
    Returns: [T, N, width of v] in the dtype of q, 0 in padded rows; with return_lse also [N, T] in nats, fp32 (fp64 for fp64),
        -inf in padded rows, differentiable as well. Softmax and sums are in fp32, and equal bit for bit from run to run.
    Raises: ValueError if shapes, dtypes, devices or strides do not fit. Values of the mask are checked where its plan is made.
    """
    if plan is None:
        plan = plan_attention(visible_end_S, device=q_TND.device)
    if scale is None:
        scale = float(q_TND.shape[-1] ** -0.5)
    _check(q_TND, k_SGD, v_SGD, visible_end_S, plan, scale, grad_start)
    has_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q_TND, k_SGD, v_SGD))
    out_TND, lse_NT, _ = _forward(q_TND, k_SGD, v_SGD, plan.number, scale, grad_start, return_lse, has_backward)
    return (out_TND, lse_NT) if return_lse else out_TND


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible_end: torch.Tensor, plan: AttentionPlan, scale: float, grad_start: int
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.dim() == k.dim() == v.dim() == 3 and k.shape[:2] == v.shape[:2] and q.shape[2] == k.shape[2]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes} do not fit: need [T,N,D], [S,G,D], [S,G,any width], N % G = 0")
    if plan.num_queries != q.shape[0] or plan.num_keys != k.shape[0] or visible_end.shape != k.shape[:1]:
        raise ValueError(
            f"the mask is for {plan.num_queries} queries and {plan.num_keys} keys, visible_end has shape {tuple(visible_end.shape)}, "
            f"but q has {q.shape[0]} rows and k {k.shape[0]}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must be all float32, all bfloat16 or all float16")
    if not q.device == k.device == v.device == plan.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}, the plan on {plan.device}; all must be on one device")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}; it must be above 0")
    if not 0 <= grad_start <= plan.num_keys:
        raise ValueError(f"grad_start is {grad_start}; it must be between 0 and the number of keys, {plan.num_keys}")
    if runs_triton(q):
        _check_for_triton(q, k, v)


def _check_for_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype == torch.float64:
        raise ValueError("q is torch.float64, which the Triton kernels do not compute; use float32, or kernels='reference'")
    if q.shape[2] not in TRITON_WIDTHS or v.shape[2] not in TRITON_VALUE_WIDTHS:
        raise ValueError(
            f"heads are {q.shape[2]} wide and values {v.shape[2]}; the Triton kernels have {TRITON_WIDTHS} and {TRITON_VALUE_WIDTHS}: "
            "pad with zeros, or choose kernels='reference'"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _can_be_copied_in_bulk(x):
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} has strides {x.stride()} of {x.element_size()} bytes; the Triton kernels need a last "
                f"stride of 1 and others of a multiple of 16 bytes, from an address that is one too: call {name}.contiguous()"
            )


def _can_be_copied_in_bulk(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe it: rows may lie apart, columns not, and all begins at multiples of 16 bytes."""
    starts = [stride for length, stride in zip(x.shape[:2], x.stride()[:2], strict=True) if length > 1]
    starts_apart = all(stride >= 0 and stride * x.element_size() % 16 == 0 for stride in starts)
    return x.stride(2) == 1 and (x.shape[0] < 2 or x.stride(0) > 0) and starts_apart and x.data_ptr() % 16 == 0


@operator("packed_attention")
def _forward(
    q_TND: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, plan: int, scale: float, grad_start: int, with_lse: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output; the log-sum-exp [N, T], empty unless asked for; and with `keep` what the backward pass takes over."""
    its_plan = plan_of(plan)
    if runs_triton(q_TND):
        from tandem.kernels.attention.triton import attention_forward

        out_TND, lse_NP = attention_forward(q_TND, k_SGD, v_SGD, its_plan, scale)
        kept = lse_NP if keep else lse_NP.new_empty(0)
        if not with_lse:
            return out_TND, lse_NP.new_empty(0), kept
        lse_NT = lse_NP[:, : its_plan.num_queries] * math.log(2)
        return out_TND, lse_NT.masked_fill_(lse_NT == math.inf, -math.inf), kept
    keeps_probs = keep and _hands_over_probs(grad_start)
    out_TND, lse_NT, kept = reference.attention_forward(q_TND, k_SGD, v_SGD, its_plan.tasks(), scale, keep=keeps_probs, with_lse=with_lse)
    return out_TND, kept.new_empty(0) if lse_NT is None else lse_NT, kept


def _hands_over_probs(grad_start: int) -> bool:
    """The backward pass leaves queries below grad_start out, so its tasks are others then."""
    return grad_start == 0


@operator("packed_attention_backward")
def _backward(
    grad_TND: torch.Tensor,
    grad_lse_NT: torch.Tensor | None,
    q_TND: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    out_TND: torch.Tensor | None,
    kept: torch.Tensor,
    plan: int,
    scale: float,
    grad_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    its_plan = plan_of(plan)
    if runs_triton(q_TND):
        from tandem.kernels.attention.triton_backward import attention_backward

        assert out_TND is not None
        grad_TND = grad_TND if _can_be_copied_in_bulk(grad_TND) else grad_TND.contiguous()
        grad_lse_NT = None if grad_lse_NT is None else grad_lse_NT.contiguous()
        return attention_backward(grad_TND, grad_lse_NT, q_TND, k_SGD, v_SGD, out_TND, kept, its_plan, scale, grad_start)
    tasks = its_plan.tasks(grad_start)
    dq, dk, dv = reference.attention_backward(grad_TND, grad_lse_NT, q_TND, k_SGD, v_SGD, kept, tasks, scale)
    dk[:grad_start], dv[:grad_start] = 0, 0
    return dq, dk, dv


@_forward.register_fake
def _(
    q_TND: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, plan: int, scale: float, grad_start: int, with_lse: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (num_queries, num_heads, _), its_plan = q_TND.shape, plan_of(plan)
    dtype = torch.float64 if q_TND.dtype == torch.float64 else torch.float32
    out_TND = q_TND.new_empty((num_queries, num_heads, v_SGD.shape[2]))
    shape: tuple[int, ...] = (0,)
    if keep and runs_triton(q_TND):
        shape = num_heads, its_plan.num_padded_queries
    elif keep and _hands_over_probs(grad_start):
        shape = (sum(reference.kept_sizes(its_plan.tasks(), num_heads)),)
    lse_NT = q_TND.new_empty((num_heads, num_queries) if with_lse else (0,), dtype=dtype)
    return out_TND, lse_NT, q_TND.new_empty(shape, dtype=dtype)


@_backward.register_fake
def _(
    grad_TND: torch.Tensor, grad_lse_NT: torch.Tensor | None, q_TND: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_TND, k_SGD, v_SGD))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    q_TND, k_SGD, v_SGD, number, ctx.scale, ctx.grad_start, with_lse, _ = inputs
    out_TND, lse_NT, kept = output
    ctx.plan = plan_of(number)  # so that it lives until the backward pass
    ctx.save_for_backward(q_TND, k_SGD, v_SGD, out_TND if runs_triton(q_TND) else None, kept)
    ctx.mark_non_differentiable(kept, *(() if with_lse else (lse_NT,)))
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_TND: torch.Tensor | None, grad_lse_NT: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    q_TND, k_SGD, v_SGD, out_TND, kept = ctx.saved_tensors
    if grad_TND is None:
        grad_TND = q_TND.new_zeros((*q_TND.shape[:2], v_SGD.shape[2]))
    gradients = _backward(grad_TND, grad_lse_NT, q_TND, k_SGD, v_SGD, out_TND, kept, ctx.plan.number, ctx.scale, ctx.grad_start)
    return *gradients, *[None] * 5


_forward.register_autograd(_gradients, keep=_keep)
