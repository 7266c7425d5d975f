"""Attention over packed sequences, shared prompts and trees, with one mask for all of them.

One int32 per token describes the mask: query i sees key j iff j <= i < visible_end[j]. Plain packing: `visible_end` is the end of
the own sequence. A shared prompt's tokens are visible to the end of their group, a response's tokens to the end of the response.

Shapes: T tokens (queries), S tokens (keys; S = T but for context parallelism), N query heads, G key/value heads, D head width, which may
be another one for values (latent attention: 192 and 128).
"""

from typing import Any

import torch

from tandem.kernels.attention import reference
from tandem.kernels.attention.reference import AttentionPlan, plan_attention

__all__ = ["AttentionPlan", "packed_attention", "plan_attention"]


def packed_attention(
    q_TND: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    visible_end_T: torch.Tensor,
    *,
    scale: float | None = None,
    grad_start: int = 0,
    plan: AttentionPlan | None = None,
) -> torch.Tensor:
    """Softmax attention under the mask j <= i < visible_end[j], differentiable in q, k and v.

    Args:
        q_TND: [T, N, D] fp32, bf16 or fp16.
        k_TGD, v_TGD: [S, G, D] and [S, G, any width], same dtype; N is a multiple of G. S = T unless `plan` holds a part of the queries.
        visible_end_T: [S] int32, exclusive end of the queries that see each key; visible_end[j] > j.
        scale: factor of the scores; None is 1 / sqrt(D).
        grad_start: queries below it get no gradient and give none, keys and values below it get none (an approximation that drops
            the gradient through a stale prefix; 0 is exact).
        plan: what `plan_attention` returned for this mask, to share it between layers. None: made here.
    Returns: [T, N, width of v] in the dtype of q. Softmax and sums are in fp32.
    Raises: ValueError if shapes do not fit.
    """
    num_heads, num_groups = q_TND.shape[1], k_TGD.shape[1]
    if k_TGD.shape[:2] != v_TGD.shape[:2] or q_TND.shape[2] != k_TGD.shape[2] or num_heads % num_groups:
        raise ValueError(
            f"q {tuple(q_TND.shape)}, k {tuple(k_TGD.shape)}, v {tuple(v_TGD.shape)} do not fit: "
            "need [T,N,D], [S,G,D], [S,G,any width], N % G = 0"
        )
    if plan is None:
        plan = plan_attention(visible_end_T)
    if plan.num_queries != q_TND.shape[0] or plan.num_keys != k_TGD.shape[0]:
        raise ValueError(
            f"the mask is for {plan.num_queries} queries and {plan.num_keys} keys, but q has {q_TND.shape[0]} rows and k {k_TGD.shape[0]}"
        )
    scale = q_TND.shape[2] ** -0.5 if scale is None else scale
    return _PackedAttention.apply(q_TND, k_TGD, v_TGD, plan, scale, grad_start)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TND: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, plan: AttentionPlan, scale: float, grad_start: int
    ) -> torch.Tensor:
        out_TND, kept_probs = reference.attention_forward(q_TND, k_SGD, v_SGD, plan, scale, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(q_TND, k_SGD, v_SGD, *kept_probs)
        ctx.plan, ctx.scale, ctx.grad_start = plan, scale, grad_start
        return out_TND

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_TND,) = grad_outputs
        q_TND, k_SGD, v_SGD, *kept_probs = ctx.saved_tensors
        if ctx.grad_start:
            grad_TND = grad_TND.clone()
            grad_TND[: ctx.grad_start] = 0
        dq, dk, dv = reference.attention_backward(grad_TND, q_TND, k_SGD, v_SGD, kept_probs, ctx.plan, ctx.scale)
        if ctx.grad_start:
            dk[: ctx.grad_start] = 0
            dv[: ctx.grad_start] = 0
        return dq, dk, dv, None, None, None
