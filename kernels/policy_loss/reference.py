"""Policy losses in plain torch, summed in fp64. The contract is in `tandem.kernels.policy_loss`.

Shapes: T tokens, R responses.
"""

import torch


def policy_loss(
    logprobs_T: torch.Tensor,
    reference_logprobs_T: torch.Tensor,
    advantages_R: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    tau: float,
    loss_mask_T: torch.Tensor | None,
    variant: str,
    clip_low: float,
    clip_high: float,
    importance_weights_T: torch.Tensor | None,
) -> torch.Tensor:
    """loss_R; see the package."""
    num_responses, dtype = advantages_R.shape[0], logprobs_T.dtype
    lengths_R = cu_seqlens.diff().long()
    response_T = torch.repeat_interleave(torch.arange(num_responses, device=logprobs_T.device), lengths_R)
    weight_T = torch.ones_like(logprobs_T, dtype=torch.float64) if importance_weights_T is None else importance_weights_T.double()
    count_T = torch.ones_like(weight_T)
    if loss_mask_T is not None:
        weight_T, count_T = weight_T * loss_mask_T, count_T * loss_mask_T
        # A masked token's log-probs may be anything, not even finite.
        logprobs_T = torch.where(loss_mask_T, logprobs_T, 0.0)
        reference_logprobs_T = torch.where(loss_mask_T, reference_logprobs_T, 0.0)

    def per_response(x_T: torch.Tensor) -> torch.Tensor:
        return x_T.new_zeros(num_responses).index_add(0, response_T, x_T)

    logprobs_T, reference_logprobs_T, advantages_R = logprobs_T.double(), reference_logprobs_T.double(), advantages_R.double()
    log_ratio_T = logprobs_T - reference_logprobs_T
    count_R = per_response(count_T).clamp(min=1)

    def clipped(log_ratio: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        ratio = log_ratio.exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)

    if variant == "mirror_descent":
        sum_R, log_ratio_R = per_response(weight_T * logprobs_T), per_response(weight_T * log_ratio_T)
        loss_R = -(advantages_R * sum_R - tau / 2 * log_ratio_R.square())
    elif variant == "rest":
        loss_R = -advantages_R * per_response(weight_T * logprobs_T)
    elif variant == "gspo":
        loss_R = clipped(per_response(count_T * log_ratio_T) / count_R, advantages_R) * per_response(weight_T) / count_R
    elif variant in ("grpo", "ppo_clip"):
        loss_R = per_response(weight_T * clipped(log_ratio_T, advantages_R[response_T]))
        if variant == "grpo":
            loss_R = loss_R / count_R
    else:
        raise ValueError(f"variant is {variant!r}; it must be mirror_descent, grpo, ppo_clip, gspo or rest")
    return loss_R.to(dtype)
