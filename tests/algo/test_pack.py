"""Rows and microbatches."""

import dataclasses

import numpy as np
import pytest
import torch

from tandem.engine.algo.pack import FILLER_ROW_ID, TrainingRow, build_microbatch, rows_of, signal_mask, supervised_row
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
    assert microbatch.tokens_S.tolist() == [1, 2, 3, 4, 6]
    assert microbatch.targets_T.tolist() == [2, 3, 4, 5, 7]
    assert microbatch.positions_S.tolist() == [0, 1, 2, 3, 0]
    assert microbatch.visible_end_S.tolist() == [4, 4, 4, 4, 5]
    assert microbatch.loss_mask_T.tolist() == [False, False, True, True, True]
    assert microbatch.on_policy_T.tolist() == [False, False, True, True, True]
    assert microbatch.behaviour_logprobs_T.tolist() == [0, 0, -1, -2, -1]
    assert microbatch.cu_seqlens.tolist() == [0, 4, 5]
    assert microbatch.advantages_R.tolist() == [0.5, -2.0]
    assert microbatch.row_ids_R.tolist() == [7, 8]
    assert (microbatch.num_tokens, microbatch.num_rows) == (5, 2)
    assert microbatch.routed_experts_SXK is None
    tensors = {field.name: getattr(microbatch, field.name) for field in dataclasses.fields(microbatch)}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items() if tensor is not None}
    assert dtypes == {
        "tokens_S": "int64",
        "positions_S": "int64",
        "visible_end_S": "int32",
        "targets_T": "int64",
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
    packed = build_microbatch([row([6], [7], row_id=5), recorded]).routed_experts_SXK
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


def test_rows_with_one_prompt_share_it_and_its_last_token_predicts_all_their_first_tokens() -> None:
    rows = [row([1, 2, 3], [4, 5], row_id=7), row([6], [7], row_id=8), row([1, 2, 3], [8], row_id=9), row([1, 2, 3], [9, 1, 2], row_id=10)]
    microbatch = build_microbatch(rows, share_prompts=True)
    assert microbatch.row_ids_R.tolist() == [7, 9, 10, 8]
    assert microbatch.tokens_S.tolist() == [1, 2, 3, 4, 9, 1, 6]
    assert microbatch.positions_S.tolist() == [0, 1, 2, 3, 3, 4, 0]
    assert microbatch.visible_end_S.tolist() == [6, 6, 6, 4, 6, 6, 7]
    assert (microbatch.num_tokens, microbatch.num_positions) == (7, 13)
    assert microbatch.shared is not None
    assert microbatch.shared.token_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 4, 5, 6]
    assert microbatch.targets_T.tolist() == [2, 3, 4, 5, 2, 3, 8, 2, 3, 9, 1, 2, 7]
    assert microbatch.loss_mask_T.int().tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    assert microbatch.cu_seqlens.tolist() == [0, 4, 7, 12, 13]
    assert microbatch.cu_nodes.tolist() == [0, 3, 4, 4, 6, 7, 7]
    assert microbatch.shared.prompt_node_R.tolist() == [0, 0, 0, 4]
    assert microbatch.shared.response_node_R.tolist() == [1, 2, 3, 5]


def test_without_a_common_prompt_nothing_is_shared() -> None:
    rows = [row([1, 2], [3], row_id=0), row([1, 3], [4], row_id=1), row([1, 2], [], row_id=2)]
    shared, plain = build_microbatch(rows, share_prompts=True), build_microbatch(rows)
    for field in dataclasses.fields(plain):
        ours, theirs = getattr(shared, field.name), getattr(plain, field.name)
        assert ours is theirs is None or torch.equal(ours, theirs), field.name


@pytest.mark.parametrize("seed", range(20))
def test_a_position_of_a_shared_microbatch_sees_what_it_sees_alone(seed: int) -> None:
    """Read back from tokens and mask alone: the same tokens at the same places before each position."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 9, rng.integers(1, 6)).tolist() for _ in range(rng.integers(1, 4))]
    rows = [row(prompts[rng.integers(len(prompts))], rng.integers(0, 9, rng.integers(0, 6)).tolist(), row_id=i) for i in range(8)]
    shared, plain = build_microbatch(rows, share_prompts=True), build_microbatch(rows)
    by_id = {}
    for microbatch in (plain, shared):
        place_S = np.arange(microbatch.num_tokens)
        sees = (place_S <= place_S[:, None]) & (place_S[:, None] < microbatch.visible_end_S.numpy())
        token_T = place_S if microbatch.shared is None else microbatch.shared.token_T.numpy()
        for row_id, start, end in zip(microbatch.row_ids_R.tolist(), microbatch.cu_seqlens[:-1], microbatch.cu_seqlens[1:], strict=True):
            seen = [microbatch.tokens_S.numpy()[sees[token]].tolist() for token in token_T[start:end]]
            positions = microbatch.positions_S[token_T[start:end]].tolist()
            kept = [x[start:end].tolist() for x in (microbatch.targets_T, microbatch.loss_mask_T, microbatch.behaviour_logprobs_T)]
            assert by_id.setdefault(row_id, (seen, positions, kept)) == (seen, positions, kept)
    wanted = sum(len(prompt) for prompt in {made.prefix[0] for made in rows if made.num_tokens}) // 4
    assert shared.num_tokens == wanted + sum(len(made.response_ids) - 1 for made in rows if made.num_tokens)


def test_rows_whose_prompts_were_routed_differently_do_not_share_them() -> None:
    def recorded(value: int, row_id: int) -> TrainingRow:
        record = np.full((2, 1, 1), value, dtype=np.int16)
        record[1] = 10 + row_id
        return dataclasses.replace(row([1, 2], [3, 4], row_id=row_id), routed_experts=record)

    rows = [recorded(5, 0), recorded(6, 1), recorded(5, 2), row([1, 2], [3, 4], row_id=3)]
    microbatch = build_microbatch(rows, share_prompts=True)
    assert microbatch.row_ids_R.tolist() == [0, 2, 1, 3]
    assert microbatch.routed_experts_SXK is not None
    assert microbatch.routed_experts_SXK[:, 0, 0].tolist() == [-1, 5, 10, 12, -1, 6, 11, -1, -1, -1]
    assert rows[0].prefix_hash == rows[2].prefix_hash != rows[1].prefix_hash
