"""Responses that repeat themselves, found while they decode or afterwards. Two tests, either of which fires.

Exact cycles, all periods p at once: `r[p] = r[p] + 1 if x_t == x_{t-p} else 0`. A run of r[p] matches means that the last
r[p] + p tokens have period p, so a cycle seen c times in a row has r[p] >= p * (c - 1).

Statistical: S = max(0, S + 1) for an n-gram that occurred before in the response, max(0, S - 1) for one that did not (a
CUSUM); fires when S > threshold. It finds loops whose turns differ in a few tokens.

Shapes: B rows of a batch, R responses, T tokens of all of them.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.operators import operator
from tandem.kernels.repetition import reference
from tandem.kernels.repetition.reference import BatchedDetector, Rule

__all__ = ["BatchedDetector", "Detector", "Rule", "first_repetition"]


class Detector:
    """Watches responses that decode in step, on the device of their tokens. On a GPU a step is one launch, and nothing waits for it.

    Args:
        num_rows: most responses at a time.
        max_tokens: of a response. On a GPU a row has a table of seen n-grams, of 8 bytes times the power of two above 4/3 of this; what a
            response has beyond it is still looked up there, but no more remembered.
        device: of the tokens.
    """

    def __init__(self, rule: Rule, num_rows: int, *, max_tokens: int, device: torch.device | str) -> None:
        for name, value in (("num_rows", num_rows), ("max_tokens", max_tokens)):
            if not 0 < value < 1 << 30:
                raise ValueError(f"{name} is {value}; it must be at least 1 and less than 2^30")
        self._num_rows, self._device = num_rows, torch.empty(0, device=device).device
        if runs_triton(torch.empty(0, device=device)):
            from tandem.kernels.repetition import triton

            self._rows = triton.Rows(rule, num_rows, max_tokens, self._device)
        else:
            self._rows = _HostRows(rule, num_rows)

    def push(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append a token to each of the first B rows. Returns: [B] bool, True where a test fires.

        Args:
            tokens_B: int32 or int64.
        """
        self._check("tokens_B", tokens_B)
        if len(tokens_B) > self._num_rows:
            raise ValueError(f"tokens_B has {len(tokens_B)} tokens; the detector has {self._num_rows} rows")
        return self._rows.push(tokens_B)

    def reset(self, rows: Sequence[int], tokens_T: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """Begin responses in these rows that have tokens already (resumed ones), as if they had been pushed. On a GPU one launch for all.

        Args:
            rows: R different rows.
            tokens_T: int32 or int64, of one response after the other.
            cu_seqlens: [R+1] int32, where the tokens of each begin, and T. Equal values: a response without tokens.
        """
        self._check("tokens_T", tokens_T)
        _check_offsets(tokens_T, cu_seqlens)
        if len(cu_seqlens) != len(rows) + 1 or len(set(rows)) < len(rows) or not all(0 <= row < self._num_rows for row in rows):
            found = f"rows is {list(rows)} and cu_seqlens has {len(cu_seqlens)} offsets"
            raise ValueError(f"{found}; rows must be different ones from 0 to {self._num_rows - 1}, one fewer than the offsets")
        self._rows.reset(rows, tokens_T, cu_seqlens)

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what `source` was; `source` must be reset before it is used again."""
        self._rows.move(source, target)

    def permute(self, order: np.ndarray) -> None:
        """Row i becomes what row order[i] was, for i < len(order); order is a permutation."""
        self._rows.permute(order)

    def _check(self, name: str, tokens: torch.Tensor) -> None:
        _check_tokens(name, tokens)
        if tokens.device != self._device:
            raise ValueError(f"{name} is on {tokens.device}; the detector is on {self._device}")


def first_repetition(tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, rule: Rule) -> torch.Tensor:
    """[R] int64: where in each response a test first fires when its tokens are pushed one by one, counted from 0; -1 where none does.

    Args:
        tokens_T: int32 or int64, of one response after the other.
        cu_seqlens: [R+1] int32, where each begins, and T. A response may be empty.
    Raises: ValueError for other dtypes, shapes or devices, and on a CPU for offsets that do not rise from 0 to T.
    """
    _check_tokens("tokens_T", tokens_T)
    _check_offsets(tokens_T, cu_seqlens)
    return _first_repetition(
        tokens_T, cu_seqlens, rule.max_period, rule.min_repeats, rule.min_tokens, rule.ngram, float(rule.ngram_threshold)
    )


@operator("first_repetition")
def _first_repetition(
    tokens_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_period: int,
    min_repeats: int,
    min_tokens: int,
    ngram: int,
    ngram_threshold: float,
) -> torch.Tensor:
    rule = Rule(max_period=max_period, min_repeats=min_repeats, min_tokens=min_tokens, ngram=ngram, ngram_threshold=ngram_threshold)
    if runs_triton(tokens_T):
        from tandem.kernels.repetition import triton

        return triton.first_repetition(tokens_T, cu_seqlens, rule)
    tokens, bounds = tokens_T.cpu().long().numpy(), cu_seqlens.tolist()
    found = [reference.first_repetition(tokens[start:end], rule) for start, end in itertools.pairwise(bounds)]
    return torch.tensor(found, dtype=torch.int64, device=tokens_T.device)


@_first_repetition.register_fake
def _(tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, *_: Any) -> torch.Tensor:
    return tokens_T.new_empty((len(cu_seqlens) - 1,), dtype=torch.int64)


def _check_tokens(name: str, tokens: torch.Tensor) -> None:
    if tokens.dim() != 1 or tokens.dtype not in (torch.int32, torch.int64) or not tokens.is_contiguous():
        found = f"{tuple(tokens.shape)} {tokens.dtype}{'' if tokens.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{name} is {found}; it must have one contiguous dimension of int32 or int64")


def _check_offsets(tokens_T: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Their values on a CPU only: on a GPU looking at them would wait for it."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != tokens_T.device:
        found = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens is {found}; it must be [R+1] torch.int32 on {tokens_T.device}, as tokens_T is")
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != len(tokens_T) or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens is {bounds[:8]}, ending at {bounds[-1]}; it must rise from 0 to {len(tokens_T)}, the tokens")


class _HostRows:
    """The NumPy detector between tensors."""

    def __init__(self, rule: Rule, num_rows: int) -> None:
        self._detector = BatchedDetector(rule, num_rows)
        self.move, self.permute = self._detector.move, self._detector.permute

    def push(self, tokens_B: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._detector.push(tokens_B.cpu().numpy())).to(tokens_B.device)

    def reset(self, rows: Sequence[int], tokens_T: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        tokens, bounds = tokens_T.cpu().numpy(), cu_seqlens.tolist()
        for row, start, end in zip(rows, bounds[:-1], bounds[1:], strict=True):
            self._detector.reset(row, tokens[start:end])
