"""Policy losses on per-token log-probs, one value per response.

Shapes: T tokens, R responses.
"""

from typing import Literal

import torch

from tandem.kernels.policy_loss import reference

__all__ = ["Variant", "normaliser_of", "policy_loss"]

Variant = Literal["mirror_descent", "grpo", "ppo_clip", "gspo", "rest"]


def normaliser_of(variant: Variant) -> Literal["responses", "tokens"]:
    """What the sum of a variant's loss over all responses is divided by: their number, or that of their trained tokens."""
    return "tokens" if variant == "ppo_clip" else "responses"


def policy_loss(
    logprobs_T: torch.Tensor,
    reference_logprobs_T: torch.Tensor,
    advantages_R: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    tau: float,
    loss_mask_T: torch.Tensor | None = None,
    variant: Variant = "mirror_descent",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_weights_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each response, to be minimised. S is the sum of a response's log-probs, A its advantage, ρ = log π - log π_ref.

    - mirror_descent: -(A S - τ/2 (S - S_ref)²), equation 3 of Kimi k1.5 (arXiv:2501.12599, 2.3.2): the sum over the tokens, neither
      divided by the length nor clipped. The sum over the responses of a group divided by k is the paper's (1/k) Σ.
    - grpo: mean over the tokens of -min(r A, clip(r) A), r = exp(ρ) of one token (arXiv:2402.03300 without its KL term).
    - ppo_clip: the same, summed over the tokens.
    - gspo: -min(s A, clip(s) A), s = exp(mean of ρ over the tokens) (arXiv:2507.18071).
    - rest: -A S with A in {0, 1}: fits the responses kept.

    Args:
        logprobs_T, reference_logprobs_T: [T] fp32 nats. The reference is the policy at the iteration's start.
        advantages_R: [R] fp32, already length-penalised and centred within the prompt's group.
        cu_seqlens: [R+1] int32 offsets into T; an empty response is allowed and has the loss 0.
        tau: weight of the squared log-ratio (mirror_descent); 0 disables it.
        loss_mask_T: [T] bool, tokens that count. None: all.
        clip_low, clip_high: a ratio is clipped to [1 - clip_low, 1 + clip_high] (grpo, ppo_clip, gspo).
        importance_weights_T: [T] fp32 constants, factors of the tokens' terms; a gspo response takes their mean. None: all 1.
    Returns: loss_R, [R] fp32, not averaged (see `normaliser_of`). Differentiable in logprobs_T only.
    Raises: ValueError if the token counts differ or a dtype is not fp32.
    """
    num_tokens = logprobs_T.shape[0]
    for name, tensor in (
        ("reference_logprobs_T", reference_logprobs_T),
        ("loss_mask_T", loss_mask_T),
        ("importance_weights_T", importance_weights_T),
    ):
        if tensor is not None and tensor.shape != logprobs_T.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; logprobs_T has {num_tokens} tokens")
    for name, tensor in (("logprobs_T", logprobs_T), ("reference_logprobs_T", reference_logprobs_T), ("advantages_R", advantages_R)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}; it must be fp32")
    if cu_seqlens.shape[0] != advantages_R.shape[0] + 1 or int(cu_seqlens[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens has {cu_seqlens.shape[0]} entries and ends at {int(cu_seqlens[-1])}; "
            f"{advantages_R.shape[0]} responses of {num_tokens} tokens need one more than responses, ending at the tokens"
        )
    return reference.policy_loss(
        logprobs_T,
        reference_logprobs_T.detach(),
        advantages_R,
        cu_seqlens,
        tau=tau,
        loss_mask_T=loss_mask_T,
        variant=variant,
        clip_low=clip_low,
        clip_high=clip_high,
        importance_weights_T=importance_weights_T,
    )
