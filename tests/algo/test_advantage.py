"""Baselines, advantages and the reward of a response, on values worked out by hand."""

import dataclasses
import functools
import math

import pytest
import torch

from tandem.engine.algo.advantage import group_advantages, score_groups
from tandem.engine.config import LossConfig, RewardConfig
from tandem.engine.types import Group, Prompt, Response, Segment, StopState, Verdict

NO_PENALTY = RewardConfig()
scores_of = functools.partial(score_groups, max_response_tokens=100)


def advantages(rewards: list[float], group: list[int] | None = None, **options: object) -> list[float]:
    groups = torch.tensor(group if group is not None else [0] * len(rewards))
    return group_advantages(torch.tensor(rewards), groups, **options).tolist()  # type: ignore[arg-type]


def graded(*verdicts: bool | None, lengths: list[int] | None = None, stop: StopState = StopState.FINISHED) -> Group:
    """A group with these verdicts; None is a response that nobody could grade."""
    lengths = lengths if lengths is not None else [3] * len(verdicts)
    segments = [Segment(token_ids=(7,) * n, logprobs=(-1.0,) * n, policy_version=0) for n in lengths]
    return Group(
        prompt=Prompt(id="p", text="", token_ids=(1, 2), answer=""),
        responses=tuple(Response(sample=i, segments=(segment,), stop=stop) for i, segment in enumerate(segments)),
        verdicts=tuple(Verdict(correct=bool(verdict), graded=verdict is not None) for verdict in verdicts),
    )


def test_the_mean_baseline_centres_each_group() -> None:
    assert advantages([1, 0, 0, 0, 2, 4], [5, 5, 5, 5, 2, 2]) == [0.75, -0.25, -0.25, -0.25, -1.0, 1.0]


def test_log_mean_exp_is_the_estimate_of_tau_log_z() -> None:
    # tau log((e^(1/tau) + 3) / 4) at tau = 0.5
    baseline = 0.5 * math.log((math.exp(2) + 3) / 4)
    assert advantages([1, 0, 0, 0], baseline="log_mean_exp", tau=0.5) == pytest.approx([1 - baseline] + [-baseline] * 3, abs=1e-6)


def test_log_mean_exp_lies_between_mean_and_maximum_and_tends_to_the_mean() -> None:
    rewards = [0.2, 1.4, -0.3]
    for tau in (1e-4, 0.1, 1.0, 1e6):
        baseline = rewards[0] - advantages(rewards, baseline="log_mean_exp", tau=tau)[0]
        assert sum(rewards) / 3 - 1e-5 <= baseline <= 1.4
    assert advantages(rewards, baseline="log_mean_exp", tau=1e6) == pytest.approx(advantages(rewards), abs=1e-5)


def test_log_mean_exp_neither_overflows_nor_underflows() -> None:
    assert advantages([1000.0, -1000.0], baseline="log_mean_exp", tau=1e-3) == pytest.approx([1e-3 * math.log(2), -2000.0], rel=1e-6)


@pytest.mark.parametrize("baseline", ["mean", "log_mean_exp"])
def test_equal_rewards_and_a_single_response_give_exactly_zero(baseline: str) -> None:
    rewards = [0.1] * 7 + [0.3]
    assert advantages(rewards, [0] * 7 + [1], baseline=baseline, tau=0.07) == [0.0] * 8
    assert advantages(rewards, [0] * 7 + [1], baseline=baseline, tau=0.07, normalise_std=True) == [0.0] * 8
    assert advantages([], []) == []


def test_normalise_std_divides_by_the_deviation_of_the_group() -> None:
    # mean 0.25, standard deviation sqrt(3) / 4
    assert advantages([1, 0, 0, 0], normalise_std=True) == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, rel=1e-5)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="tau is None"):
        advantages([1, 0], baseline="log_mean_exp")
    with pytest.raises(ValueError, match="response 1 is nan"):
        advantages([1, math.nan])
    with pytest.raises(ValueError, match="one R"):
        advantages([1, 0], [0])


