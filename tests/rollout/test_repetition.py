"""Repetition is found as it happens, by the same rule for one response and for many."""

import random

import numpy as np
import pytest

from tandem.engine.config import RepetitionConfig
from tandem.engine.rollout.repetition import BatchedRepetitionDetector, RepetitionDetector


def brute_force(tokens: list[int], config: RepetitionConfig) -> bool:
    """Whether the rule fires at the end of `tokens`, from its definition."""
    for period in range(1, config.max_period + 1):
        run = 0
        while run < len(tokens) - period and tokens[-1 - run] == tokens[-1 - run - period]:
            run += 1
        if run >= period * (config.min_repeats - 1) and run + period >= config.min_tokens:
            return True
    seen, cusum = set(), 0
    for end in range(config.ngram, len(tokens) + 1) if config.ngram else ():
        ngram = tuple(tokens[end - config.ngram : end])
        cusum = max(0, cusum + (1 if ngram in seen else -1))
        seen.add(ngram)
    return cusum > config.ngram_threshold


def loopy_text(rng: random.Random, num_tokens: int) -> list[int]:
    """Random tokens of a small vocabulary mixed with loops that are now and then broken."""
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        cycle = [rng.randrange(4) for _ in range(rng.randrange(1, 8))]
        for _ in range(rng.randrange(1, 6)):
            tokens += cycle
            if rng.random() < 0.2:
                tokens.append(rng.randrange(4))
    return tokens[:num_tokens]


CONFIGS = [
    RepetitionConfig(max_period=6, min_repeats=3, min_tokens=8, ngram=3, ngram_threshold=6),
    RepetitionConfig(max_period=6, min_repeats=3, min_tokens=0, ngram=0),
    RepetitionConfig(max_period=0, ngram=4, ngram_threshold=5),
    RepetitionConfig(max_period=0, ngram=0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_push_agrees_with_the_definition_for_one_response_and_for_many(config: RepetitionConfig) -> None:
    rng = random.Random(1)
    texts = [loopy_text(rng, 60) for _ in range(12)]
    singles = [RepetitionDetector(config) for _ in texts]
    batch = BatchedRepetitionDetector(config, len(texts))
    for end in range(1, 61):
        expected = [brute_force(text[:end], config) for text in texts]
        assert batch.push(np.array([text[end - 1] for text in texts])).tolist() == expected
        assert [single.push(text[end - 1]) for single, text in zip(singles, texts, strict=True)] == expected


@pytest.mark.parametrize("config", CONFIGS)
def test_a_resumed_response_is_judged_as_if_it_had_not_been_interrupted(config: RepetitionConfig) -> None:
    rng = random.Random(2)
    batch = BatchedRepetitionDetector(config, 1)
    for num_earlier in (0, 1, 2, 7, 30):
        text = loopy_text(rng, 50)
        batch.reset(0, text[:num_earlier])
        for end in range(num_earlier + 1, 51):
            assert batch.push(np.array(text[end - 1 : end])).tolist() == [brute_force(text[:end], config)]


def test_rows_keep_their_history_when_they_are_moved_and_permuted() -> None:
    config = CONFIGS[0]
    rng = random.Random(3)
    texts = [loopy_text(rng, 40) for _ in range(4)]
    batch = BatchedRepetitionDetector(config, 4)
    for t in range(20):
        batch.push(np.array([text[t] for text in texts]))
    batch.permute(np.array([2, 0, 3, 1]))
    batch.move(3, 0)
    rows = [texts[1], texts[0], texts[3]]
    for t in range(20, 40):
        assert batch.push(np.array([text[t] for text in rows])).tolist() == [brute_force(text[: t + 1], config) for text in rows]


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
