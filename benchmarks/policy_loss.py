"""From rewards to the gradient of the mirror-descent loss: group statistics, losses and coefficients; against plain and compiled torch.

python benchmarks/policy_loss.py [--case mirror] [--out DIR]        options: benchmarks/harness.py
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Subject, compiled, main
from tandem.kernels.backend import Backend, chosen
from tandem.kernels.native import library
from tandem.kernels.policy_loss import group_statistics, policy_loss

TAU, LENGTH_WEIGHT, RESPONSES_PER_GROUP = 0.1, 0.5, 8
# A token's log-prob, reference and importance weight are read and its gradient is written in fp32; its mask is one byte.
BYTES_PER_TOKEN = 4 * 4 + 1


class Inputs(NamedTuple):
    logprobs_T: torch.Tensor
    reference_T: torch.Tensor
    weights_T: torch.Tensor
    mask_T: torch.Tensor
    rewards_R: torch.Tensor
    lengths_R: torch.Tensor  # int32
    cu_seqlens: torch.Tensor
    cu_groups: torch.Tensor


Outputs = tuple[torch.Tensor, ...]
Run = Callable[[Any], Outputs]


def _inputs(num_tokens: int, num_responses: int, device: torch.device) -> Inputs:
    """Responses of random lengths, a tenth of the tokens masked."""
    cuts = torch.randperm(num_tokens - 1)[: num_responses - 1].sort().values + 1
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([num_tokens])]).int()
    reference_T = -3 * torch.rand(num_tokens, device=device)
    return Inputs(
        (reference_T + 0.05 * torch.randn(num_tokens, device=device)).requires_grad_(),
        reference_T,
        0.5 + torch.rand(num_tokens, device=device),
        torch.rand(num_tokens, device=device) > 0.1,
        (torch.rand(num_responses, device=device) < 0.5).float(),
        cu_seqlens.diff().to(device),
        cu_seqlens.to(device),
        torch.arange(0, num_responses + 1, RESPONSES_PER_GROUP, dtype=torch.int32, device=device),
    )


def _ours(x: Inputs) -> Outputs:
    graded_R = torch.ones_like(x.rewards_R, dtype=torch.bool)
    correct_R = x.rewards_R > 0.5
    _, _, advantages_R = group_statistics(x.rewards_R, x.lengths_R, correct_R, graded_R, x.cu_groups, length_weight=LENGTH_WEIGHT)
    loss_R = policy_loss(
        x.logprobs_T, x.reference_T, advantages_R, x.cu_seqlens, tau=TAU, loss_mask_T=x.mask_T, importance_weights_T=x.weights_T
    )
    return loss_R.detach(), torch.autograd.grad(loss_R, x.logprobs_T, torch.ones_like(loss_R))[0]


def _losses(x: Inputs) -> torch.Tensor:
    """As one writes it in torch: equal groups, and sums over responses by their index."""
    lengths_GK = x.lengths_R.to(x.rewards_R.dtype).view(-1, RESPONSES_PER_GROUP)
    shortest_G1, longest_G1 = lengths_GK.amin(1, keepdim=True), lengths_GK.amax(1, keepdim=True)
    lambda_GK = 0.5 - (lengths_GK - shortest_G1) / (longest_G1 - shortest_G1)
    rewards_GK = x.rewards_R.view_as(lengths_GK)
    rewards_GK = rewards_GK + LENGTH_WEIGHT * torch.where(rewards_GK > 0.5, lambda_GK, lambda_GK.clamp(max=0))
    advantages_R = (rewards_GK - rewards_GK.mean(1, keepdim=True)).flatten()
    response_T = torch.repeat_interleave(x.lengths_R.long(), output_size=len(x.logprobs_T))
    factor_T = x.weights_T * x.mask_T

    def per_response(values_T: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(advantages_R).index_add(0, response_T, factor_T * values_T)

    log_ratio_R = per_response(x.logprobs_T - x.reference_T)
    return -(advantages_R * per_response(x.logprobs_T) - TAU / 2 * log_ratio_R.square())


def _with_gradient(losses: Callable[[Inputs], torch.Tensor]) -> Run:
    def run(x: Inputs) -> Outputs:
        loss_R = losses(x)
        return loss_R.detach(), torch.autograd.grad(loss_R.sum(), x.logprobs_T)[0]

    return run


def _in_fp64(x: Inputs) -> Inputs:
    wide = [tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in x]
    wide[0].requires_grad_()
    return Inputs(*wide)


def _by(choice: Backend) -> Run:
    def run(x: Inputs) -> Outputs:
        with chosen(choice):
            return _ours(x)

    return run


def cases(device: torch.device) -> list[Case]:
    """The smallest first."""
    plain = _with_gradient(_losses)
    runs: dict[str, Run] = {"kernel": _ours, "reference": _by("reference"), "plain torch": plain}
    if device.type == "cuda":
        runs["torch.compile"] = _with_gradient(compiled(_losses))
        if library("cuda") is not None:
            runs["CUDA C++"] = _by("native")
    sizes = [(4096, 16), (65_536, 64)] if device.type == "cpu" else [(65_536, 64), (1 << 20, 512)]

    def sized(num_tokens: int, num_responses: int) -> Case:
        return Case(
            name="mirror descent",
            shape={"T": num_tokens, "R": num_responses},
            dtype=torch.float32,
            flop=0,
            bytes=BYTES_PER_TOKEN * num_tokens,
            inputs=lambda device: _inputs(num_tokens, num_responses, device),
            exact=lambda x: plain(_in_fp64(x)),
            tolerances=(2e-5, 2e-5),  # of plain sums in fp32 over a response; ours are in fp64
            runs=runs,
        )

    return [sized(*size) for size in sizes]


SUBJECT = Subject(name="policy_loss", about="group statistics, policy loss and its gradient", cases=cases)

if __name__ == "__main__":
    main(SUBJECT)
