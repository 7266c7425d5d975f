"""The drawn tokens have the distribution that was asked for, and the log-probs are those of the whole softmax."""

import numpy as np
import pytest
import torch

from tandem.engine.rollout.sampling import sample, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 1.0, -9.0])


def draw(temperature: float, *, top_k: int = 0, top_p: float = 1.0, num: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    random = uniforms(np.arange(num, dtype=np.uint64), np.zeros(num, dtype=np.int64))
    return sample(LOGITS.expand(num, -1), random, np.full(num, temperature), top_k=top_k, top_p=top_p)


def chi_square(tokens: np.ndarray, probabilities: torch.Tensor) -> float:
    kept = probabilities.numpy() > 0
    expected = probabilities.numpy()[kept] * len(tokens)
    counts = np.bincount(tokens, minlength=len(kept))
    assert counts[~kept].sum() == 0
    return float(((counts[kept] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_follow_the_temperature_scaled_softmax(temperature: float) -> None:
    tokens, logprobs = draw(temperature)
    whole = (LOGITS / temperature).log_softmax(-1)
    # 6 degrees of freedom: chi-square passes 27.9 once in 10,000 random seeds; ours are fixed.
    assert chi_square(tokens, whole.exp()) < 27.9
    assert np.allclose(logprobs, whole.numpy()[tokens], atol=1e-6)


def test_top_k_keeps_the_likeliest_and_the_lower_id_among_equals() -> None:
    tokens, logprobs = draw(1.0, top_k=3)
    kept = torch.zeros(7).index_fill(0, torch.tensor([4, 0, 1]), 1.0) * LOGITS.exp()
    assert chi_square(tokens, kept / kept.sum()) < 27.9
    assert np.allclose(logprobs, LOGITS.log_softmax(-1).numpy()[tokens], atol=1e-6), "log-probs are not renormalised"


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    probabilities = LOGITS.softmax(-1)  # of tokens 4, 0: 0.61, 0.22
    assert probabilities[4] < 0.7 < probabilities[4] + probabilities[0]
    tokens, _ = draw(1.0, top_p=0.7)
    assert set(tokens.tolist()) == {0, 4}
    tokens, _ = draw(1.0, top_p=float(probabilities[4]) - 1e-3)
    assert set(tokens.tolist()) == {4}
    tokens, _ = draw(1.0, top_p=1e-9)
    assert set(tokens.tolist()) == {4}, "one token always remains"


def test_top_p_applies_within_top_k_with_probabilities_of_the_whole_softmax() -> None:
    tokens, _ = draw(1.0, top_k=2, top_p=0.999)
    assert set(tokens.tolist()) == {0, 4}


def test_temperature_zero_takes_the_likeliest_and_reports_temperature_one() -> None:
    tokens, logprobs = draw(0.0, num=4, top_k=2)
    assert tokens.tolist() == [4] * 4
    assert np.allclose(logprobs, LOGITS.log_softmax(-1)[4].item(), atol=1e-6)


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = LOGITS.expand(3, -1)
    tokens, logprobs = sample(logits, np.array([0.999999, 0.999999, 0.0]), np.array([0.0, 2.0, 1.0]), top_k=0, top_p=1.0)
    assert tokens.tolist() == [4, 6, 0]
    expected = [LOGITS.log_softmax(-1)[4], (LOGITS / 2).log_softmax(-1)[6], LOGITS.log_softmax(-1)[0]]
    assert np.allclose(logprobs, torch.stack(expected).numpy(), atol=1e-6)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    tokens, _ = sample(logits, np.array([0.0, 0.5, 1 - 2**-53]), np.ones(3), top_k=0, top_p=1.0)
    assert tokens.tolist() == [1, 1, 1]


def test_random_numbers_depend_on_seed_and_position_only_and_are_uniform() -> None:
    seeds, positions = np.arange(500, dtype=np.uint64), np.arange(40)
    grid = uniforms(np.repeat(seeds, 40), np.tile(positions, 500))
    assert grid[40 * 7 + 3] == uniforms(np.array([7], dtype=np.uint64), np.array([3]))[0]
    assert len(np.unique(grid)) == len(grid)
    assert grid.min() >= 0
    assert grid.max() < 1
    counts = np.histogram(grid, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # 19 degrees of freedom: once in 10,000
    assert abs(np.corrcoef(grid[:-1], grid[1:])[0, 1]) < 0.03


def test_a_wide_vocabulary_is_sampled_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(1.0, num=100)
    monkeypatch.setattr("tandem.engine.rollout.sampling._ELEMENTS_AT_ONCE", 30)
    parts = draw(1.0, num=100)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
