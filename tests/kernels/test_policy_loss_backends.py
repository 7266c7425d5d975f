"""Every implementation of the policy losses and group statistics against the reference in fp64, on ragged, masked and extreme input."""

from typing import Any

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.kernels import backend
from tandem.kernels.native import library
from tandem.kernels.policy_loss import Variant, group_statistics, policy_loss

VARIANTS: list[Variant] = ["mirror_descent", "grpo", "ppo_clip", "gspo", "rest", "token_level"]
needs_compiler = pytest.mark.skipif(library(DEVICE) is None, reason="csrc was not built: no compiler")
BACKENDS = [pytest.param("native", marks=needs_compiler), "triton"]


def losses(seed: int, lengths: list[int], *, masked: float, weighted: bool, spread: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    reference_T = -3 * torch.rand(num_tokens, generator=generator)
    logprobs_T = reference_T + spread * torch.randn(num_tokens, generator=generator)
    mask_T = torch.rand(num_tokens, generator=generator) >= masked
    logprobs_T[~mask_T], reference_T[~mask_T] = float("nan"), float("inf")  # a masked token may hold anything
    weights_T = 0.25 + torch.rand(num_tokens, generator=generator) if weighted else None
    return {
        "logprobs_T": logprobs_T,
        "reference_logprobs_T": reference_T,
        "advantages_R": torch.randn(len(lengths), generator=generator),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "loss_mask_T": mask_T if masked else None,
        "importance_weights_T": weights_T,
    }


def run(case: dict[str, Any], variant: Variant, dtype: torch.dtype, choice: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and the gradient of their weighted sum."""
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).to(DEVICE) for name, value in case.items() if value is not None
    }
    x = tensors.pop("logprobs_T").requires_grad_()
    with backend.chosen(choice):
        loss_R = policy_loss(x, variant=variant, tau=0.3, clip_low=0.2, clip_high=0.28, **tensors)
    factors_R = torch.arange(1, len(loss_R) + 1, device=DEVICE, dtype=dtype)
    (grad_T,) = torch.autograd.grad((loss_R * factors_R).sum(), x)
    return loss_R.detach().cpu().double(), grad_T.cpu().double()


CASES = {
    "ragged": {"lengths": [5, 1, 17, 0, 3], "masked": 0.4, "weighted": True, "spread": 0.3},
    "long": {"lengths": [1025, 2048, 3], "masked": 0.1, "weighted": False, "spread": 0.1},
    "far off": {"lengths": [9, 30], "masked": 0.0, "weighted": True, "spread": 6.0},
    "all masked": {"lengths": [4, 2], "masked": 1.0, "weighted": False, "spread": 0.1},
    "one token": {"lengths": [1], "masked": 0.0, "weighted": False, "spread": 0.1},
    "no response": {"lengths": [], "masked": 0.0, "weighted": False, "spread": 0.1},
    "empty responses": {"lengths": [0, 0], "masked": 0.0, "weighted": False, "spread": 0.1},
}


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_reference_in_fp64(name: str, variant: Variant, choice: Any) -> None:
    case = losses(7, **CASES[name])
    expected, expected_grad = run(case, variant, torch.float64, "reference")
    for found, exact in zip(run(case, variant, torch.float32, choice), (expected, expected_grad), strict=True):
        assert torch.allclose(found, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()) if exact.numel() else 0.0)


@pytest.mark.parametrize("choice", BACKENDS)
def test_a_response_cut_into_microbatches_elsewhere_gives_the_same_bits(choice: Any) -> None:
    case = losses(3, lengths=[40, 7, 1300], masked=0.2, weighted=True, spread=0.2)
    whole = run(case, "mirror_descent", torch.float32, choice)
    again = run(case, "mirror_descent", torch.float32, choice)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    last = {name: value[47:] if name.endswith("_T") else value[2:] for name, value in case.items() if name != "cu_seqlens"}
    alone, _ = run(last | {"cu_seqlens": torch.tensor([0, 1300], dtype=torch.int32)}, "mirror_descent", torch.float32, choice)
    assert torch.equal(alone, whole[0][2:])


def groups(seed: int, sizes: list[int], *, graded: float = 0.8, equal_lengths: bool = False, equal_rewards: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    num_responses = sum(sizes)
    correct_R = torch.rand(num_responses, generator=generator) < 0.5
    return {
        "base_rewards_R": torch.ones(num_responses) / 3 if equal_rewards else correct_R.float(),
        "lengths_R": torch.full((num_responses,), 7, dtype=torch.int32)
        if equal_lengths
        else torch.randint(0, 100_000, (num_responses,), generator=generator, dtype=torch.int32),
        "correct_R": correct_R,
        "graded_R": torch.rand(num_responses, generator=generator) < graded,
        "cu_groups": torch.tensor([0, *sizes]).cumsum(0).int(),
    }


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"baseline": "log_mean_exp", "tau": 0.05}, {"normalise_std": True}], ids=["mean", "exp", "std"])
@pytest.mark.parametrize(
    "case",
    [
        groups(1, [8, 1, 0, 64, 3]),
        groups(2, [70, 130]),
        groups(3, [4, 4], equal_lengths=True),
        groups(4, [5, 5], equal_lengths=True, equal_rewards=True, graded=1.0),
        groups(5, [6], graded=0.0),
        groups(6, []),
    ],
    ids=["ragged", "large", "equal lengths", "no signal", "none graded", "empty"],
)
def test_group_statistics_are_those_of_the_reference(case: dict[str, Any], options: dict[str, Any], choice: Any) -> None:
    on_device = {name: value.to(DEVICE) for name, value in case.items()}
    with backend.chosen("reference"):
        expected = group_statistics(**on_device, length_weight=0.4, **options)
    with backend.chosen(choice):
        found = group_statistics(**on_device, length_weight=0.4, **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
        assert not a[~on_device["graded_R"]].any()
    if case["cu_groups"].tolist() == [0, 5, 10]:
        assert not found[2].any(), "equal rewards give exactly 0"


def test_wrong_input_is_named_before_anything_runs() -> None:
    case = losses(1, **CASES["ragged"])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"advantages_R": case["advantages_R"].half()}, r"advantages_R is \(5,\) torch.float16 on cpu; it must be \(5,\) torch.float32"),
        ({"reference_logprobs_T": case["reference_logprobs_T"][1:]}, r"reference_logprobs_T is \(25,\) .*; it must be \(26,\)"),
        ({"loss_mask_T": torch.ones(26)}, r"loss_mask_T is \(26,\) torch.float32 .*torch.bool"),
        ({"cu_seqlens": torch.tensor([0, 26], dtype=torch.int32)}, r"cu_seqlens has 2 entries; 5 responses need 6"),
        ({"cu_seqlens": torch.tensor([0, 9, 4, 10, 20, 26], dtype=torch.int32)}, r"it must rise from 0 to 26"),
        ({"cu_seqlens": case["cu_seqlens"].long()}, r"cu_seqlens is \(6,\) torch.int64"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            policy_loss(**(case | change), tau=0.1)
    with pytest.raises(ValueError, match="variant is 'ppo'"):
        policy_loss(**case, tau=0.1, variant="ppo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"tau is 0\.0"):
        group_statistics(**groups(1, [3]), baseline="log_mean_exp")
