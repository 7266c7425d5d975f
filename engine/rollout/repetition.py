"""Stops a response that repeats itself, while it is decoded. Two tests, either of which fires.

Exact cycles, all periods p at once: `r[p] = r[p] + 1 if x_t == x_{t-p} else 0`. A run of r[p] matches means that the last
r[p] + p tokens have period p, so a cycle seen c times in a row has r[p] >= p * (c - 1).

Statistical: S = max(0, S + 1) for an n-gram that occurred before in the response, max(0, S - 1) for one that did not (a
CUSUM); fires when S > threshold. It finds loops whose turns differ in a few tokens.
"""

from collections.abc import Sequence

import numpy as np

from tandem.engine.config import RepetitionConfig


class BatchedRepetitionDetector:
    """Watches up to `num_rows` responses that decode in step: row i of every array belongs to response i."""

    def __init__(self, config: RepetitionConfig, num_rows: int) -> None:
        self._config = config
        self._periods = np.arange(1, config.max_period + 1)
        # r[p] is large enough for min_repeats cycles and, with the p tokens of the first cycle, for min_tokens.
        self._needed = np.maximum(self._periods * (config.min_repeats - 1), config.min_tokens - self._periods).astype(np.int32)
        self._recent = np.full((num_rows, max(config.max_period, config.ngram, 1)), -1, dtype=np.int64)  # newest first
        self._runs = np.zeros((num_rows, config.max_period), dtype=np.int32)
        self._num_tokens = np.zeros(num_rows, dtype=np.int64)
        self._cusum = np.zeros(num_rows, dtype=np.int64)
        self._seen: list[set[int]] = [set() for _ in range(num_rows)]
        # An n-gram is identified by 64 bits of a linear hash with fixed, irregular coefficients.
        self._coefficients = np.random.default_rng(0x7A9DE3).integers(1 << 63, size=config.ngram, dtype=np.uint64) | np.uint64(1)

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens[i] (any integer type) to row i, for i < len(tokens). Returns: bool [len(tokens)], True where a test fires."""
        config, num_rows = self._config, len(tokens)
        fired = np.zeros(num_rows, dtype=bool)
        recent = self._recent[:num_rows]
        if config.max_period:
            runs = self._runs[:num_rows]
            runs += 1
            runs *= recent[:, : config.max_period] == tokens[:, None]
            fired |= (runs >= self._needed).any(axis=1)
        recent[:, 1:] = recent[:, :-1]
        recent[:, 0] = tokens
        self._num_tokens[:num_rows] += 1
        if config.ngram:
            hashes = (recent[:, : config.ngram].astype(np.uint64) * self._coefficients).sum(axis=1).tolist()
            steps = np.zeros(num_rows, dtype=np.int64)
            for row in np.flatnonzero(self._num_tokens[:num_rows] >= config.ngram).tolist():
                steps[row] = self._step(self._seen[row], hashes[row])
            cusum = self._cusum[:num_rows]
            np.maximum(cusum + steps, 0, out=cusum)
            fired |= cusum > config.ngram_threshold
        return fired

    def reset(self, row: int, tokens: Sequence[int] = ()) -> None:
        """Begin a response in `row` that has these tokens already (a resumed one), as if they had been pushed."""
        config = self._config
        x = np.asarray(tokens, dtype=np.int64)
        newest = x[::-1][: self._recent.shape[1]]
        self._recent[row] = -1
        self._recent[row, : len(newest)] = newest
        self._num_tokens[row] = len(x)
        self._runs[row] = 0
        for period in range(1, min(config.max_period, len(x) - 1) + 1):
            mismatches = np.flatnonzero(x[period:] != x[:-period])
            self._runs[row, period - 1] = len(x) - period - (mismatches[-1] + 1 if len(mismatches) else 0)
        seen: set[int] = set()
        cusum = 0
        if config.ngram and len(x) >= config.ngram:
            windows = np.lib.stride_tricks.sliding_window_view(x, config.ngram)[:, ::-1].astype(np.uint64)
            for value in (windows * self._coefficients).sum(axis=1).tolist():
                cusum = max(0, cusum + self._step(seen, value))
        self._seen[row] = seen
        self._cusum[row] = cusum

    @staticmethod
    def _step(seen: set[int], value: int) -> int:
        if value in seen:
            return 1
        seen.add(value)
        return -1

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


class RepetitionDetector:
    """Watches one response, token by token."""

    def __init__(self, config: RepetitionConfig) -> None:
        self._rows = BatchedRepetitionDetector(config, 1)

    def push(self, token_id: int) -> bool:
        """Append a token. Returns: True when the response, as it stands, counts as repeating itself."""
        return bool(self._rows.push(np.array([token_id]))[0])
