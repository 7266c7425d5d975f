"""Linear log-prob in plain torch, a block of logits at a time, and what all implementations share: merging and the rank's targets.

The forward pass multiplies once with the weight, the backward pass three times, the single pass three times in all; plain torch, which
keeps the logits, three times. Their arithmetic alone is thus 4/3 of plain torch's for forward and backward, and 1 for the single pass;
what they save is traffic and page faults of [T, V], and oneDNN's products (`MIN_FAST_TERMS`). benchmarks/logprob.py measures both.

Shapes: T tokens, H hidden width, V this rank's part of the vocabulary, N parts of the vocabulary that are merged, P ranks that split it.
Products and sums are in fp32, or fp64 for fp64 operands.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

# Logits that exist at a time and columns among them. On a CPU 4 MiB of fp32, which its caches hold: with whole rows of 32k columns the
# forward pass takes a fifth longer. On a GPU 256 MiB, so that a product fills it.
BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}
BLOCK_COLUMNS = {"cpu": 2048, "cuda": 8192}
# Logits of whole rows that exist at a time where the gradient is computed in the forward pass: on a CPU 64 MiB. Each block of rows reads
# and writes the fp32 gradient of the whole weight.
ROW_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}
# Terms of the logits, T * V * H, from which a CPU computes products with oneDNN and exponentials by exp2. oneDNN's AVX-512 kernels in fp32
# run on every maker's chips, torch's own product (MKL) takes AVX2 on AMD's: 220 against 100 GFLOP/s on a core of Zen 5. But each shape
# that it has not seen costs a millisecond, and there are up to a dozen. Small problems, as those of tests, get the most exact digits.
MIN_FAST_TERMS = 1 << 31
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Exp = Callable[..., torch.Tensor]


def local_targets(targets_T: torch.Tensor, vocab_size: int, tp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Column of each target on this rank; outside of [0, V) if it is on another."""
    return targets_T - tp_group.rank() * vocab_size if tp_group is not None else targets_T


def merge(stats_N4T: torch.Tensor) -> torch.Tensor:
    """[4, T] of the union of N disjoint parts of the vocabulary, in their order.

    Per token: maximum of z, sum of exp(z - max), sum of exp(z - max) (z - max), z of the target or -inf where it is in another part.
    """
    if len(stats_N4T) == 1:
        return stats_N4T[0]
    max_T = stats_N4T[:, 0].amax(0)
    shift_NT = stats_N4T[:, 0] - max_T
    weight_NT = shift_NT.exp()
    weighted_NT = weight_NT * (stats_N4T[:, 2] + shift_NT * stats_N4T[:, 1])
    return torch.stack([max_T, (stats_N4T[:, 1] * weight_NT).sum(0), weighted_NT.sum(0), stats_N4T[:, 3].amax(0)])


