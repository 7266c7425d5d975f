"""Log-probs and entropy of the softmax over a linear layer, without ever holding the logits of all tokens.

Shapes: T tokens, H hidden width, V vocabulary (this rank's part of it with `tp_group`).
"""

from typing import Any

import torch
import torch.distributed as dist

from tandem.kernels.logprob import reference

__all__ = ["linear_logprob"]


def linear_logprob(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of that softmax.

    Args:
        hidden_TH: [T, H] fp32, bf16 or fp16; the same on every rank of tp_group.
        weight_VH: [V, H] of the same dtype; with tp_group this rank's consecutive V rows of V * tp.
        targets_T: [T] int64 in [0, V * tp).
        temperature: positive; one for all, or [T] one per token.
        tp_group: ranks that split the vocabulary. The gradient of hidden_TH is summed over them, so it is whole on each.
    Returns: (logprobs_T, entropy_T), fp32 nats, both differentiable in hidden_TH and weight_VH, equal bit for bit on all ranks.
    Raises: ValueError if shapes do not fit.
    """
    if hidden_TH.shape[1] != weight_VH.shape[1] or targets_T.shape != hidden_TH.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden_TH.shape)}, weight {tuple(weight_VH.shape)}, targets {tuple(targets_T.shape)} do not fit: "
            "need [T,H], [V,H], [T]"
        )
    temperature_T = torch.as_tensor(temperature, dtype=torch.float32, device=hidden_TH.device).expand(hidden_TH.shape[0])
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    return _LinearLogprob.apply(hidden_TH, weight_VH, targets_T, temperature_T, tp_group)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor, temperature_T: torch.Tensor, tp_group: Any
    ) -> Any:
        logprobs_T, entropy_T, lse_T = reference.logprob_forward(hidden_TH, weight_VH, targets_T, temperature_T, tp_group)
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, temperature_T, lse_T, entropy_T)
        ctx.tp_group = tp_group
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_logprobs_T, grad_entropy_T = grad_outputs
        hidden_TH, weight_VH, targets_T, temperature_T, lse_T, entropy_T = ctx.saved_tensors
        grad_hidden_TH, grad_weight_VH = reference.logprob_backward(
            grad_logprobs_T, grad_entropy_T, hidden_TH, weight_VH, targets_T, temperature_T, lse_T, entropy_T, ctx.tp_group
        )
        return grad_hidden_TH, grad_weight_VH, None, None, None
