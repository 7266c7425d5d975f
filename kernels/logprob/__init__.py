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
from tandem.kernels.operators import operator

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
        logprobs_T, entropy_T, _ = _forward(hidden_TH, weight_VH, targets_T, temperature_T, _name_of(tp_group))
        return logprobs_T, entropy_T
    if valid_T.dtype != torch.bool or valid_T.shape != targets_T.shape:
        raise ValueError(f"valid_T is {valid_T.dtype} {tuple(valid_T.shape)}; it must be bool {tuple(targets_T.shape)}, as targets_T")
    rows_M = valid_T.nonzero()[:, 0]
    found = _forward(hidden_TH[rows_M], weight_VH, targets_T[rows_M], temperature_T[rows_M], _name_of(tp_group))
    stats_2M = torch.stack(found[:2])
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
    total, logprobs_T, entropy_T, _, _ = _sum(hidden_TH, weight_VH, targets_T, temperature_T, coefficients_T, _name_of(tp_group))
    return total, logprobs_T, entropy_T


@operator("linear_logprob")
def _forward(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor, temperature_T: torch.Tensor, tp_group: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs_T, entropy_T, lse_T)."""
    return _implementation(hidden_TH).logprob_forward(hidden_TH, weight_VH, targets_T, temperature_T, _group_of(tp_group))


@_forward.register_fake
def _(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor, temperature_T: torch.Tensor, tp_group: str | None) -> Any:
    return tuple(torch.empty_like(temperature_T) for _ in range(3))


@operator("linear_logprob_backward")
def _backward(
    grad_logprobs_T: torch.Tensor | None,
    grad_entropy_T: torch.Tensor | None,
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    lse_T: torch.Tensor,
    entropy_T: torch.Tensor,
    tp_group: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    backward = _implementation(hidden_TH).logprob_backward
    saved = (hidden_TH, weight_VH, targets_T, temperature_T, lse_T, entropy_T)
    return backward(grad_logprobs_T, grad_entropy_T, *saved, _group_of(tp_group))


@_backward.register_fake
def _(
    grad_logprobs_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden_TH), torch.empty_like(weight_VH)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.tp_group = inputs
    _, entropy_T, lse_T = output
    ctx.save_for_backward(*tensors, lse_T, entropy_T)
    ctx.mark_non_differentiable(lse_T)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_logprobs_T: Any, grad_entropy_T: Any, _: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_logprobs_T is None and grad_entropy_T is None:
        return (None,) * 5
    return *_backward(grad_logprobs_T, grad_entropy_T, *ctx.saved_tensors, ctx.tp_group), None, None, None


_forward.register_autograd(_gradients, keep=_keep)


@operator("linear_logprob_sum")
def _sum(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    coefficients_T: torch.Tensor,
    tp_group: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum, logprobs_T, entropy_T) and the gradients of the sum."""
    with_gradient = _implementation(hidden_TH).logprob_with_gradient
    inputs = (hidden_TH, weight_VH, targets_T, temperature_T, coefficients_T)
    logprobs_T, entropy_T, grad_hidden_TH, grad_weight_VH = with_gradient(*inputs, _group_of(tp_group))
    return (coefficients_T * logprobs_T).sum(), logprobs_T, entropy_T, grad_hidden_TH, grad_weight_VH


@_sum.register_fake
def _(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, _: torch.Tensor, temperature_T: torch.Tensor, *__: Any) -> Any:
    likes = (temperature_T, temperature_T, hidden_TH, weight_VH)
    return temperature_T.new_empty(()), *map(torch.empty_like, likes)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scaled_gradients(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    gradients: Any = (None, None) if grad is None else ctx.saved_tensors
    # A product with the usual 1 would be one more copy of the weight's size. The value on a GPU, or while traced, is not looked at.
    if grad is not None and not (type(grad) is torch.Tensor and not grad.is_cuda and grad.item() == 1):
        gradients = [gradient * grad for gradient in gradients]
    return *gradients, None, None, None, None


_sum.register_autograd(_scaled_gradients, keep=_keep_gradients)


def _name_of(tp_group: dist.ProcessGroup | None) -> str | None:
    """Operators take names: a group is no type of theirs."""
    return None if tp_group is None else tp_group.group_name


def _group_of(name: str | None) -> dist.ProcessGroup | None:
    resolve: Any = dist.distributed_c10d
    return None if name is None else resolve._resolve_process_group(name)


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
