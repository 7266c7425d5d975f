"""Sampling by counter: the token at position p of a request is a pure function of (seed, p) and the logits."""

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
# Rows of a wide vocabulary are sampled in parts, so that the float64 intermediates stay near 128 MiB.
_ELEMENTS_AT_ONCE = 1 << 24


def uniforms(seeds_B: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
    """[B] uint64 seeds and [B] positions → [B] float64 in [0, 1), by splitmix64 of the mixed seed."""
    mixed = _splitmix64(seeds_B.astype(np.uint64))
    bits = _splitmix64(mixed + positions_B.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def sample(
    logits_BV: torch.Tensor, uniforms_B: np.ndarray, temperatures_B: np.ndarray, *, top_k: int, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token per row.

    A temperature of 0 takes the likeliest token (the lowest id among equals). Others are drawn by inverting the cumulative
    distribution softmax(logits / temperature), restricted to the top_k likeliest tokens (0: all) and, of those, to the
    fewest likeliest whose probabilities *under the whole softmax* reach top_p.

    Returns: tokens [B] int64 and log-probs [B] float32 under the whole temperature-scaled softmax, not renormalised for
    top_k and top_p; of greedy rows at temperature 1.
    """
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // logits_BV.shape[1])
    parts = [
        _sample_rows(logits_BV[i : i + rows_at_once], uniforms_B[i : i + rows_at_once], temperatures_B[i : i + rows_at_once], top_k, top_p)
        for i in range(0, len(logits_BV), rows_at_once)
    ]
    tokens, logprobs = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(logprobs)


def _sample_rows(
    logits: torch.Tensor, uniform: np.ndarray, temperature: np.ndarray, top_k: int, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    greedy = temperature == 0
    if np.any(temperature != np.where(greedy, 0, 1)):
        logits = logits / torch.from_numpy(np.where(greedy, 1, temperature).astype(np.float32))[:, None]
    logprobs = torch.log_softmax(logits.double(), dim=-1)  # in fp32 it would round to the size of the largest logit
    if greedy.all():
        tokens = logits.argmax(-1)
    else:
        tokens = _inverse_cdf(logprobs, torch.from_numpy(uniform), top_k, top_p)
        if greedy.any():
            tokens = torch.where(torch.from_numpy(greedy), logits.argmax(-1), tokens)
    return tokens.numpy(), logprobs.gather(1, tokens[:, None]).squeeze(1).float().numpy()


def _inverse_cdf(logprobs: torch.Tensor, uniform: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    probabilities = logprobs.exp()
    order = None
    if top_k or top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        if top_k:
            probabilities[:, top_k:] = 0.0
    cumulative = probabilities.cumsum(-1)
    # Strictly below the total, so that the first entry above the target is a token that may be drawn.
    target = (uniform[:, None] * cumulative[:, -1:]).minimum(cumulative[:, -1:].nextafter(torch.zeros_like(uniform[:, None])))
    tokens = torch.searchsorted(cumulative, target, right=True)
    return (tokens if order is None else order.gather(1, tokens)).squeeze(1)
