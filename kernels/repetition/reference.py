"""The repetition tests in NumPy: what a CPU runs, also while it decodes.

An n-gram is identified by 64 bits of a linear hash with fixed, irregular coefficients; two different ones of a response are taken for
one with a probability of about 2^-64 for each pair. The Triton form compares the same 64 bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a response counts as repeating itself."""

    max_period: int  # of a cycle, in tokens; 0: cycles are not looked for
    min_repeats: int  # of a cycle in a row
    min_tokens: int  # that a cycle's repeats must cover together
    ngram: int  # length; 0: no test of n-grams
    ngram_threshold: float  # fires when the running sum of seen before (+1) and not (-1), which stays at or above 0, exceeds it

    def __post_init__(self) -> None:
        for name, least in (("max_period", 0), ("min_repeats", 2), ("ngram", 0), ("ngram_threshold", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")

    def needed(self) -> Ints:
        """[max_period]: of each period, how many tokens in a row equal the one a period before them when the rule fires."""
        period = np.arange(1, self.max_period + 1)
        # Enough for min_repeats cycles and, with the tokens of the first cycle, for min_tokens.
        return np.maximum(period * (self.min_repeats - 1), self.min_tokens - period)

    def sum_limit(self) -> int:
        """The largest sum of n-grams that passes; sums are whole numbers."""
        return math.floor(min(self.ngram_threshold, np.iinfo(np.int32).max))

    def coefficients(self) -> NDArray[np.uint64]:
        """[ngram], of the hash; the newest token's first."""
        return np.random.default_rng(0x7A9DE3).integers(1 << 63, size=self.ngram, dtype=np.uint64) | np.uint64(1)


class BatchedDetector:
    """Watches up to `num_rows` responses that decode in step: row i of every array belongs to response i."""

    def __init__(self, rule: Rule, num_rows: int) -> None:
        self._rule = rule
        self._needed = rule.needed().astype(np.int32)
        self._sum_limit = rule.sum_limit()
        self._coefficients = rule.coefficients()
        self._recent = np.full((num_rows, max(rule.max_period, rule.ngram, 1)), -1, dtype=np.int64)  # newest first
        self._runs = np.zeros((num_rows, rule.max_period), dtype=np.int32)
        self._num_tokens = np.zeros(num_rows, dtype=np.int64)
        self._cusum = np.zeros(num_rows, dtype=np.int64)
        self._seen: list[set[int]] = [set() for _ in range(num_rows)]

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens[i] (any integer type) to row i, for i < len(tokens). Returns: bool [len(tokens)], True where a test fires."""
        rule, num_rows = self._rule, len(tokens)
        fired = np.zeros(num_rows, dtype=bool)
        recent = self._recent[:num_rows]
        if rule.max_period:
            runs = self._runs[:num_rows]
            runs += 1
            runs *= recent[:, : rule.max_period] == tokens[:, None]
            fired |= (runs >= self._needed).any(axis=1)
        recent[:, 1:] = recent[:, :-1]
        recent[:, 0] = tokens
        self._num_tokens[:num_rows] += 1
        if rule.ngram:
            hashes = _hash(recent[:, : rule.ngram], self._coefficients).tolist()
            steps = np.zeros(num_rows, dtype=np.int64)
            for row in np.flatnonzero(self._num_tokens[:num_rows] >= rule.ngram).tolist():
                seen = self._seen[row]
                steps[row] = 1 if hashes[row] in seen else -1
                seen.add(hashes[row])
            cusum = self._cusum[:num_rows]
            np.maximum(cusum + steps, 0, out=cusum)
            fired |= cusum > self._sum_limit
        return fired

    def reset(self, row: int, tokens: Sequence[int] | np.ndarray = ()) -> None:
        """Begin a response in `row` that has these tokens already (a resumed one), as if they had been pushed."""
        rule = self._rule
        x = np.asarray(tokens, dtype=np.int64)
        newest = x[::-1][: self._recent.shape[1]]
        self._recent[row] = -1
        self._recent[row, : len(newest)] = newest
        self._num_tokens[row] = len(x)
        self._runs[row] = 0
        for period in range(1, min(rule.max_period, len(x) - 1) + 1):
            self._runs[row, period - 1] = len(x) - period - 1 - _breaks(x, period)[-1]
        hashes, cusum = _ngram_sums(x, rule)
        self._seen[row] = set(hashes.tolist())
        self._cusum[row] = cusum[-1] if len(cusum) else 0

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what `source` was; `source` is then free."""
        for array in (self._recent, self._runs, self._num_tokens, self._cusum):
            array[target] = array[source]
        self._seen[target], self._seen[source] = self._seen[source], set()

    def permute(self, order: np.ndarray) -> None:
        """Row i becomes what row order[i] was, for i < len(order)."""
        for array in (self._recent, self._runs, self._num_tokens, self._cusum):
            array[: len(order)] = array[order]
        self._seen[: len(order)] = [self._seen[i] for i in order.tolist()]


def first_repetition(x: Ints, rule: Rule) -> int:
    """The index of the token of one response at which a test first fires; -1 if none does."""
    found = []
    for period, needed in enumerate(rule.needed().tolist(), 1):
        if period + needed > len(x):
            break  # longer periods need longer runs
        ends = np.append(_breaks(x, period), len(x) - period)
        long = np.flatnonzero(np.diff(ends) > needed)
        if len(long):
            found.append(int(ends[long[0]]) + needed + period)
    _, cusum = _ngram_sums(x, rule)
    high = np.flatnonzero(cusum > rule.sum_limit())
    if len(high):
        found.append(int(high[0]) + rule.ngram - 1)
    return min(found, default=-1)


def _breaks(x: Ints, period: int) -> Ints:
    """-1 and every i where x[i + period] differs from x[i]: between two of them lies a run of tokens that repeat."""
    return np.concatenate([[-1], np.flatnonzero(x[period:] != x[: len(x) - period])])


def _ngram_sums(x: Ints, rule: Rule) -> tuple[NDArray[np.uint64], Ints]:
    """The hash and the running sum of each n-gram of a response, in order."""
    if not rule.ngram or len(x) < rule.ngram:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    hashes = _hash(np.lib.stride_tricks.sliding_window_view(x, rule.ngram)[:, ::-1], rule.coefficients())
    _, first = np.unique(hashes, return_index=True)
    steps = np.ones(len(hashes), dtype=np.int64)
    steps[first] = -1
    walk = steps.cumsum()
    # Held at 0 whenever it would fall below: the walk above its lowest point so far.
    return hashes, walk - np.minimum(np.minimum.accumulate(walk), 0)


def _hash(ngrams: Ints, coefficients: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[…] of […, ngram]. It is never 0, which marks a free cell of the Triton form's table."""
    return np.maximum((ngrams.astype(np.uint64) * coefficients).sum(axis=-1), 1)
