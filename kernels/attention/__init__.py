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
from tandem.kernels.attention.plan import AttentionPlan, plan_attention
from tandem.kernels.backend import runs_triton

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
    out_TND, lse_NT = _PackedAttention.apply(q_TND, k_SGD, v_SGD, plan, scale, grad_start, return_lse)
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


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TND: torch.Tensor,
        k_SGD: torch.Tensor,
        v_SGD: torch.Tensor,
        plan: AttentionPlan,
        scale: float,
        grad_start: int,
        with_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.plan, ctx.scale, ctx.grad_start, ctx.runs_triton = plan, scale, grad_start, runs_triton(q_TND)
        ctx.set_materialize_grads(False)
        if ctx.runs_triton:
            from tandem.kernels.attention.triton import attention_forward

            out_TND, lse_NP = attention_forward(q_TND, k_SGD, v_SGD, plan, scale)
            ctx.save_for_backward(q_TND, k_SGD, v_SGD, out_TND, lse_NP)
            if not with_lse:
                return out_TND, None
            lse_NT = lse_NP[:, : plan.num_queries] * math.log(2)
            return out_TND, lse_NT.masked_fill_(lse_NT == math.inf, -math.inf)
        # The backward pass leaves queries below grad_start out, so its tasks are others then.
        keep = any(ctx.needs_input_grad) and grad_start == 0
        out_TND, lse_NT, kept_probs = reference.attention_forward(q_TND, k_SGD, v_SGD, plan.tasks(), scale, keep=keep, with_lse=with_lse)
        ctx.save_for_backward(q_TND, k_SGD, v_SGD, *kept_probs)
        return out_TND, lse_NT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_TND, grad_lse_NT = grad_outputs
        q_TND, k_SGD, v_SGD, *kept = ctx.saved_tensors
        if grad_TND is None:
            grad_TND = q_TND.new_zeros((*q_TND.shape[:2], v_SGD.shape[2]))
        if ctx.runs_triton:
            from tandem.kernels.attention.triton_backward import attention_backward

            grad_TND = grad_TND if _can_be_copied_in_bulk(grad_TND) else grad_TND.contiguous()
            grad_lse_NT = None if grad_lse_NT is None else grad_lse_NT.contiguous()
            gradients = attention_backward(
                grad_TND, grad_lse_NT, q_TND, k_SGD, v_SGD, kept[0], kept[1], ctx.plan, ctx.scale, ctx.grad_start
            )
        else:
            gradients = reference.attention_backward(
                grad_TND, grad_lse_NT, q_TND, k_SGD, v_SGD, kept, ctx.plan.tasks(ctx.grad_start), ctx.scale
            )
            if ctx.grad_start:
                for gradient in gradients[1:]:
                    gradient[: ctx.grad_start] = 0
        return *gradients, None, None, None, None