def finish(stats_4T: torch.Tensor, tp_group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs_T, entropy_T, lse_T) of the whole vocabulary. One all-gather, merged in rank order: the same bits on all ranks."""
    if tp_group is not None:
        stats_P4T = stats_4T.new_empty((tp_group.size(), *stats_4T.shape))
        dist.all_gather_into_tensor(stats_P4T.flatten(0, 1), stats_4T.contiguous(), group=tp_group)
        stats_4T = merge(stats_P4T)
    max_T, sum_T, weighted_T, target_T = stats_4T
    log_sum_T = sum_T.log()
    # (z - max) - log sum, not z - lse: at large z the difference of large numbers would lose digits
    return target_T - max_T - log_sum_T, log_sum_T - weighted_T / sum_T, max_T + log_sum_T


def logprob_forward(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs_T, entropy_T, lse_T)."""
    num_tokens, vocab_size = hidden_TH.shape[0], weight_VH.shape[0]
    local_T = local_targets(targets_T, vocab_size, tp_group)
    product, exp = _functions_for(hidden_TH, weight_VH, temperature_T.dtype)
    parts = list(_column_blocks(hidden_TH, vocab_size))
    stats_N4T = temperature_T.new_empty((len(parts), 4, num_tokens))
    for stats_4T, columns in zip(stats_N4T, parts, strict=True):
        weight_vH = weight_VH[columns].to(temperature_T.dtype)
        for rows in _row_blocks(hidden_TH, len(weight_vH)):
            logits_tv = product(_scaled(hidden_TH, temperature_T, rows), weight_vH)
            _write_stats(stats_4T[:, rows], logits_tv, local_T[rows] - columns.start, exp)
    return finish(merge(stats_N4T), tp_group)


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
    """Gradients of hidden and weight: dz = (g_logprob (1[target] - p) - g_entropy p (log p + entropy)) / temperature.

    The factors that a row has in common are left to its hidden vector and its gradient: H numbers a token instead of V.
    """
    vocab_size = weight_VH.shape[0]
    local_T = local_targets(targets_T, vocab_size, tp_group)
    g_T = torch.zeros_like(lse_T) if grad_logprobs_T is None else grad_logprobs_T
    scale_T = -temperature_T.reciprocal() if grad_entropy_T is not None else -g_T / temperature_T
    product, exp = _functions_for(hidden_TH, weight_VH, lse_T.dtype)
    grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=lse_T.dtype)
    grad_weight_VH = torch.empty_like(weight_VH)
    for columns in _column_blocks(hidden_TH, vocab_size):
        weight_vH = weight_VH[columns].to(lse_T.dtype)
        grad_weight_vH = torch.zeros_like(weight_vH)
        for rows in _row_blocks(hidden_TH, len(weight_vH)):
            logp_tv = product(_scaled(hidden_TH, temperature_T, rows), weight_vH).sub_(lse_T[rows, None])
            if grad_entropy_T is None:
                dz_tv = exp(logp_tv, out=logp_tv)
                at_target_t = torch.ones_like(lse_T[rows])
            else:
                dz_tv = exp(logp_tv, out=torch.empty_like(logp_tv))
                dz_tv.mul_(logp_tv.add_(entropy_T[rows, None]).mul_(grad_entropy_T[rows, None]).add_(g_T[rows, None]))
                at_target_t = g_T[rows]
            _subtract_at(dz_tv, local_T[rows] - columns.start, at_target_t)
            grad_hidden_TH[rows] += product(dz_tv, weight_vH.T)
            grad_weight_vH += product(dz_tv.T, (hidden_TH[rows] * scale_T[rows, None]).T)
        grad_weight_VH[columns] = grad_weight_vH
    grad_hidden_TH *= scale_T[:, None]
    if tp_group is not None:
        dist.all_reduce(grad_hidden_TH, group=tp_group)
    return grad_hidden_TH.to(hidden_TH.dtype), grad_weight_VH


