"""Policy losses and group statistics in plain torch, summed in fp64. The contracts are in `tandem.kernels.policy_loss`.

Shapes: T tokens, R responses, G groups.
"""

import torch

from tandem.kernels.policy_loss.inputs import Responses, Tokens

# Keeps the division finite where the standard deviation is tiny but not 0.
STD_EPS = 1e-6


def group_statistics(x: Responses) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(length_rewards_R, rewards_R, advantages_R); see the package."""
    base_rewards_R, lengths_R, correct_R, graded_R, cu_groups, length_weight, baseline, tau, normalise_std = x
    num_groups, infinity = len(cu_groups) - 1, float("inf")
    group_R = torch.repeat_interleave(torch.arange(num_groups, device=cu_groups.device), cu_groups.diff().long())
    zeros_G = torch.zeros(num_groups, dtype=torch.float64, device=cu_groups.device)

    def extreme_R(values_R: torch.Tensor, kind: str) -> torch.Tensor:
        """Over the graded responses of each group."""
        values_R = torch.where(graded_R, values_R, -infinity if kind == "amax" else infinity)
        return zeros_G.scatter_reduce(0, group_R, values_R, kind, include_self=False)[group_R]

    count_R = zeros_G.scatter_add(0, group_R, graded_R.double())[group_R].clamp(min=1)

    def mean_R(values_R: torch.Tensor) -> torch.Tensor:
        return zeros_G.scatter_add(0, group_R, torch.where(graded_R, values_R, 0.0))[group_R] / count_R

    lengths = lengths_R.double()
    shortest_R, longest_R = extreme_R(lengths, "amin"), extreme_R(lengths, "amax")
    differs_R = graded_R & (longest_R > shortest_R)
    # The inner choice only keeps 0/0 out of groups of one length, which the outer one sets to 0.
    lambda_R = 0.5 - (lengths - shortest_R) / torch.where(differs_R, longest_R - shortest_R, 1.0)
    length_rewards_R = torch.where(differs_R, torch.where(correct_R, lambda_R, lambda_R.clamp(max=0)), 0.0).float()
    rewards_R = torch.where(graded_R, base_rewards_R.double() + length_weight * length_rewards_R.double(), 0.0).float()

    # Counted from the largest reward, equal rewards cancel exactly and no exponential overflows.
    below_R = torch.where(graded_R, rewards_R.double() - extreme_R(rewards_R.double(), "amax"), 0.0)
    advantages_R = below_R - (tau * mean_R(torch.exp(below_R / tau)).log() if baseline == "log_mean_exp" else mean_R(below_R))
    if normalise_std:
        advantages_R = advantages_R / (mean_R((below_R - mean_R(below_R)) ** 2).sqrt() + STD_EPS)
    return length_rewards_R, rewards_R, torch.where(graded_R, advantages_R, 0.0).float()


def policy_loss(x: Tokens) -> torch.Tensor:
    """loss_R; see the package."""
    logprobs_T, reference_logprobs_T, advantages_R, cu_seqlens, loss_mask_T, importance_weights_T, variant, tau, clip_low, clip_high = x
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
    elif variant == "token_level":
        ratio_T, advantages_T = log_ratio_T.exp(), advantages_R[response_T]
        bounded_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
        loss_R = per_response(weight_T * (-bounded_T * advantages_T + tau * log_ratio_T.square()))
    else:
        loss_R = per_response(weight_T * clipped(log_ratio_T, advantages_R[response_T]))
        if variant == "grpo":
            loss_R = loss_R / count_R
    return loss_R.to(dtype)
