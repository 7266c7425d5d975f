"""A phase that is done again with some of its completions at hand is the same phase: tokens, stops, budget cuts and order."""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tandem.engine.architecture import Architecture
from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.budget import generate_groups, new_group, sample_seed
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.rollout.inference import InferenceModel
from tandem.engine.rollout.kv_cache import KVCache
from tandem.engine.rollout.scheduler import Scheduler
from tandem.engine.rollout.weights import ModelWeights
from tandem.engine.types import Completion, GenerationRequest, Group, Prompt, StopState
from tests.rollout.models import CONTEXT_LENGTH, VOCAB_SIZE, serve, tiny_model

CONFIG = RolloutConfig(max_batch=4, max_response_tokens=30, repetition=RepetitionConfig(max_period=4, min_repeats=2, min_tokens=4, ngram=0))


@pytest.fixture(scope="module")
def engine() -> Iterator[EmbeddedEngine]:
    model = tiny_model(peaked=False)
    fixed: dict[str, Any] = {"dtype": "float32", "context_length": CONTEXT_LENGTH, "stop_token_ids": (3, 9), "num_threads": 1}
    with EmbeddedEngine(model.config.to_dict(), CONFIG, **fixed) as engine:
        serve(engine, model, policy_version=2)
        yield engine


def phase_requests() -> list[GenerationRequest]:
    """More than the batch holds, of mixed lengths, some of them with the same prompt, one that may not generate anything."""
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 40))) for _ in range(7)]
    lengths = [0 if i == 5 else rng.randrange(1, 31) for i in range(22)]
    return [
        GenerationRequest(
            request_id=str(i),
            token_ids=prompts[i % 7],
            num_prefix_tokens=0,
            max_new_tokens=length,
            seed=rng.getrandbits(63),
            temperature=0.0 if i % 3 == 0 else None,
        )
        for i, length in enumerate(lengths)
    ]


def with_recorded(requests: Sequence[GenerationRequest], completions: Sequence[Completion]) -> list[GenerationRequest]:
    known = {completion.request_id: completion for completion in completions}
    return [dataclasses.replace(request, recorded=known.get(request.request_id)) for request in requests]


