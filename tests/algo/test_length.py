"""The length reward of the paper, 2.3.3, on values worked out by hand."""

import pytest
import torch

from tandem.engine.algo.length import length_reward


def reward(lengths: list[int], correct: list[bool], group: list[int]) -> list[float]:
    return length_reward(torch.tensor(lengths), torch.tensor(correct, dtype=torch.bool), torch.tensor(group)).tolist()


def test_correct_responses_get_lambda_and_wrong_ones_its_negative_part() -> None:
    # lambda = 0.5 - (len - 10) / 40 = 0.5, 0.25, -0.5, 0.25, -0.5
    assert reward([10, 20, 50, 20, 50], [True, True, True, False, False], [0] * 5) == [0.5, 0.25, -0.5, 0.0, -0.5]


def test_the_shortest_wrong_response_is_not_rewarded_but_sets_the_minimum() -> None:
    assert reward([0, 100], [False, True], [3, 3]) == [0.0, -0.5]


def test_groups_do_not_see_each_other_whatever_their_numbers_and_order() -> None:
    assert reward([10, 7, 30, 9], [True, True, True, True], [900, -4, 900, -4]) == [0.5, 0.5, -0.5, -0.5]


def test_equal_lengths_and_a_single_response_get_nothing() -> None:
    assert reward([8, 8, 8, 123], [True, False, True, True], [0, 0, 0, 1]) == [0.0, 0.0, 0.0, 0.0]


def test_empty_responses_count_as_length_zero() -> None:
    assert reward([0, 0], [False, False], [0, 0]) == [0.0, 0.0]
    assert reward([], [], []) == []


def test_the_bounds_of_the_paper_hold_for_any_lengths() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 10**9, (40,), generator=generator)
        correct = torch.rand(40, generator=generator) < 0.5
        result = length_reward(lengths, correct, torch.randint(0, 6, (40,), generator=generator))
        assert result.dtype == torch.float32
        assert (result[correct].abs() <= 0.5).all()
        assert ((result[~correct] >= -0.5) & (result[~correct] <= 0)).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="shapes"):
        length_reward(torch.ones(2), torch.ones(3, dtype=torch.bool), torch.zeros(2))
    with pytest.raises(ValueError, match=r"correct_R is torch\.float32"):
        length_reward(torch.ones(2), torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="length of response 1 is -3"):
        reward([1, -3], [True, True], [0, 0])
