"""What the kernels of this package compute from: one list of arguments for all implementations and for torch's operators.

Shapes: T tokens, R responses, G groups. Meanings and types are in the package's two functions.
"""

from typing import NamedTuple

import torch

VARIANTS = ("mirror_descent", "grpo", "ppo_clip", "gspo", "rest", "token_level")  # in the order of csrc/policy_loss.h


class Responses(NamedTuple):
    """Of `group_statistics`."""

    base_rewards_R: torch.Tensor
    lengths_R: torch.Tensor
    correct_R: torch.Tensor
    graded_R: torch.Tensor
    cu_groups: torch.Tensor
    length_weight: float
    baseline: str
    tau: float
    normalise_std: bool


class Tokens(NamedTuple):
    """Of `policy_loss`."""

    logprobs_T: torch.Tensor
    reference_logprobs_T: torch.Tensor
    advantages_R: torch.Tensor
    cu_seqlens: torch.Tensor
    loss_mask_T: torch.Tensor | None
    importance_weights_T: torch.Tensor | None
    variant: str
    tau: float
    clip_low: float
    clip_high: float
