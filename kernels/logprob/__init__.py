"""Log-probs and entropy of the softmax over a linear layer, without ever holding the logits of all tokens.

Shapes: T tokens, H hidden width, V vocabulary (this rank's part of it with `tp_group`).

Triton computes the logits tile by tile on a GPU; everywhere else, plain torch does it a block at a time (`backend.choose`).
Sums are in fp32 and in a fixed order: the same inputs give the same bits.
"""

from typing import Any

import torch
import torch.distributed as dist

from tandem.kernels import backend
from tandem.kernels.logprob import reference

__all__ = ["linear_logprob", "linear_logprob_sum"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_logprob(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    valid_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of that softmax.

    The backward pass computes the logits again.

    Args:
        hidden_TH: [T, H] fp32, bf16 or fp16 (fp64 without Triton), contiguous; the same on every rank of tp_group.
        weight_VH: [V, H] of the same dtype, contiguous; with tp_group this rank's consecutive V rows of V * tp.
        targets_T: [T] int64 in [0, V * tp).
        temperature: positive; one for all, or [T] one per token.
        tp_group: ranks that split the vocabulary. The gradient of hidden_TH is summed over them, so it is whole on each.
        valid_T: [T] bool; the other tokens cost nothing, their outputs and gradients are 0. On a GPU the host waits for their number;
            pass compacted rows instead where that matters.
    Returns: (logprobs_T, entropy_T), fp32 nats (fp64 for fp64), both differentiable in hidden_TH and weight_VH, equal bit for bit on
        all ranks.
    Raises: ValueError if shapes, dtypes, devices or layout do not fit, or, on a CPU, for a target or a temperature out of range. On a
        GPU the host does not look at values: a target that no rank has gets log-prob -inf.
    """
    temperature_T, tp_group = _checked(hidden_TH, weight_VH, targets_T, temperature, tp_group)
    if valid_T is None:
        return _LinearLogprob.apply(hidden_TH, weight_VH, targets_T, temperature_T, tp_group)
    if valid_T.dtype != torch.bool or valid_T.shape != targets_T.shape:
        raise ValueError(f"valid_T is {valid_T.dtype} {tuple(valid_T.shape)}; it must be bool {tuple(targets_T.shape)}, as targets_T")
    rows_M = valid_T.nonzero()[:, 0]
    stats_2M = torch.stack(_LinearLogprob.apply(hidden_TH[rows_M], weight_VH, targets_T[rows_M], temperature_T[rows_M], tp_group))
    logprobs_T, entropy_T = stats_2M.new_zeros((2, len(targets_T))).index_copy(1, rows_M, stats_2M)
    return logprobs_T, entropy_T


def linear_logprob_sum(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    coefficients_T: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum(coefficients_T * logprobs_T), whose gradient is computed in the forward pass: the logits are computed once, not twice.

    For losses whose gradient in the log-probs is known beforehand: token-level ones, and the first on-policy minibatch, where the
    log-ratio is 0. Holds an fp32 gradient of the weight and whole rows of logits meanwhile (`reference.ROW_LOGITS`); with tp_group
    there is an all-gather for each block of rows.

    Args:
        coefficients_T: [T] fp32, constants.
        The others: as in `linear_logprob`.
    Returns: (sum, logprobs_T, entropy_T); only the sum, a scalar, is differentiable (once).
    Raises: ValueError as `linear_logprob`.
    """
    temperature_T, tp_group = _checked(hidden_TH, weight_VH, targets_T, temperature, tp_group)
    if coefficients_T.shape != targets_T.shape or coefficients_T.dtype != temperature_T.dtype:
        raise ValueError(
            f"coefficients_T is {coefficients_T.dtype} {tuple(coefficients_T.shape)}; "
            f"it must be {temperature_T.dtype} {tuple(targets_T.shape)}, one for each target"
        )
    return _LinearLogprobSum.apply(hidden_TH, weight_VH, targets_T, temperature_T, coefficients_T, tp_group)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor, temperature_T: torch.Tensor, tp_group: Any
    ) -> Any:
        forward = _implementation(hidden_TH).logprob_forward
        logprobs_T, entropy_T, lse_T = forward(hidden_TH, weight_VH, targets_T, temperature_T, tp_group)
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, temperature_T, lse_T, entropy_T)
        ctx.tp_group = tp_group
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_logprobs_T, grad_entropy_T = grad_outputs
        if grad_logprobs_T is None and grad_entropy_T is None:
            return None, None, None, None, None
        hidden_TH, weight_VH, targets_T, temperature_T, lse_T, entropy_T = ctx.saved_tensors
        grad_hidden_TH, grad_weight_VH = _implementation(hidden_TH).logprob_backward(
            grad_logprobs_T, grad_entropy_T, hidden_TH, weight_VH, targets_T, temperature_T, lse_T, entropy_T, ctx.tp_group
        )
        return grad_hidden_TH, grad_weight_VH, None, None, None


