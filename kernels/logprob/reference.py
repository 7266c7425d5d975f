"""Linear log-prob in plain torch, a slab of tokens at a time.

Shapes: T tokens, H hidden width, V this rank's part of the vocabulary, P ranks of the group that splits it.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

# Logits that exist at a time (16 MiB of fp32).
SLAB_LOGITS = 1 << 22


def _slabs(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, SLAB_LOGITS // vocab_size)
    return (slice(i, min(i + step, num_tokens)) for i in range(0, num_tokens, step))


def _local_targets(targets_T: torch.Tensor, vocab_size: int, tp_group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target on this rank (0 if it is elsewhere), and whether it is here."""
    local_T = targets_T - (tp_group.rank() * vocab_size if tp_group is not None else 0)
    here_T = (local_T >= 0) & (local_T < vocab_size)
    return torch.where(here_T, local_T, 0), here_T


def logprob_forward(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs_T, entropy_T, lse_T), fp32."""
    num_tokens, vocab_size = hidden_TH.shape[0], weight_VH.shape[0]
    local_T, here_T = _local_targets(targets_T, vocab_size, tp_group)
    # Per token: maximum, sum of exp(z - max), sum of exp(z - max) (z - max), z of the target. Merged over ranks in rank order.
    stats_4T = hidden_TH.new_empty((4, num_tokens), dtype=torch.float32)
    for slab in _slabs(num_tokens, vocab_size):
        logits_TV = (hidden_TH[slab] @ weight_VH.T).float().div_(temperature_T[slab, None])
        target_T = logits_TV.gather(1, local_T[slab, None])[:, 0]
        max_T = logits_TV.amax(1)
        logits_TV.sub_(max_T[:, None])
        exp_TV = logits_TV.exp()
        stats_4T[0, slab], stats_4T[1, slab] = max_T, exp_TV.sum(1)
        stats_4T[2, slab] = exp_TV.mul_(logits_TV).sum(1)
        stats_4T[3, slab] = torch.where(here_T[slab], target_T, 0.0)
    if tp_group is not None:
        stats_P4T = stats_4T.new_empty((tp_group.size(), 4, num_tokens))
        dist.all_gather_into_tensor(stats_P4T.flatten(0, 1), stats_4T, group=tp_group)
        max_T = stats_P4T[:, 0].amax(0)
        shift_PT = stats_P4T[:, 0] - max_T
        weight_PT = shift_PT.exp()
        sum_T = (stats_P4T[:, 1] * weight_PT).sum(0)
        weighted_T = (weight_PT * (stats_P4T[:, 2] + shift_PT * stats_P4T[:, 1])).sum(0)
        target_T = stats_P4T[:, 3].sum(0)
    else:
        max_T, sum_T, weighted_T, target_T = stats_4T
    log_sum_T = sum_T.log()
    return target_T - max_T - log_sum_T, log_sum_T - weighted_T / sum_T, max_T + log_sum_T


def logprob_backward(
    grad_logprobs_T: torch.Tensor | None,
    grad_entropy_T: torch.Tensor | None,
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    lse_T: torch.Tensor,
    entropy_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight: dz = (g_logprob (1[target] - p) - g_entropy p (log p + entropy)) / temperature."""
    num_tokens, vocab_size = hidden_TH.shape[0], weight_VH.shape[0]
    local_T, here_T = _local_targets(targets_T, vocab_size, tp_group)
    grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
    for slab in _slabs(num_tokens, vocab_size) if grad_logprobs_T is not None or grad_entropy_T is not None else ():
        logp_TV = (hidden_TH[slab] @ weight_VH.T).float().div_(temperature_T[slab, None]).sub_(lse_T[slab, None])
        p_TV = logp_TV.exp()
        if grad_entropy_T is None:
            dz_TV = p_TV
            factor_T = torch.zeros_like(lse_T[slab]) if grad_logprobs_T is None else grad_logprobs_T[slab]
            dz_TV.mul_(-factor_T[:, None])
        else:
            factor_TV = logp_TV.add_(entropy_T[slab, None]).mul_(grad_entropy_T[slab, None])
            if grad_logprobs_T is not None:
                factor_TV.add_(grad_logprobs_T[slab, None])
            dz_TV = p_TV.mul_(factor_TV).neg_()
        if grad_logprobs_T is not None:
            dz_TV.scatter_add_(1, local_T[slab, None], torch.where(here_T[slab], grad_logprobs_T[slab], 0.0)[:, None])
        dz_TV.div_(temperature_T[slab, None])
        dz_TV = dz_TV.to(weight_VH.dtype)
        grad_hidden_TH[slab] = (dz_TV @ weight_VH).float()
        if weight_VH.dtype == torch.float32:
            grad_weight_VH.addmm_(dz_TV.T, hidden_TH[slab])
        else:
            grad_weight_VH += (dz_TV.T @ hidden_TH[slab]).float()
    if tp_group is not None:
        dist.all_reduce(grad_hidden_TH, group=tp_group)
    return grad_hidden_TH.to(hidden_TH.dtype), grad_weight_VH.to(weight_VH.dtype)