@pytest.mark.parametrize("token_budget", [None, 1, 37, 150])
def test_recorded_completions_change_nothing(engine: EmbeddedEngine, token_budget: int | None) -> None:
    rng = random.Random(token_budget)
    requests = phase_requests()
    whole = list(engine.generate(requests, token_budget=token_budget))
    assert len(whole) == len(requests)
    if token_budget is not None:
        assert sum(len(completion.token_ids) for completion in whole) == token_budget
        assert {StopState.BUDGET} <= {completion.stop for completion in whole}
    for recorded in (whole[:1], whole[: len(whole) // 2], rng.sample(whole, 9), rng.sample(whole, 16), whole):
        assert list(engine.generate(with_recorded(requests, recorded), token_budget=token_budget)) == whole


def test_every_kind_of_end_is_among_them(engine: EmbeddedEngine) -> None:
    stops = {completion.stop for completion in engine.generate(phase_requests(), token_budget=150)}
    assert stops == {StopState.FINISHED, StopState.LENGTH, StopState.REPETITION, StopState.BUDGET}


def test_a_phase_of_groups_goes_on_where_it_was_interrupted(engine: EmbeddedEngine) -> None:
    groups = [new_group(Prompt(id=str(i), text="", token_ids=(i + 1, 7), answer=""), 3, serial=i) for i in range(5)]
    journal: dict[tuple[int, int, int], Completion] = {}

    def phase(groups: Sequence[Group], token_budget: int, **hooks: Any) -> Iterator[Group]:
        return generate_groups(
            engine,
            groups,
            config=CONFIG,
            context_length=CONTEXT_LENGTH,
            seed_of=lambda *what: sample_seed(0, 1, *what),
            token_budget=token_budget,
            **hooks,
        )

    def record(group: Group, sample: int, segment: int, completion: Completion) -> None:
        assert (group.serial, sample, segment) not in journal
        journal[group.serial, sample, segment] = completion

    def known(group: Group, sample: int, segment: int) -> Completion | None:
        return journal.get((group.serial, sample, segment))

    first = list(phase(groups, 150))
    assert {group.is_finished for group in first} == {True, False}
    whole = list(phase(first, 60))  # of second segments, too
    old = {(g.serial, r.sample, s) for g in first for r in g.responses for s in range(len(r.segments))}
    for num_groups in range(len(whole) + 1):
        journal.clear()
        interrupted = phase(first, 60, on_completion=record)
        got = list(itertools.islice(interrupted, num_groups))
        interrupted.close()  # pyright: ignore[reportAttributeAccessIssue]
        generated = {(g.serial, r.sample, len(r.segments) - 1) for g in got for r in g.responses if r.segments} - old
        assert generated <= set(journal), "reported before the group is yielded"
        seen_before = set(journal)
        assert list(phase(first, 60, recorded=known, on_completion=record)) == whole
        assert seen_before <= set(journal)
    assert {segment for _, _, segment in journal} >= {1}


class CountingModel(InferenceModel):
    """Counts the rows that are decoded and the sequences that are prefilled."""

    num_rows = 0

    def decode(self, weights: ModelWeights, cache: KVCache, tokens_B: torch.Tensor, positions_B: np.ndarray) -> Any:
        self.num_rows += len(tokens_B)
        return super().decode(weights, cache, tokens_B, positions_B)

    def prefill(self, weights: ModelWeights, cache: KVCache, sequences: Sequence[np.ndarray], rows: Sequence[int]) -> None:
        self.num_rows += len(sequences)
        super().prefill(weights, cache, sequences, rows)


def test_nothing_is_computed_for_them() -> None:
    architecture = Architecture.from_hf(tiny_model().config.to_dict())
    weights = ModelWeights(architecture, torch.float32)  # zeros: every token is as likely
    requests = [dataclasses.replace(request, token_ids=(1,)) for request in phase_requests()]

    def run(requests: Sequence[GenerationRequest]) -> tuple[int, list[Completion]]:
        model = CountingModel(architecture, torch.float32, CONTEXT_LENGTH)
        scheduler = Scheduler(model, weights, CONFIG, requests, stop_token_ids=(3,), token_budget=None)
        with torch.inference_mode():
            ended = [end for ends in scheduler.run(lambda: ()) for end in ends]
        return model.num_rows, [
            Completion(
                request_id=requests[end.index].request_id,
                token_ids=tuple(end.tokens.tolist()),
                logprobs=tuple(end.logprobs.tolist()),
                stop=end.stop,
                policy_version=0,
            )
            for end in ended
        ]

    num_rows, completions = run(requests)
    assert num_rows == sum(len(completion.token_ids) for completion in completions)
    recorded = completions[::2]
    num_left = num_rows - sum(len(completion.token_ids) for completion in recorded)
    assert run(with_recorded(requests, recorded)) == (num_left, completions)
    assert run(with_recorded(requests, completions)) == (0, completions)


def test_a_recording_of_another_budget_is_cut_or_ends_where_it_was_cut(engine: EmbeddedEngine) -> None:
    requests = phase_requests()
    cut = list(engine.generate(requests, token_budget=60))
    by_budget = {completion.request_id for completion in cut if completion.stop is StopState.BUDGET}
    assert list(engine.generate(with_recorded(requests, cut))) != []
    longer = {completion.request_id: completion for completion in engine.generate(with_recorded(requests, cut))}
    assert all(longer[name] == completion for completion in cut for name in [completion.request_id] if name in by_budget)
    whole = list(engine.generate(requests))
    assert list(engine.generate(with_recorded(requests, whole), token_budget=60)) == cut


def test_a_recording_that_cannot_be_is_refused(engine: EmbeddedEngine) -> None:
    request = phase_requests()[0]
    (completion,) = engine.generate([request])
    for change, message in [
        ({"policy_version": 1}, "'0': its recorded completion is of policy version 1, the engine serves 2"),
        ({"stop": StopState.ABORTED}, "aborted"),
        ({"token_ids": (1,) * 99, "logprobs": (0.0,) * 99}, f"99 tokens, max_new_tokens is {request.max_new_tokens}"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.generate(with_recorded([request], [dataclasses.replace(completion, **change)]))