def test_a_reward_is_correctness_plus_weighted_length_reward() -> None:
    scores = scores_of([graded(True, False, lengths=[10, 30])], loss=LossConfig(), reward=NO_PENALTY, length_weight=0.5)
    assert scores.length_rewards_R.tolist() == [0.5, -0.5]
    assert scores.rewards_R.tolist() == [1.25, -0.25]
    assert scores.advantages_R.tolist() == [0.75, -0.75]


def test_a_response_stopped_for_repetition_pays_the_penalty() -> None:
    group = graded(False, False, stop=StopState.REPETITION)
    scores = scores_of([group], loss=LossConfig(), reward=RewardConfig(repetition_penalty=0.25), length_weight=0.0)
    assert scores.rewards_R.tolist() == [-0.25, -0.25]


def test_a_cut_response_pays_the_over_budget_penalty_and_a_long_one_part_of_it() -> None:
    reward = RewardConfig(over_budget_penalty=0.5, over_budget_start=0.8)
    whole = graded(True, True, True, True, lengths=[79, 80, 90, 100])
    scores = scores_of([whole, graded(False, stop=StopState.LENGTH)], loss=LossConfig(), reward=reward, length_weight=0.0)
    assert scores.rewards_R.tolist() == pytest.approx([1, 1, 0.75, 0.5, -0.5])
    only_cut = RewardConfig(over_budget_penalty=0.5)
    scores = scores_of([whole, graded(False, stop=StopState.LENGTH)], loss=LossConfig(), reward=only_cut, length_weight=0.0)
    assert scores.rewards_R.tolist() == [1, 1, 1, 1, -0.5]


def test_a_response_without_its_markers_pays_the_format_penalty_unless_nobody_could_grade_it() -> None:
    group = graded(True, True, None)
    malformed = tuple(dataclasses.replace(verdict, well_formed=i == 0) for i, verdict in enumerate(group.verdicts))
    reward = RewardConfig(format_penalty=0.25, format_markers=("</think>",))
    scores = scores_of([dataclasses.replace(group, verdicts=malformed)], loss=LossConfig(), reward=reward, length_weight=0.0)
    assert scores.rewards_R.tolist() == [1.0, 0.75, 0.0]
    assert scores.advantages_R.tolist() == [0.125, -0.125, 0.0]


def test_what_nobody_could_grade_stays_out_of_lengths_baseline_and_loss() -> None:
    groups = [graded(True, None, False, lengths=[10, 1000, 20]), graded(None, None)]
    scores = scores_of(groups, loss=LossConfig(), reward=NO_PENALTY, length_weight=1.0)
    assert scores.rewards_R.tolist() == [1.5, 0.0, -0.5, 0.0, 0.0]
    assert scores.advantages_of_groups() == [[1.0, 0.0, -1.0], [0.0, 0.0]]
    assert scores.graded_R.tolist() == [True, False, True, False, False]


def test_rest_fits_correct_responses_only_and_grpo_normalises() -> None:
    groups = [graded(True, False, True, None)]
    assert scores_of(groups, loss=LossConfig(variant="rest"), reward=NO_PENALTY, length_weight=1.0).advantages_R.tolist() == [1, 0, 1, 0]
    scores = scores_of([graded(True, False)], loss=LossConfig(variant="grpo"), reward=NO_PENALTY, length_weight=0.0)
    assert scores.advantages_R.tolist() == pytest.approx([1, -1], rel=1e-5)


def test_no_groups_is_fine_but_an_empty_or_ungraded_group_is_an_error() -> None:
    assert scores_of([], loss=LossConfig(), reward=NO_PENALTY, length_weight=0.0).advantages_of_groups() == []
    with pytest.raises(ValueError, match="'p' has no responses"):
        scores_of([graded()], loss=LossConfig(), reward=NO_PENALTY, length_weight=0.0)
    whole = graded(True, False)
    ungraded = Group(prompt=whole.prompt, responses=whole.responses)
    with pytest.raises(ValueError, match="0 verdicts for 2 responses"):
        scores_of([ungraded], loss=LossConfig(), reward=NO_PENALTY, length_weight=0.0)
