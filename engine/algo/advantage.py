"""From verdicts to rewards to advantages, one prompt's group at a time. Shapes: R responses, G groups."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tandem.engine.algo.grouping import by_group
from tandem.engine.config import LossConfig, RewardConfig
from tandem.engine.types import Group, Response, StopState
from tandem.kernels.policy_loss import Baseline, group_statistics


def group_advantages(
    rewards_R: torch.Tensor,
    group_R: torch.Tensor,
    *,
    baseline: Baseline = "mean",
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
    if not torch.isfinite(rewards_R).all():
        bad = int((~torch.isfinite(rewards_R)).nonzero()[0])
        raise ValueError(f"the reward of response {bad} is {float(rewards_R[bad])}; it must be finite")
    order_R, cu_groups = by_group(group_R)
    graded_R, no_lengths_R = torch.ones_like(group_R, dtype=torch.bool), torch.zeros_like(group_R, dtype=torch.int32)
    _, _, advantages_R = group_statistics(
        rewards_R[order_R].float(),
        no_lengths_R,
        graded_R,
        graded_R,
        cu_groups,
        baseline=baseline,
        tau=tau if tau is not None else 0.0,
        normalise_std=normalise_std,
    )
    return torch.empty_like(advantages_R).index_copy_(0, order_R, advantages_R)


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


def score_groups(
    groups: Sequence[Group], *, loss: LossConfig, reward: RewardConfig, length_weight: float, max_response_tokens: int
) -> Scores:
    """Reward = 1 or 0 + length_weight * length reward - penalties (repetition, format, over budget); advantages as `loss` asks.

    mirror_descent and ppo_clip subtract the baseline; grpo and gspo also divide by the standard deviation; rest gives 1 to a
    correct response and 0 to all others. A response that nobody could grade is left out of the group's lengths and baseline, and
    gets advantage 0.

    Args:
        length_weight: weight of the length reward in this iteration (`LengthPenaltyConfig.weight_at`).
        max_response_tokens: of the rollout; the over-budget penalty counts from a fraction of it.
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
    graded_R = torch.tensor([verdict.graded for verdict in verdicts], dtype=torch.bool)
    correct_R = torch.tensor([verdict.correct for verdict in verdicts], dtype=torch.bool) & graded_R
    repeated_R = torch.tensor([response.stop is StopState.REPETITION for response in responses], dtype=torch.bool)
    malformed_R = torch.tensor([not verdict.well_formed for verdict in verdicts], dtype=torch.bool)
    over_budget_R = torch.tensor([_over_budget(response, reward.over_budget_start, max_response_tokens) for response in responses])
    penalties_R = reward.repetition_penalty * repeated_R.float() + reward.format_penalty * malformed_R.float()
    penalties_R += reward.over_budget_penalty * over_budget_R
    length_rewards_R, rewards_R, advantages_R = group_statistics(
        correct_R.float() - penalties_R,
        torch.tensor([response.num_tokens for response in responses], dtype=torch.int32),
        correct_R,
        graded_R,
        torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32),
        length_weight=length_weight,
        baseline=loss.baseline,
        tau=loss.tau,
        normalise_std=loss.variant in ("grpo", "gspo"),
    )
    if loss.variant == "rest":
        advantages_R = correct_R.float()
    return Scores(rewards_R=rewards_R, length_rewards_R=length_rewards_R, advantages_R=advantages_R, graded_R=graded_R, group_sizes=sizes)


def _over_budget(response: Response, start: float, max_response_tokens: int) -> float:
    """Share of the over-budget penalty: 1 for a response that was cut, else rising linearly from `start` to the maximum length."""
    if response.stop is StopState.LENGTH:
        return 1.0
    if start >= 1:
        return 0.0
    return min(1.0, max(0.0, (response.num_tokens / max_response_tokens - start) / (1 - start)))
