"""From rewards to advantages to policy losses: statistics per prompt's group, one loss per response, one coefficient per token.

Two launches on a GPU: `group_statistics` and `policy_loss`, whose gradient is made in its forward pass.
Shapes: T tokens, R responses, G groups.
"""

from typing import Any, Literal

import torch

from tandem.kernels.backend import runs_native, runs_triton
from tandem.kernels.native import library_for
from tandem.kernels.operators import operator
from tandem.kernels.policy_loss import cuda, reference
from tandem.kernels.policy_loss.inputs import VARIANTS, Responses, Tokens

__all__ = ["Baseline", "Variant", "group_statistics", "normaliser_of", "policy_loss"]

Variant = Literal["mirror_descent", "grpo", "ppo_clip", "gspo", "rest", "token_level"]
Baseline = Literal["mean", "log_mean_exp"]


def normaliser_of(variant: Variant) -> Literal["responses", "tokens"]:
    """What the sum of a variant's loss over all responses is divided by: their number, or that of their trained tokens."""
    return "tokens" if variant in ("ppo_clip", "token_level") else "responses"


def group_statistics(
    base_rewards_R: torch.Tensor,
    lengths_R: torch.Tensor,
    correct_R: torch.Tensor,
    graded_R: torch.Tensor,
    cu_groups: torch.Tensor,
    *,
    length_weight: float = 0.0,
    baseline: Baseline = "mean",
    tau: float = 0.0,
    normalise_std: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Length rewards, rewards and advantages of the responses, group by group (Kimi k1.5, arXiv:2501.12599, 2.3.2 and 2.3.3).

    - length reward: lambda = 0.5 - (len - min_len) / (max_len - min_len) over the group, wrong responses included; a correct response
      gets lambda, a wrong one min(0, lambda), a group of equal lengths 0.
    - reward: base reward + length_weight * length reward.
    - advantage: reward minus the baseline, which is the mean of the group's rewards, or log_mean_exp, tau * log(mean(exp(r / tau))), the
      paper's estimate of tau * log Z. A group of equal rewards gets exactly 0. With `normalise_std` it is divided by the group's
      standard deviation plus 1e-6 (GRPO, arXiv:2402.03300).

    Args:
        base_rewards_R: [R] fp32, finite.
        lengths_R: [R] int32, tokens of each response.
        correct_R, graded_R: [R] bool. A response that is not graded counts nowhere and gets 0.
        cu_groups: [G+1] int32 offsets into R; an empty group is allowed.
        tau: temperature of log_mean_exp, positive there.
    Returns: (length_rewards_R, rewards_R, advantages_R), fp32.
    Raises: ValueError if shapes, dtypes or devices do not fit, or tau is missing.
    """
    num_responses = base_rewards_R.shape[0]
    for name, tensor, dtype in (
        ("base_rewards_R", base_rewards_R, torch.float32),
        ("lengths_R", lengths_R, torch.int32),
        ("correct_R", correct_R, torch.bool),
        ("graded_R", graded_R, torch.bool),
    ):
        _check_tensor(name, tensor, (num_responses,), dtype, base_rewards_R.device)
    _check_offsets("cu_groups", cu_groups, None, num_responses, base_rewards_R.device)
    if baseline == "log_mean_exp" and tau <= 0:
        raise ValueError(f"tau is {tau}; baseline=log_mean_exp divides by it, so it must be positive")
    return _group_statistics(base_rewards_R, lengths_R, correct_R, graded_R, cu_groups, length_weight, baseline, tau, normalise_std)


@operator("group_statistics", Responses)
def _group_statistics(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = Responses(*arguments)
    if runs_triton(x.base_rewards_R):
        from tandem.kernels.policy_loss import triton

        return triton.group_statistics(x)
    library = library_for(x.base_rewards_R) if runs_native(x.base_rewards_R) else None
    return reference.group_statistics(x) if library is None else cuda.group_statistics(library, x)


@_group_statistics.register_fake
def _(base_rewards_R: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(base_rewards_R), torch.empty_like(base_rewards_R), torch.empty_like(base_rewards_R)


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} is {found}; it must be {shape} {dtype} on {device}")


def _check_offsets(name: str, offsets: torch.Tensor, num_parts: int | None, total: int, device: torch.device) -> None:
    """Their values are looked at on a CPU only: on a GPU that would wait for the device."""
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype != torch.int32 or offsets.device != device:
        raise ValueError(f"{name} is {tuple(offsets.shape)} {offsets.dtype} on {offsets.device}; it must be [n+1] torch.int32 on {device}")
    if num_parts is not None and len(offsets) != num_parts + 1:
        raise ValueError(f"{name} has {len(offsets)} entries; {num_parts} responses need {num_parts + 1}")
    if not offsets.is_cuda and (int(offsets[0]) or int(offsets[-1]) != total or bool((offsets.diff() < 0).any())):
        raise ValueError(f"{name} is {offsets.tolist()[:8]}…, ending at {int(offsets[-1])}; it must rise from 0 to {total}")


def policy_loss(
    logprobs_T: torch.Tensor,
    reference_logprobs_T: torch.Tensor,
    advantages_R: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    tau: float,
    loss_mask_T: torch.Tensor | None = None,
    variant: Variant = "mirror_descent",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_weights_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each response, to be minimised. S is the sum of a response's log-probs, A its advantage, ρ = log π - log π_ref.

    - mirror_descent: -(A S - τ/2 (S - S_ref)²), equation 3 of Kimi k1.5 (arXiv:2501.12599, 2.3.2): the sum over the tokens, neither
      divided by the length nor clipped. The sum over the responses of a group divided by k is the paper's (1/k) Σ.
    - grpo: mean over the tokens of -min(r A, clip(r) A), r = exp(ρ) of one token (arXiv:2402.03300 without its KL term).
    - ppo_clip: the same, summed over the tokens.
    - gspo: -min(s A, clip(s) A), s = exp(mean of ρ over the tokens) (arXiv:2507.18071).
    - rest: -A S with A in {0, 1}: fits the responses kept.
    - token_level: summed over the tokens, -clip(r) A + τ (log r)². The clip stops the gradient of a token that left the interval whatever
      the sign of A, and the squared log-ratio draws it back (the token-level form of Kimi K2.5).

    Args:
        logprobs_T, reference_logprobs_T: [T] fp32 nats. The reference is the policy at the iteration's start.
        advantages_R: [R] fp32, already length-penalised and centred within the prompt's group.
        cu_seqlens: [R+1] int32 offsets into T; an empty response is allowed and has the loss 0.
        tau: weight of the squared log-ratio (mirror_descent, token_level); 0 disables it.
        loss_mask_T: [T] bool, tokens that count. None: all.
        clip_low, clip_high: a ratio is clipped to [1 - clip_low, 1 + clip_high] (grpo, ppo_clip, gspo, token_level).
        importance_weights_T: [T] fp32 constants, factors of the tokens' terms; a gspo response takes their mean. None: all 1.
    Returns: loss_R, [R] fp32, not averaged (see `normaliser_of`). Differentiable in logprobs_T only.
    Raises: ValueError if shapes, dtypes or devices do not fit, or for an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be {', '.join(VARIANTS)}")
    device, shape = logprobs_T.device, tuple(logprobs_T.shape)
    dtype = logprobs_T.dtype if logprobs_T.dtype == torch.float64 else torch.float32  # fp64: the reference, for checks
    for name, tensor in (("logprobs_T", logprobs_T), ("reference_logprobs_T", reference_logprobs_T)):
        _check_tensor(name, tensor, shape, dtype, device)
    _check_tensor("advantages_R", advantages_R, tuple(advantages_R.shape), dtype, device)
    if loss_mask_T is not None:
        _check_tensor("loss_mask_T", loss_mask_T, shape, torch.bool, device)
    if importance_weights_T is not None:
        _check_tensor("importance_weights_T", importance_weights_T, shape, dtype, device)
    _check_offsets("cu_seqlens", cu_seqlens, advantages_R.shape[0], logprobs_T.shape[0], device)
    constants = (reference_logprobs_T.detach(), advantages_R, cu_seqlens, loss_mask_T, importance_weights_T)
    x = Tokens(logprobs_T, *constants, variant, tau, clip_low, clip_high)
    if dtype == torch.float32 and (runs_triton(logprobs_T) or (runs_native(logprobs_T) and library_for(logprobs_T) is not None)):
        return _loss_and_coefficients(*x)[0]
    return reference.policy_loss(x)


@operator("policy_loss", Tokens)
def _loss_and_coefficients(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_R, d loss / d logprobs_T)."""
    x = Tokens(*arguments)
    if runs_triton(x.logprobs_T):
        from tandem.kernels.policy_loss import triton

        return triton.loss_and_coefficients(x)
    library = library_for(x.logprobs_T)
    assert library is not None
    return cuda.loss_and_coefficients(library, x)


@_loss_and_coefficients.register_fake
def _(logprobs_T: torch.Tensor, _: torch.Tensor, advantages_R: torch.Tensor, *__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(advantages_R), torch.empty_like(logprobs_T)


def _keep_coefficients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, coefficients_T = output
    ctx.save_for_backward(coefficients_T, inputs[3])
    ctx.mark_non_differentiable(coefficients_T)


def _times_coefficients(ctx: Any, grad_R: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    coefficients_T, cu_seqlens = ctx.saved_tensors
    grad_T = torch.repeat_interleave(grad_R, cu_seqlens.diff().long(), output_size=len(coefficients_T))
    return grad_T * coefficients_T, *[None] * 9


_loss_and_coefficients.register_autograd(_times_coefficients, keep=_keep_coefficients)
