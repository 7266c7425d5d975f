"""Policy losses by hand and against formulas written response by response in fp64."""

import math

import pytest
import torch

from tandem.kernels import policy_loss as kernel
from tandem.kernels.policy_loss import Variant, group_statistics, normaliser_of, policy_loss, reference
from tandem.kernels.policy_loss.inputs import Tokens

TAU, LOW, HIGH = 0.4, 0.2, 0.3


def test_mirror_descent_by_hand() -> None:
    # S = -3, S_ref = -2.5, A = 2: -(2 * -3 - 0.1 / 2 * 0.25) = 6.0125. The empty response gives 0.
    logprobs_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 2], dtype=torch.int32)
    loss_R = policy_loss(logprobs_T, torch.tensor([-0.5, -2.0]), torch.tensor([2.0, 5.0]), cu_seqlens, tau=0.1)
    assert torch.allclose(loss_R, torch.tensor([6.0125, 0.0]))
    # -(A - tau (S - S_ref)) = -(2 + 0.1 * 0.5), the same for each token of the response
    (grad_T,) = torch.autograd.grad(loss_R.sum(), logprobs_T)
    assert torch.allclose(grad_T, torch.tensor([-2.05, -2.05]))


def _one(variant: str, lp: torch.Tensor, ref: torch.Tensor, adv: torch.Tensor, mask: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    lp, ref, w = lp[mask], ref[mask], w[mask]
    if not len(lp):
        return adv * 0
    if variant == "mirror_descent":
        return -(adv * (w * lp).sum() - TAU / 2 * (w * (lp - ref)).sum() ** 2)
    if variant == "rest":
        return -adv * (w * lp).sum()
    if variant == "token_level":
        return (w * (-(lp - ref).exp().clamp(1 - LOW, 1 + HIGH) * adv + TAU * (lp - ref) ** 2)).sum()
    ratio = (lp - ref).mean().exp() if variant == "gspo" else (lp - ref).exp()
    term = -torch.min(ratio * adv, ratio.clamp(1 - LOW, 1 + HIGH) * adv)
    if variant == "gspo":
        return term * w.mean()
    return (w * term).mean() if variant == "grpo" else (w * term).sum()


@pytest.mark.parametrize("variant", ["mirror_descent", "grpo", "ppo_clip", "gspo", "rest", "token_level"])
def test_every_variant_equals_its_formula_with_gradient(variant: Variant) -> None:
    torch.manual_seed(1)
    lengths = [4, 0, 1, 7, 3]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    reference_T = -2 * torch.rand(sum(lengths))
    logprobs_T = reference_T + 0.4 * torch.randn(sum(lengths))
    mask_T = torch.rand(sum(lengths)) < 0.7
    mask_T[4] = False  # the response of one token is empty after masking
    weights_T, advantages_R = 0.5 + torch.rand(sum(lengths)), torch.randn(len(lengths))
    x = logprobs_T.clone().requires_grad_()
    loss_R = policy_loss(
        x,
        reference_T,
        advantages_R,
        cu_seqlens,
        tau=TAU,
        loss_mask_T=mask_T,
        variant=variant,
        clip_low=LOW,
        clip_high=HIGH,
        importance_weights_T=weights_T,
    )
    y = logprobs_T.double().requires_grad_()
    parts = [x.split(lengths) for x in (y, reference_T.double(), mask_T, weights_T.double())]
    wanted_R = torch.stack([_one(variant, p[0], p[1], a, p[2], p[3]) for *p, a in zip(*parts, advantages_R.double(), strict=True)])
    assert torch.allclose(loss_R.double(), wanted_R, rtol=1e-6, atol=1e-7)
    assert torch.allclose(torch.autograd.grad(loss_R.sum(), x)[0].double(), torch.autograd.grad(wanted_R.sum(), y)[0], rtol=1e-6, atol=1e-7)
    assert not loss_R[1]


def test_masked_tokens_may_be_anything() -> None:
    logprobs_T = torch.tensor([-1.0, -math.inf], requires_grad=True)
    mask_T = torch.tensor([True, False])
    loss_R = policy_loss(logprobs_T, logprobs_T, torch.ones(1), torch.tensor([0, 2], dtype=torch.int32), tau=TAU, loss_mask_T=mask_T)
    assert loss_R.tolist() == [1.0]
    assert torch.autograd.grad(loss_R.sum(), logprobs_T)[0].tolist() == [-1.0, 0.0]


def test_token_level_losses_are_divided_by_tokens() -> None:
    assert normaliser_of("ppo_clip") == normaliser_of("token_level") == "tokens"
    assert normaliser_of("mirror_descent") == "responses"


def test_where_csrc_was_not_built_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "library_for", lambda tensor: None)
    logprobs_T, cu_seqlens = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True), torch.tensor([0, 2, 3], dtype=torch.int32)
    inputs = (logprobs_T, torch.tensor([-0.5, -2.0, -0.5]), torch.tensor([2.0, -1.0]), cu_seqlens)
    found = policy_loss(*inputs, tau=0.1)
    assert torch.equal(found, reference.policy_loss(Tokens(*inputs, None, None, "mirror_descent", 0.1, 0.2, 0.2)))
    assert torch.allclose(torch.autograd.grad(found.sum(), logprobs_T)[0], torch.tensor([-2.05, -2.05, 1.0]))
    flags, cu_groups = torch.tensor([True, False]), torch.tensor([0, 2], dtype=torch.int32)
    _, rewards_R, advantages_R = group_statistics(flags.float(), torch.tensor([3, 3], dtype=torch.int32), flags, ~flags | flags, cu_groups)
    assert rewards_R.tolist() == [1.0, 0.0]
    assert advantages_R.tolist() == [0.5, -0.5]
