"""The length reward of Kimi k1.5 (arXiv:2501.12599, 2.3.3). Shapes: R responses."""

import torch

from tandem.engine.algo.grouping import by_group
from tandem.kernels.policy_loss import group_statistics


def length_reward(lengths_R: torch.Tensor, correct_R: torch.Tensor, group_R: torch.Tensor) -> torch.Tensor:
    """Favour short answers among the responses of one prompt, and punish long wrong ones.

    lambda = 0.5 - (len - min_len) / (max_len - min_len) over the group, wrong responses included. A correct response gets lambda,
    in [-0.5, 0.5]; a wrong one min(0, lambda), in [-0.5, 0]. A group of equal lengths (k = 1 among them) gets 0.

    Args:
        lengths_R: [R] tokens of each response, 0 allowed.
        correct_R: [R] bool.
        group_R: [R] integers; responses with the same number share a prompt. Need not be sorted or dense.
    Returns: reward_R, [R] fp32, without weight. Empty for R = 0.
    Raises: ValueError if the shapes differ, a length is negative, or correct_R is not bool.
    """
    if not lengths_R.shape == correct_R.shape == group_R.shape or lengths_R.dim() != 1:
        shapes = [tuple(tensor.shape) for tensor in (lengths_R, correct_R, group_R)]
        raise ValueError(f"lengths_R, correct_R and group_R have the shapes {shapes}; all must be [R] with one R")
    if correct_R.dtype != torch.bool:
        raise ValueError(f"correct_R is {correct_R.dtype}; it must be torch.bool")
    if lengths_R.numel() and lengths_R.min() < 0:
        raise ValueError(f"the length of response {int(lengths_R.argmin())} is {int(lengths_R.min())}; it must not be negative")
    order_R, cu_groups = by_group(group_R)
    graded_R, base_R = torch.ones_like(correct_R), torch.zeros_like(lengths_R, dtype=torch.float32)
    reward_R, _, _ = group_statistics(base_R, lengths_R[order_R].int(), correct_R[order_R], graded_R, cu_groups)
    return torch.empty_like(reward_R).index_copy_(0, order_R, reward_R)