def logprob_with_gradient(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    coefficients_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs_T, entropy_T) and the gradients of sum(coefficients_T * logprobs_T); whole rows of logits are kept instead of recomputed.

    With a tp_group there is one all-gather for each block of rows.
    """
    vocab_size = weight_VH.shape[0]
    local_T = local_targets(targets_T, vocab_size, tp_group)
    weight_wide_VH = weight_VH.to(temperature_T.dtype)
    grad_weight_VH = torch.zeros_like(weight_wide_VH)
    grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=temperature_T.dtype)
    logprobs_T, entropy_T = torch.empty_like(temperature_T), torch.empty_like(temperature_T)
    scale_T = -coefficients_T / temperature_T
    product, exp = _functions_for(hidden_TH, weight_VH, temperature_T.dtype)
    parts = list(_column_blocks(hidden_TH, vocab_size))
    for rows in _whole_rows(hidden_TH, vocab_size):
        scaled_tH = _scaled(hidden_TH, temperature_T, rows)
        stats_N4t = temperature_T.new_empty((len(parts), 4, len(scaled_tH)))
        exp_Ntv = [
            _write_stats(stats_4t, product(scaled_tH, weight_wide_VH[columns]), local_T[rows] - columns.start, exp)
            for stats_4t, columns in zip(stats_N4t, parts, strict=True)
        ]
        logprobs_T[rows], entropy_T[rows], lse_t = finish(merge(stats_N4t), tp_group)
        hidden_tH = hidden_TH[rows] * scale_T[rows, None]
        for dz_tv, max_t, columns in zip(exp_Ntv, stats_N4t[:, 0], parts, strict=True):
            dz_tv.mul_((max_t - lse_t).exp()[:, None])
            _subtract_at(dz_tv, local_T[rows] - columns.start, torch.ones_like(lse_t))
            grad_hidden_TH[rows] += product(dz_tv, weight_wide_VH[columns].T)
            grad_weight_VH[columns] += product(dz_tv.T, hidden_tH.T)
    grad_hidden_TH *= scale_T[:, None]
    if tp_group is not None:
        dist.all_reduce(grad_hidden_TH, group=tp_group)
    return logprobs_T, entropy_T, grad_hidden_TH.to(hidden_TH.dtype), grad_weight_VH.to(weight_VH.dtype)


def _column_blocks(hidden_TH: torch.Tensor, vocab_size: int) -> Iterator[slice]:
    return _slices(vocab_size, BLOCK_COLUMNS["cuda" if hidden_TH.is_cuda else "cpu"])


def _row_blocks(hidden_TH: torch.Tensor, num_columns: int) -> Iterator[slice]:
    return _slices(hidden_TH.shape[0], BLOCK_LOGITS["cuda" if hidden_TH.is_cuda else "cpu"] // num_columns)


def _whole_rows(hidden_TH: torch.Tensor, vocab_size: int) -> Iterator[slice]:
    return _slices(hidden_TH.shape[0], ROW_LOGITS["cuda" if hidden_TH.is_cuda else "cpu"] // vocab_size)


def _slices(total: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _scaled(hidden_TH: torch.Tensor, temperature_T: torch.Tensor, rows: slice) -> torch.Tensor:
    """The rows over their temperatures, in the dtype of those: what the weight multiplies to give logits."""
    return hidden_TH[rows] / temperature_T[rows, None]


def _functions_for(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, dtype: torch.dtype) -> tuple[Product, Exp]:
    """left @ right.T and exp for a problem of this size: the fast ones of a CPU where they pay, otherwise torch's."""
    is_large = hidden_TH.numel() * len(weight_VH) >= MIN_FAST_TERMS
    if is_large and dtype == torch.float32 and not hidden_TH.is_cuda and torch.backends.mkldnn.is_available():
        return _onednn_product, _exp
    return lambda left, right: left @ right.T, torch.exp


def _onednn_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def _exp(x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """By torch.exp2, in a quarter of the time of torch.exp on a CPU. The product with log2(e) is rounded: relative error 2^-24 |x|."""
    return torch.mul(x, math.log2(math.e), out=out).exp2_()


def _write_stats(stats_4t: torch.Tensor, logits_tv: torch.Tensor, targets_t: torch.Tensor, exp: Exp) -> torch.Tensor:
    """What `merge` wants of one part of the vocabulary. Overwrites the logits; returns exp(logits - their maximum)."""
    max_t, sum_t, weighted_t, target_t = stats_4t
    here_t = (targets_t >= 0) & (targets_t < logits_tv.shape[1])
    target_t.copy_(logits_tv.gather(1, torch.where(here_t, targets_t, 0)[:, None])[:, 0].where(here_t, -torch.inf))
    torch.amax(logits_tv, 1, out=max_t)
    below_tv = logits_tv.sub_(max_t[:, None])
    exp_tv = exp(below_tv, out=torch.empty_like(below_tv))
    torch.sum(exp_tv, 1, out=sum_t)
    torch.sum(below_tv.mul_(exp_tv), 1, out=weighted_t)
    return exp_tv


def _subtract_at(values_tv: torch.Tensor, targets_t: torch.Tensor, amounts_t: torch.Tensor) -> None:
    """Subtract from each row at its target, where that is among its columns."""
    here_t = (targets_t >= 0) & (targets_t < values_tv.shape[1])
    values_tv.scatter_add_(1, torch.where(here_t, targets_t, 0)[:, None], torch.where(here_t, -amounts_t, 0.0)[:, None])
