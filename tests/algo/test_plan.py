"""The plan that deals rows to updates, ranks and microbatches."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tandem.engine.algo.plan import MIN_SHARED_TOKENS, Prompts, plan_updates, work_of


def random_case(seed: int) -> tuple[NDArray[np.int64], dict[str, Any]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, generator.integers(1, 400), size=generator.integers(0, 200))
    options = {
        "num_updates": generator.integers(1, 6),
        "dp_size": generator.integers(1, 9),
        "microbatch_tokens": generator.integers(1, 1000),
    }
    return lengths, {name: int(value) for name, value in options.items()}


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_places_every_row_once_within_the_token_limit(seed: int) -> None:
    lengths, options = random_case(seed)
    plan = plan_updates(lengths.tolist(), **options, seed=seed)
    assert plan == plan_updates(lengths, **options, seed=seed)
    placed = [r for update in plan.rows for rank in update for microbatch in rank for r in microbatch]
    assert sorted(placed) == np.flatnonzero(lengths).tolist()
    assert plan.num_updates == min(options["num_updates"], len(placed))
    num_rows = [plan.num_rows(update) for update in range(plan.num_updates)]
    assert not num_rows or max(num_rows) - min(num_rows) <= 1
    for number, update in enumerate(plan.rows):
        assert len(update) == options["dp_size"]
        assert {len(rank) for rank in update} == {plan.num_microbatches(number)}
        for rank in update:
            assert all(rank) or max(map(len, rank)) <= 1  # no filler beside a microbatch that could be split
            for microbatch in rank:
                assert len(microbatch) <= 1 or lengths[list(microbatch)].sum() <= options["microbatch_tokens"]


@pytest.mark.parametrize("seed", range(10))
def test_work_is_balanced_to_within_one_row(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 20_000, size=300)
    work = work_of(lengths, crossover_tokens=4096)
    plan = plan_updates(lengths, num_updates=2, dp_size=4, microbatch_tokens=32_768, crossover_tokens=4096)
    for update in plan.rows:
        loads = [sum(work[r] for microbatch in rank for r in microbatch) for rank in update]
        assert max(loads) - min(loads) <= work.max()
        assert max(loads) <= 1.02 * sum(loads) / len(loads)  # 37 rows a rank: far below one row's share


def test_work_is_equal_where_token_counts_are_not() -> None:
    # At a crossover of 100 the work of 100 tokens is 200, that of 300 tokens 1200: six short rows weigh as much as a long one.
    plan = plan_updates([300] + [100] * 6, num_updates=1, dp_size=2, microbatch_tokens=1000, crossover_tokens=100)
    by_rank = [sorted(r for microbatch in rank for r in microbatch) for rank in plan.rows[0]]
    assert sorted(by_rank) == [[0], [1, 2, 3, 4, 5, 6]]


def test_an_update_is_not_one_length_only() -> None:
    plan = plan_updates(list(range(1, 401)), num_updates=4, dp_size=1, microbatch_tokens=10_000)
    means = [np.mean([r for rank in update for microbatch in rank for r in microbatch]) for update in plan.rows]
    assert max(means) - min(means) < 80  # sorted updates would differ by 300
    other = plan_updates(list(range(1, 401)), num_updates=4, dp_size=1, microbatch_tokens=10_000, seed=1)
    assert plan != other


def test_a_rank_with_less_takes_fillers_only_when_nothing_is_left_to_split() -> None:
    # At a crossover of 100 the row of 300 tokens is one rank's share; the other fills two microbatches of 300.
    plan = plan_updates([300] + [100] * 6, num_updates=1, dp_size=2, microbatch_tokens=300, crossover_tokens=100)
    assert sorted(sorted(map(len, rank)) for rank in plan.rows[0]) == [[0, 1], [3, 3]]


def test_counts_below_one_and_negative_lengths_are_errors() -> None:
    for name in ("num_updates", "dp_size", "microbatch_tokens"):
        counts: dict[str, Any] = {"num_updates": 1, "dp_size": 1, "microbatch_tokens": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name} is 0"):
            plan_updates([1], **counts)
    with pytest.raises(ValueError, match="row 1 has length -2"):
        plan_updates([1, -2], num_updates=1, dp_size=1, microbatch_tokens=1)


def prompts_of(rows: list[tuple[int, int, int]]) -> tuple[list[int], Prompts]:
    """Lengths and prompts of rows (prompt's number, prompt tokens, response tokens)."""
    lengths = [prompt + response - 1 if response else 0 for _, prompt, response in rows]
    return lengths, Prompts(hashes_R=[number for number, _, _ in rows], lengths_R=[prompt for _, prompt, _ in rows])


def random_rows(seed: int) -> tuple[list[tuple[int, int, int]], dict[str, Any]]:
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(generator.integers(0, 12)):
        prompt = int(generator.integers(1, 300))
        rows += [(number, prompt, int(generator.integers(0, 100))) for _ in range(generator.integers(1, 9))]
    generator.shuffle(rows)
    return rows, random_case(seed)[1]


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_that_shares_prompts_places_every_row_once_and_counts_a_prompt_once(seed: int) -> None:
    rows, options = random_rows(seed)
    lengths, prompts = prompts_of(rows)
    plan = plan_updates(lengths, **options, seed=seed, prompts=prompts, share_prompts="always")
    assert plan.shares_prompts
    placed = [r for update in plan.rows for rank in update for microbatch in rank for r in microbatch]
    assert sorted(placed) == np.flatnonzero(lengths).tolist()
    for microbatch in (microbatch for update in plan.rows for rank in update for microbatch in rank):
        used = {rows[r][0]: rows[r][1] for r in microbatch}
        num_tokens = sum(used.values()) + sum(rows[r][2] - 1 for r in microbatch)
        assert len(microbatch) <= 1 or num_tokens <= options["microbatch_tokens"]
    # A prompt is computed once, unless its rows exceed a microbatch.
    for number in {number for number, _, response in rows if response}:
        own = [r for r, row in enumerate(rows) if row[0] == number and row[2]]
        if rows[own[0]][1] + sum(rows[r][2] - 1 for r in own) <= options["microbatch_tokens"]:
            assert sum(not set(own).isdisjoint(m) for update in plan.rows for rank in update for m in rank) == 1


def test_a_long_shared_prompt_saves_more_than_half_of_the_work() -> None:
    """P = 16k, R = 2k, k = 8: 2.8 times the tokens and 3.2 times the attention pairs without sharing."""
    prompt, response, k = 16_384, 2_049, 8
    lengths, prompts = prompts_of([(0, prompt, response)] * k)
    options: dict[str, Any] = {"num_updates": 1, "dp_size": 1, "microbatch_tokens": 1 << 18, "crossover_tokens": 49_152}
    apart = plan_updates(lengths, **options)
    together = plan_updates(lengths, **options, prompts=prompts, share_prompts="auto")
    assert together.rows == (((tuple(range(k)),),),)
    whole = prompt + response - 1
    pairs_apart, pairs_together = k * whole**2, prompt**2 + k * (whole**2 - prompt**2)  # twice the visible pairs
    assert pairs_apart / pairs_together > 3.2
    assert apart.work == pytest.approx(k * whole + pairs_apart / 49_152)
    assert together.work == pytest.approx(prompt + k * (response - 1) + pairs_together / 49_152)
    assert apart.work / together.work > 2.8


@pytest.mark.parametrize(
    ("rows", "dp_size", "shares"),
    [
        ([(g, 512, 512) for g in range(4) for _ in range(8)], 1, True),
        ([(g, MIN_SHARED_TOKENS - 1, 20) for g in range(4) for _ in range(8)], 1, False),  # no tile of attention is saved
        ([(g, 512, 6000) for g in range(4) for _ in range(8)], 1, False),  # the prompt is a small part
        ([(0, 512, 512)] * 8, 8, False),  # the other ranks would have nothing to do
        ([(g, 512, 512) for g in range(8)], 1, False),  # k = 1
        ([], 1, False),
    ],
)
def test_auto_shares_prompts_where_that_saves_a_fifth_of_the_busiest_ranks_work(
    rows: list[tuple[int, int, int]], dp_size: int, shares: bool
) -> None:
    lengths, prompts = prompts_of(rows)
    options: dict[str, Any] = {"num_updates": 1, "dp_size": dp_size, "microbatch_tokens": 8192}
    plan = plan_updates(lengths, **options, prompts=prompts, share_prompts="auto")
    assert plan.shares_prompts == shares
    if not shares:
        assert plan == plan_updates(lengths, **options)


def test_auto_does_not_share_at_the_price_of_an_update() -> None:
    lengths, prompts = prompts_of([(0, 512, 512)] * 8)
    options: dict[str, Any] = {"dp_size": 1, "microbatch_tokens": 8192, "prompts": prompts, "share_prompts": "auto"}
    plans = [plan_updates(lengths, num_updates=num_updates, **options) for num_updates in (1, 2)]
    assert [(plan.shares_prompts, plan.num_updates) for plan in plans] == [(True, 1), (False, 2)]


def test_sharing_needs_the_prompts() -> None:
    with pytest.raises(ValueError, match="none of prompts for 1 rows; share_prompts='auto' needs one for each"):
        plan_updates([3], num_updates=1, dp_size=1, microbatch_tokens=1, share_prompts="auto")
    with pytest.raises(ValueError, match="1 hashes and 1 lengths of prompts for 2 rows"):
        plan_updates([3, 3], num_updates=1, dp_size=1, microbatch_tokens=1, share_prompts="auto", prompts=prompts_of([(0, 2, 2)])[1])
