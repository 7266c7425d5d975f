"""Rows, microbatches and the plan that deals them."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from tandem.engine.algo.pack import (
    FILLER_ROW_ID,
    TrainingRow,
    build_microbatch,
    plan_updates,
    rows_of,
    signal_mask,
    supervised_row,
    work_of,
)
from tandem.engine.types import Group, Prompt, Response, Segment, StopState, Verdict


def row(prompt: list[int], response: list[int], row_id: int = 0, advantage: float = 1.0) -> TrainingRow:
    ids = np.array(prompt, np.int32), np.array(response, np.int32)
    made = supervised_row(*ids, row_id)
    return dataclasses.replace(made, advantage=advantage, behaviour_logprobs=-np.arange(1, len(response) + 1, dtype=np.float32))


def group_of(*responses: Response, verdicts: tuple[Verdict, ...] = ()) -> Group:
    return Group(prompt=Prompt(id="p", text="", token_ids=(5, 6), answer=""), responses=responses, verdicts=verdicts)


def response(*segments: tuple[int, int], sample: int = 0) -> Response:
    """Segments as (tokens, policy version)."""
    made = tuple(Segment(token_ids=(9,) * n, logprobs=(-0.5,) * n, policy_version=version) for n, version in segments)
    return Response(sample=sample, segments=made, stop=StopState.FINISHED)


def test_everything_is_aligned_to_the_predicting_position() -> None:
    microbatch = build_microbatch([row([1, 2, 3], [4, 5], row_id=7, advantage=0.5), row([6], [7], row_id=8, advantage=-2.0)])
    assert microbatch.tokens_T.tolist() == [1, 2, 3, 4, 6]
    assert microbatch.targets_T.tolist() == [2, 3, 4, 5, 7]
    assert microbatch.positions_T.tolist() == [0, 1, 2, 3, 0]
    assert microbatch.visible_end_T.tolist() == [4, 4, 4, 4, 5]
    assert microbatch.loss_mask_T.tolist() == [False, False, True, True, True]
    assert microbatch.on_policy_T.tolist() == [False, False, True, True, True]
    assert microbatch.behaviour_logprobs_T.tolist() == [0, 0, -1, -2, -1]
    assert microbatch.cu_seqlens.tolist() == [0, 4, 5]
    assert microbatch.advantages_R.tolist() == [0.5, -2.0]
    assert microbatch.row_ids_R.tolist() == [7, 8]
    assert (microbatch.num_tokens, microbatch.num_rows) == (5, 2)
    assert microbatch.routed_experts_TXK is None
    tensors = {field.name: getattr(microbatch, field.name) for field in dataclasses.fields(microbatch)}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items() if tensor is not None}
    assert dtypes == {
        "tokens_T": "int64",
        "targets_T": "int64",
        "positions_T": "int64",
        "visible_end_T": "int32",
        "loss_mask_T": "bool",
        "behaviour_logprobs_T": "float32",
        "on_policy_T": "bool",
        "cu_seqlens": "int32",
        "advantages_R": "float32",
        "row_ids_R": "int64",
    }


def test_recorded_experts_lie_where_the_token_was_predicted_and_are_unknown_elsewhere() -> None:
    record = np.arange(8, dtype=np.int16).reshape(2, 2, 2)  # 2 tokens, 2 sparse layers, 2 experts per token
    segments = (
        Segment(token_ids=(9,), logprobs=(-0.5,), policy_version=2),  # an engine that recorded nothing
        Segment(token_ids=(8, 7), logprobs=(-0.5, -0.5), policy_version=3, routed_experts=record),
    )
    (recorded,) = rows_of(group_of(Response(sample=0, segments=segments, stop=StopState.FINISHED)), [1.0], 3, "mask")
    assert recorded.routed_experts is not None
    assert (recorded.routed_experts.dtype, recorded.routed_experts.shape) == (np.int16, (3, 2, 2))
    packed = build_microbatch([row([6], [7], row_id=5), recorded]).routed_experts_TXK
    assert packed is not None
    # one token of the first row; of the second its 2 prompt tokens predict the second prompt token and the first response token
    assert packed[:, 0, 0].tolist() == [-1, -1, -1, 0, 4]
    assert np.array_equal(packed[-2:].numpy(), record)


def test_records_of_different_models_do_not_mix() -> None:
    records = [np.zeros((1, layers, 2), dtype=np.int16) for layers in (2, 3)]
    rows = [dataclasses.replace(row([1], [2], row_id=i), routed_experts=record) for i, record in enumerate(records)]
    with pytest.raises(ValueError, match=r"rows \[0, 1\] recorded experts of different shapes: \[\(2, 2\), \(3, 2\)\]"):
        build_microbatch(rows)


def test_empty_responses_are_left_out_and_no_rows_make_a_filler() -> None:
    assert build_microbatch([row([1, 2], []), row([3], [4], row_id=1)]).row_ids_R.tolist() == [1]
    filler = build_microbatch([row([1, 2], [])])
    assert (filler.num_tokens, filler.num_rows) == (1, 1)
    assert not filler.loss_mask_T.any()
    assert filler.row_ids_R.tolist() == [FILLER_ROW_ID]
    assert filler.cu_seqlens.tolist() == [0, 1]


def test_a_row_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="row 3 has no prompt token"):
        row([], [1], row_id=3)


def test_stale_segments_are_masked_or_kept_as_asked() -> None:
    group = group_of(response((2, 3), (1, 4)))
    for mode, mask in (("mask", [False, False, True]), ("train", [True] * 3), ("correct", [True] * 3)):
        (made,) = rows_of(group, [1.0], 4, mode)  # type: ignore[arg-type]
        assert made.loss_mask.tolist() == mask
        assert made.on_policy.tolist() == [False, False, True]
        assert made.behaviour_logprobs.tolist() == [-0.5] * 3


def test_rows_without_a_trained_token_or_a_verdict_are_dropped_and_ids_stay() -> None:
    ungraded = Verdict(correct=False, graded=False)
    judged = Verdict(correct=True)
    group = group_of(response((2, 3)), response(), response((1, 4)), response((1, 4)), verdicts=(judged, judged, ungraded, judged))
    assert [made.row_id for made in rows_of(group, [1.0, -1.0, 1.0, 0.5], 4, "mask", first_row_id=100)] == [103]
    assert [made.row_id for made in rows_of(group, [1.0, -1.0, 1.0, 0.5], 4, "train", first_row_id=100)] == [100, 103]


def test_groups_without_signal_are_dropped_and_zero_rows_stay_only_for_the_regulariser() -> None:
    assert signal_mask([0.0, 0.0], regularised=True) == [False, False]
    assert signal_mask([0.0, 1.0], regularised=True) == [True, True]
    assert signal_mask([0.0, 1.0], regularised=False) == [False, True]
    assert signal_mask([], regularised=True) == []


def test_wrong_counts_and_segments_from_the_future_are_errors() -> None:
    with pytest.raises(ValueError, match="1 responses but 2 advantages"):
        rows_of(group_of(response((1, 0))), [1.0, 2.0], 0, "mask")
    with pytest.raises(ValueError, match="tokens of policy 5, after 4"):
        rows_of(group_of(response((1, 5))), [1.0], 4, "mask")


def random_case(seed: int) -> tuple[NDArray[np.int64], dict[str, int]]:
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
        with pytest.raises(ValueError, match=f"{name} is 0"):
            plan_updates([1], **{"num_updates": 1, "dp_size": 1, "microbatch_tokens": 1, name: 0})
    with pytest.raises(ValueError, match="row 1 has length -2"):
        plan_updates([1, -2], num_updates=1, dp_size=1, microbatch_tokens=1)
