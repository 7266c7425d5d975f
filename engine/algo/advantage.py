"""From verdicts to rewards to advantages, one prompt's group at a time. Shapes: R responses, G groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tandem.engine.algo.length import length_reward
from tandem.engine.config import LossConfig, RewardConfig
from tandem.engine.types import Group, StopState

# Keeps the division finite where the standard deviation is tiny but not 0.
STD_EPS = 1e-6


def group_advantages(
    rewards_R: torch.Tensor,
    group_R: torch.Tensor,
    *,
    baseline: Literal["mean", "log_mean_exp"] = "mean",
    tau: float | None = None,
    normalise_std: bool = False,
) -> torch.Tensor:
    """Reward minus the baseline of its group (Kimi k1.5, arXiv:2501.12599, 2.3.2).

    mean: the mean reward of the k responses, the limit of the other for large tau. log_mean_exp: tau * log(mean(exp(r / tau))),
    the paper's estimate of tau * log Z, between the mean and the largest reward. A group of equal rewards (k = 1 among them)
    gets exactly 0 with either, free of rounding.

    Args:
        rewards_R: [R] floating point, finite.
        group_R: [R] integers; responses with the same number share a prompt. Need not be sorted or dense.
        tau: temperature of log_mean_exp, positive; not used by mean.
        normalise_std: divide by the group's standard deviation over its k responses (GRPO, arXiv:2402.03300).
    Returns: advantages_R, [R] fp32. Empty for R = 0.
    Raises: ValueError if the shapes differ, a reward is not finite, or tau is missing or not positive.
    """
    if rewards_R.shape != group_R.shape or rewards_R.dim() != 1:
        raise ValueError(f"rewards_R {tuple(rewards_R.shape)} and group_R {tuple(group_R.shape)} must be [R] with one R")
    if baseline == "log_mean_exp" and (tau is None or tau <= 0):
        raise ValueError(f"tau is {tau}; baseline=log_mean_exp divides by it, so it must be positive")
    if rewards_R.numel() == 0:
        return torch.zeros(0, device=rewards_R.device)
    if not torch.isfinite(rewards_R).all():
        bad = int((~torch.isfinite(rewards_R)).nonzero()[0])
        raise ValueError(f"the reward of response {bad} is {float(rewards_R[bad])}; it must be finite")
    _, slot_R, count_G = torch.unique(group_R, return_inverse=True, return_counts=True)
    zeros_G = torch.zeros(len(count_G), dtype=torch.float64, device=rewards_R.device)

    def mean_R(values_R: torch.Tensor) -> torch.Tensor:
        return (zeros_G.scatter_add(0, slot_R, values_R) / count_G)[slot_R]

    # Counted from the largest reward, equal rewards cancel exactly and no exponential overflows.
    largest_R = zeros_G.scatter_reduce(0, slot_R, rewards_R.double(), "amax", include_self=False)[slot_R]
    below_R = rewards_R.double() - largest_R
    if baseline == "mean":
        advantages_R = below_R - mean_R(below_R)
    else:
        assert tau is not None
        advantages_R = below_R - tau * mean_R(torch.exp(below_R / tau)).log()
    if normalise_std:
        std_R = mean_R((below_R - mean_R(below_R)) ** 2).sqrt()
        advantages_R = advantages_R / (std_R + STD_EPS)
    return advantages_R.float()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards and advantages of the responses of several groups, in the order of the groups and of their responses."""

    rewards_R: torch.Tensor  # fp32, the length reward included; 0 where nobody could grade
    length_rewards_R: torch.Tensor  # fp32, before its weight; 0 where nobody could grade
    advantages_R: torch.Tensor  # fp32, 0 where nobody could grade
    graded_R: torch.Tensor  # bool
    group_sizes: tuple[int, ...]  # responses of each group

    def advantages_of_groups(self) -> list[list[float]]:
        """One list per group, for `rows_of`."""
        return [part.tolist() for part in self.advantages_R.split(list(self.group_sizes))]


def score_groups(groups: Sequence[Group], *, loss: LossConfig, reward: RewardConfig, length_weight: float) -> Scores:
    """Reward = 1 or 0 + length_weight * length reward - repetition penalty; advantages as `loss` asks.

    mirror_descent and ppo_clip subtract the baseline; grpo and gspo also divide by the standard deviation; rest gives 1 to a
    correct response and 0 to all others. A response that nobody could grade is left out of the group's lengths and baseline, and
    gets advantage 0.

    Args:
        length_weight: weight of the length reward in this iteration (`LengthPenaltyConfig.weight_at`).
    Raises: ValueError for a group without responses or without one verdict per response.
    """
    for group in groups:
        if not group.responses:
            raise ValueError(f"the group of prompt {group.prompt.id!r} has no responses; it needs at least one")
        if len(group.verdicts) != len(group.responses):
            raise ValueError(
                f"the group of prompt {group.prompt.id!r} has {len(group.verdicts)} verdicts for {len(group.responses)} responses; grade it"
            )
    sizes = tuple(len(group.responses) for group in groups)
    responses = [response for group in groups for response in group.responses]
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    group_R = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    graded_R = torch.tensor([verdict.graded for verdict in verdicts], dtype=torch.bool)
    correct_R = torch.tensor([verdict.correct for verdict in verdicts], dtype=torch.bool) & graded_R
    lengths_R = torch.tensor([response.num_tokens for response in responses], dtype=torch.int64)
    repeated_R = torch.tensor([response.stop is StopState.REPETITION for response in responses], dtype=torch.bool)

    length_rewards_R = torch.zeros(len(responses))
    length_rewards_R[graded_R] = length_reward(lengths_R[graded_R], correct_R[graded_R], group_R[graded_R])
    rewards_R = correct_R.float() + length_weight * length_rewards_R - reward.repetition_penalty * (repeated_R & graded_R).float()
    if loss.variant == "rest":
        advantages_R = correct_R.float()
    else:
        advantages_R = torch.zeros(len(responses))
        advantages_R[graded_R] = group_advantages(
            rewards_R[graded_R],
            group_R[graded_R],
            baseline=loss.baseline,
            tau=loss.tau,
            normalise_std=loss.variant in ("grpo", "gspo"),
        )
    return Scores(rewards_R=rewards_R, length_rewards_R=length_rewards_R, advantages_R=advantages_R, graded_R=graded_R, group_sizes=sizes)
