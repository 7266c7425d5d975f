"""Curriculum, priority and reproducibility of the sampler."""

import json
from collections import Counter

import numpy as np
import pytest

from tandem.engine.config import SamplingConfig
from tandem.engine.data.sampler import PromptSampler
from tandem.engine.types import Prompt

UNIFORM = SamplingConfig(prioritised=False)


def prompts(n: int, num_levels: int = 1) -> list[Prompt]:
    return [Prompt(id=f"p{i}", text="", token_ids=(1,), answer="", level=i % num_levels) for i in range(n)]


def ids(drawn: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in drawn]


def test_unsolved_prompts_are_drawn_in_proportion_to_one_minus_their_success_rate() -> None:
    sampler = PromptSampler(SamplingConfig(priority_floor=0.0), prompts(4), seed=0)
    for prompt_id, rate in (("p0", 0.0), ("p1", 0.5), ("p2", 0.75)):
        sampler.observe(prompt_id, rate)
    counts = Counter(sampler.draw(1, step=0)[0].id for _ in range(9000))
    # 1 : 0.5 : 0.25 : 1, the last one unseen. One standard deviation is 47 at most; five are allowed.
    for prompt_id, expected in (("p0", 4000), ("p1", 2000), ("p2", 1000), ("p3", 4000)):
        assert abs(counts[prompt_id] - expected * 9 / 11) < 235


def test_a_solved_prompt_comes_last_without_a_floor_and_now_and_then_with_one() -> None:
    sampler = PromptSampler(SamplingConfig(priority_floor=0.0), prompts(5), seed=1)
    sampler.observe("p2", 1.0)
    assert all(ids(sampler.draw(5, step=0))[-1] == "p2" for _ in range(50))
    floored = PromptSampler(SamplingConfig(priority_floor=0.1), prompts(2), seed=1)
    floored.observe("p0", 1.0)
    assert 0 < sum(ids(floored.draw(1, step=0)) == ["p0"] for _ in range(500)) < 100  # expected 0.1 / 1.2 of 500, 42


def test_without_priority_success_rates_do_not_matter() -> None:
    sampler = PromptSampler(UNIFORM, prompts(2), seed=0)
    sampler.observe("p0", 1.0)
    assert 400 < sum(ids(sampler.draw(1, step=0)) == ["p0"] for _ in range(1000)) < 600


def test_the_running_success_rate_starts_at_the_first_observation() -> None:
    sampler = PromptSampler(SamplingConfig(success_decay=0.25), prompts(1), seed=0)
    assert sampler.success_rate("p0") is None
    sampler.observe("p0", 0.8)
    assert sampler.success_rate("p0") == 0.8
    sampler.observe("p0", 0.0)
    assert sampler.success_rate("p0") == pytest.approx(0.6)


def test_the_highest_allowed_level_rises_linearly() -> None:
    sampler = PromptSampler(SamplingConfig(curriculum_steps=8), prompts(50, num_levels=5), seed=0)
    for step, highest in ((0, 0), (1, 0), (2, 1), (4, 2), (7, 3), (8, 4), (100, 4)):
        assert {prompt.level for prompt in sampler.draw(200, step=step)} == set(range(highest + 1))
    everything = PromptSampler(SamplingConfig(), prompts(50, num_levels=5), seed=0)
    assert {prompt.level for prompt in everything.draw(50, step=0)} == set(range(5))


def test_no_prompt_comes_twice_until_all_that_are_allowed_have_come() -> None:
    sampler = PromptSampler(SamplingConfig(), prompts(10), seed=0)
    assert len(set(ids(sampler.draw(10, step=0)))) == 10
    drawn = ids(sampler.draw(25, step=0))
    assert len(set(drawn[:10])) == len(set(drawn[10:20])) == 10
    assert len(set(drawn[20:])) == 5
    assert sampler.draw(0, step=0) == []


def test_prompts_in_flight_are_left_out_while_others_are_allowed() -> None:
    sampler = PromptSampler(SamplingConfig(), prompts(6), seed=0)
    assert sorted(ids(sampler.draw(4, step=0, exclude=["p1", "p4", "not ours"]))) == ["p0", "p2", "p3", "p5"]
    assert len(sampler.draw(3, step=0, exclude=[f"p{i}" for i in range(6)])) == 3


def test_draws_depend_on_the_seed_and_the_number_of_draws_only() -> None:
    one, two, other = (PromptSampler(SamplingConfig(), prompts(100), seed=seed) for seed in (7, 7, 8))
    first = ids(one.draw(20, step=0))
    assert first == ids(two.draw(20, step=0))
    assert first != ids(other.draw(20, step=0))
    assert first != ids(one.draw(20, step=0))


def test_a_restored_sampler_goes_on_as_if_never_interrupted() -> None:
    original = PromptSampler(SamplingConfig(), prompts(50), seed=3)
    for i, prompt in enumerate(original.draw(20, step=0)):
        original.observe(prompt.id, i / 20)
    state = json.loads(json.dumps(original.state_dict()))
    restored = PromptSampler(SamplingConfig(), prompts(50), seed=3)
    restored.observe("p0", 1.0)  # forgotten on loading
    restored.load_state_dict(state)
    for step in range(3):
        assert ids(original.draw(20, step=step)) == ids(restored.draw(20, step=step))
    assert original.state_dict() == restored.state_dict()


def test_state_of_other_prompts_or_another_seed_is_refused() -> None:
    state = PromptSampler(SamplingConfig(), prompts(5), seed=0).state_dict()
    for others in (prompts(6), prompts(5)[::-1], prompts(5, num_levels=2)):
        with pytest.raises(ValueError, match="other prompts"):
            PromptSampler(SamplingConfig(), others, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="has seed 0, this run has 1"):
        PromptSampler(SamplingConfig(), prompts(5), seed=1).load_state_dict(state)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        PromptSampler(SamplingConfig(), [], seed=0)
    with pytest.raises(ValueError, match="4 prompts share 2 ids"):
        PromptSampler(SamplingConfig(), prompts(2) * 2, seed=0)
    sampler = PromptSampler(SamplingConfig(), prompts(2), seed=0)
    with pytest.raises(ValueError, match="'p9' is not one of"):
        sampler.observe("p9", 0.5)
    with pytest.raises(ValueError, match=r"'p1' is 1\.5"):
        sampler.observe("p1", 1.5)
    with pytest.raises(ValueError, match="is nan"):
        sampler.observe("p1", float(np.nan))
