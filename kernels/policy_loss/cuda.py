"""The CUDA C++ kernels of csrc/policy_loss.cu, and their C++ twin for the CPU, through ctypes.

Shapes: T tokens, R responses, G groups.
"""

import ctypes

import torch

from tandem.kernels.native import address, check_status, stream_of
from tandem.kernels.policy_loss.inputs import VARIANTS, Responses, Tokens


def loss_and_coefficients(library: ctypes.CDLL, x: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_R, d loss / d logprobs_T), fp32. One launch."""
    inputs = [None if tensor is None else tensor.contiguous() for tensor in x[:6]]
    losses_R, coefficients_T = (torch.empty_like(like, memory_format=torch.contiguous_format) for like in (x.advantages_R, x.logprobs_T))
    code = library.tandem_policy_loss(
        *map(address, (*inputs, losses_R, coefficients_T)),
        ctypes.c_int64(len(losses_R)),
        VARIANTS.index(x.variant),
        *map(ctypes.c_double, (x.tau, x.clip_low, x.clip_high)),
        stream_of(x.logprobs_T),
    )
    check_status(library, code, "policy_loss")
    return losses_R, coefficients_T


def group_statistics(library: ctypes.CDLL, x: Responses) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(length_rewards_R, rewards_R, advantages_R), fp32. One launch."""
    inputs = [tensor.contiguous() for tensor in x[:5]]
    outputs = [torch.empty_like(inputs[0]) for _ in range(3)]
    code = library.tandem_group_statistics(
        *map(address, (*inputs, *outputs)),
        ctypes.c_int64(len(x.cu_groups) - 1),
        *map(ctypes.c_double, (x.length_weight, x.tau)),
        int(x.baseline == "log_mean_exp"),
        int(x.normalise_std),
        stream_of(x.base_rewards_R),
    )
    check_status(library, code, "group_statistics")
    length_rewards_R, rewards_R, advantages_R = outputs
    return length_rewards_R, rewards_R, advantages_R
