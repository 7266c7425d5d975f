"""Stops a response that repeats itself, while it is decoded: the tests of `kernels/repetition` under the run's configuration."""

from collections.abc import Sequence

import numpy as np

from tandem.engine.config import RepetitionConfig
from tandem.kernels.repetition import BatchedDetector, Rule


def rule_of(config: RepetitionConfig) -> Rule:
    """The rule that the configuration names."""
    return Rule(
        max_period=config.max_period,
        min_repeats=config.min_repeats,
        min_tokens=config.min_tokens,
        ngram=config.ngram,
        ngram_threshold=config.ngram_threshold,
    )


class RepetitionDetector:
    """Watches one response, token by token, after the tokens `before` that it has already."""

    def __init__(self, config: RepetitionConfig, before: Sequence[int] = ()) -> None:
        self._rows = BatchedDetector(rule_of(config), 1)
        self._rows.reset(0, before)

    def push(self, token_id: int) -> bool:
        """Append a token. Returns: True when the response, as it stands, counts as repeating itself."""
        return bool(self._rows.push(np.array([token_id]))[0])
