"""The detector of a rollout finds what its configuration describes. How the tests behave in a batch: tests/kernels/test_repetition.py."""

import random

import pytest

from tandem.engine.config import RepetitionConfig
from tandem.engine.rollout.repetition import RepetitionDetector, rule_of
from tests.kernels.test_repetition import firing, loopy_text

CONFIGS = [
    RepetitionConfig(max_period=6, min_repeats=3, min_tokens=8, ngram=3, ngram_threshold=6),
    RepetitionConfig(max_period=6, min_repeats=3, min_tokens=0, ngram=0),
    RepetitionConfig(max_period=0, ngram=4, ngram_threshold=5),
    RepetitionConfig(max_period=0, ngram=0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_push_agrees_with_the_definition(config: RepetitionConfig) -> None:
    rng = random.Random(1)
    for _ in range(4):
        text, detector = loopy_text(rng, 60), RepetitionDetector(config)
        assert [detector.push(token) for token in text] == firing(text, rule_of(config))


def test_a_cycle_fires_when_it_was_seen_min_repeats_times() -> None:
    detector = RepetitionDetector(RepetitionConfig(max_period=4, min_repeats=3, min_tokens=0, ngram=0))
    assert [detector.push(token) for token in (9, 1, 2, 3, 1, 2, 3, 1, 2, 3)] == [False] * 9 + [True]


def test_a_short_run_of_one_token_passes_until_it_covers_min_tokens() -> None:
    detector = RepetitionDetector(RepetitionConfig(max_period=4, min_repeats=3, min_tokens=10, ngram=0))
    assert [detector.push(5) for _ in range(10)] == [False] * 9 + [True]


def test_the_ngram_test_finds_a_loop_whose_turns_differ() -> None:
    config = RepetitionConfig(max_period=16, min_repeats=4, min_tokens=0, ngram=4, ngram_threshold=20)
    detector = RepetitionDetector(config)
    turns = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 100 + turn] for turn in range(12)]
    fired = [detector.push(token) for turn in turns for token in turn]
    assert any(fired)
    assert not any(fired[: 3 * 13])
