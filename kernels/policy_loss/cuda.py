"""The CUDA C++ kernels of csrc/policy_loss.cu, and their C++ twin for the CPU, through ctypes.

Shapes: T tokens, R responses, G groups.
"""

import ctypes

import torch

from tandem.kernels.native import address, check_status, stream_of

VARIANTS = ("mirror_descent", "grpo", "ppo_clip", "gspo", "rest", "token_level")  # in the order of csrc/policy_loss.h


def loss_and_coefficients(
    library: ctypes.CDLL,
    logprobs_T: torch.Tensor,
    reference_logprobs_T: torch.Tensor,
    advantages_R: torch.Tensor,
    cu_seqlens: torch.Tensor,
    loss_mask_T: torch.Tensor | None,
    importance_weights_T: torch.Tensor | None,
    *,
    variant: str,
    tau: float,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_R, d loss / d logprobs_T), fp32. One launch."""
    inputs = [tensor.contiguous() for tensor in (logprobs_T, reference_logprobs_T, advantages_R, cu_seqlens)]
    mask_T = loss_mask_T.contiguous() if loss_mask_T is not None else None
    weights_T = importance_weights_T.contiguous() if importance_weights_T is not None else None
    losses_R, coefficients_T = torch.empty_like(inputs[2]), torch.empty_like(inputs[0])
    code = library.tandem_policy_loss(
        *map(address, (*inputs, mask_T, weights_T, losses_R, coefficients_T)),
        ctypes.c_int64(len(losses_R)),
        VARIANTS.index(variant),
        *map(ctypes.c_double, (tau, clip_low, clip_high)),
        stream_of(logprobs_T),
    )
    check_status(library, code, "policy_loss")
    return losses_R, coefficients_T


def group_statistics(
    library: ctypes.CDLL,
    base_rewards_R: torch.Tensor,
    lengths_R: torch.Tensor,
    correct_R: torch.Tensor,
    graded_R: torch.Tensor,
    cu_groups: torch.Tensor,
    *,
    length_weight: float,
    baseline: str,
    tau: float,
    normalise_std: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(length_rewards_R, rewards_R, advantages_R), fp32. One launch."""
    inputs = [tensor.contiguous() for tensor in (base_rewards_R, lengths_R, correct_R, graded_R, cu_groups)]
    outputs = [torch.empty_like(inputs[0]) for _ in range(3)]
    code = library.tandem_group_statistics(
        *map(address, (*inputs, *outputs)),
        ctypes.c_int64(len(cu_groups) - 1),
        *map(ctypes.c_double, (length_weight, tau)),
        int(baseline == "log_mean_exp"),
        int(normalise_std),
        stream_of(base_rewards_R),
    )
    check_status(library, code, "group_statistics")
    length_rewards_R, rewards_R, advantages_R = outputs
    return length_rewards_R, rewards_R, advantages_R