class _LinearLogprobSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        temperature_T: torch.Tensor,
        coefficients_T: torch.Tensor,
        tp_group: Any,
    ) -> Any:
        with_gradient = _implementation(hidden_TH).logprob_with_gradient
        logprobs_T, entropy_T, *grads = with_gradient(hidden_TH, weight_VH, targets_T, temperature_T, coefficients_T, tp_group)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(logprobs_T, entropy_T)
        return (coefficients_T * logprobs_T).sum(), logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_hidden_TH, grad_weight_VH = ctx.saved_tensors
        return grad_hidden_TH * grad_outputs[0], grad_weight_VH * grad_outputs[0], None, None, None, None


def _implementation(hidden_TH: torch.Tensor) -> Any:
    if backend.runs_triton(hidden_TH):
        from tandem.kernels.logprob import triton

        return triton
    return reference


def _checked(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature: float | torch.Tensor,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, dist.ProcessGroup | None]:
    """temperature_T, and the group unless it is one rank. Reads values on a CPU only."""
    if hidden_TH.ndim != 2 or weight_VH.ndim != 2 or hidden_TH.shape[1] != weight_VH.shape[1] or targets_T.shape != hidden_TH.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden_TH.shape)}, weight {tuple(weight_VH.shape)}, targets {tuple(targets_T.shape)} do not fit: "
            "need [T,H], [V,H], [T]"
        )
    if hidden_TH.dtype not in _DTYPES or weight_VH.dtype != hidden_TH.dtype or targets_T.dtype != torch.int64:
        raise ValueError(
            f"hidden is {hidden_TH.dtype}, weight {weight_VH.dtype}, targets {targets_T.dtype}: "
            "need hidden and weight of one floating dtype, and torch.int64"
        )
    if not hidden_TH.device == weight_VH.device == targets_T.device:
        raise ValueError(f"hidden is on {hidden_TH.device}, weight on {weight_VH.device}, targets on {targets_T.device}: need one device")
    for name, tensor in (("hidden", hidden_TH), ("weight", weight_VH)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()} at shape {tuple(tensor.shape)}; it must be contiguous")
    if not len(weight_VH) or not weight_VH.shape[1]:
        raise ValueError(f"weight is {tuple(weight_VH.shape)}; it needs a row for each token of the vocabulary, and a width")
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    wide = torch.promote_types(hidden_TH.dtype, torch.float32)
    if isinstance(temperature, torch.Tensor):
        temperature_T = temperature.to(hidden_TH.device, wide)
    else:
        temperature_T = targets_T.new_full((), temperature, dtype=wide)
    if temperature_T.ndim and temperature_T.shape != targets_T.shape:
        raise ValueError(f"temperature has shape {tuple(temperature_T.shape)}; it must be one number or {tuple(targets_T.shape)}")
    if targets_T.device.type == "cpu" and len(targets_T):
        vocab_size = len(weight_VH) * (tp_group.size() if tp_group is not None else 1)
        low, high = targets_T.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"targets are in [{low}, {high}]; they must be in [0, {vocab_size}), the vocabulary of hidden's logits")
        if not (temperature_T > 0).all():
            raise ValueError(f"temperature is {temperature_T.min().item()} at the least; it must be above 0")
    return temperature_T.expand(hidden_TH.shape[0]).contiguous(), tp_group
