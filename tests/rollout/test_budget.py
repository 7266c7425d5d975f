"""Groups go through any number of phases; only what is not final is generated, and nothing generated is lost."""

import dataclasses
from collections.abc import Collection, Generator, Sequence
from typing import Any

import pytest

from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.budget import generate_groups, new_group, sample_seed
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import Completion, EngineDiedError, GenerationRequest, Group, Prompt, Response, Segment, StopState
from tests.rollout.models import CONTEXT_LENGTH, serve, tiny_model

CONFIG = RolloutConfig(max_batch=8, max_response_tokens=10, repetition=RepetitionConfig(max_period=0, ngram=0))


class CountingEngine:
    """Token t of a response is t; a response to a prompt that begins with n ends by itself after n tokens."""

    def __init__(self) -> None:
        self.policy_version = 3
        self.weights_digest = None
        self.requests: list[GenerationRequest] = []

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Generator[Completion, None, None]:
        self.requests += requests
        left = 10**9 if token_budget is None else token_budget
        for request in requests:
            wanted = min(request.token_ids[0] - request.num_prefix_tokens, request.max_new_tokens)
            num_new = min(wanted, left)
            left -= num_new
            stop = StopState.FINISHED if wanted < request.max_new_tokens else StopState.LENGTH
            tokens = tuple(range(request.num_prefix_tokens, request.num_prefix_tokens + num_new))
            yield Completion(
                request_id=request.request_id,
                token_ids=tokens,
                logprobs=tuple(-float(token) for token in tokens),
                stop=stop if num_new == wanted else StopState.BUDGET,
                policy_version=self.policy_version,
            )

    def abort(self, request_ids: Collection[str] | None = None) -> None:
        raise AssertionError("nothing is aborted here")

    @property
    def is_alive(self) -> bool:
        return True

    def wait_until_ready(self) -> None:
        pass

    def restart(self) -> None:
        raise AssertionError("nothing dies here")

    def close(self) -> None:
        pass


def group(name: str, ends_after: int, num_samples: int = 2) -> Group:
    return new_group(Prompt(id=name, text="", token_ids=(ends_after, 0), answer=""), num_samples)


def run(engine: CountingEngine, groups: Sequence[Group], token_budget: int | None = None, context_length: int = 50) -> list[Group]:
    def seed_of(group: Group, sample: int, segment: int) -> int:
        return sample_seed(0, 1, group, sample, segment)

    return list(generate_groups(engine, groups, config=CONFIG, context_length=context_length, seed_of=seed_of, token_budget=token_budget))


def test_groups_come_back_finished_when_there_is_no_budget() -> None:
    groups = run(CountingEngine(), [group("a", 4), group("b", 20, num_samples=1)])
    assert [g.prompt.id for g in groups] == ["a", "b"]
    assert all(g.is_finished for g in groups)
    assert [r.stop for g in groups for r in g.responses] == [StopState.FINISHED] * 2 + [StopState.LENGTH]
    assert [r.token_ids for g in groups for r in g.responses] == [(0, 1, 2, 3)] * 2 + [tuple(range(10))]
    assert [r.sample for r in groups[0].responses] == [0, 1]


def test_a_response_is_resumed_over_phases_with_a_segment_of_each_policy() -> None:
    engine = CountingEngine()
    groups = [group("a", 7)]
    for version in (3, 4, 5):
        engine.policy_version = version
        groups = run(engine, groups, token_budget=5)
    (done,) = groups
    assert done.is_finished
    assert done.responses[0].token_ids == done.responses[1].token_ids == tuple(range(7))
    assert done.responses[0].policy_versions == (3, 3, 3, 3, 3, 4, 4)
    assert done.responses[1].policy_versions == (4, 4, 4, 5, 5, 5, 5)
    assert done.responses[1].behaviour_logprobs == tuple(-float(t) for t in range(7))


def test_finished_groups_come_first_and_cut_ones_keep_their_order() -> None:
    groups = run(CountingEngine(), [group("a", 9, 1), group("b", 1, 1), group("c", 9, 1), group("d", 1, 1)], token_budget=12)
    assert [(g.prompt.id, g.is_finished) for g in groups] == [("a", True), ("b", True), ("c", False), ("d", False)]
    assert groups[3].responses[0].segments == (), "a response that got no tokens has no segment"


def test_only_what_is_not_final_is_asked_for_and_earlier_tokens_are_passed_as_such() -> None:
    engine = CountingEngine()
    segment = Segment(token_ids=(0, 1, 2), logprobs=(0.0, 0.0, 0.0), policy_version=1)
    responses = (
        Response(sample=0, segments=(segment,), stop=StopState.FINISHED),
        Response(sample=1, segments=(segment,), stop=StopState.ABORTED),
    )
    partial = Group(prompt=group("a", 9).prompt, responses=responses, first_iteration=4)
    (done,) = run(engine, [partial])
    (request,) = engine.requests
    assert (request.token_ids, request.num_prefix_tokens, request.max_new_tokens) == ((9, 0, 0, 1, 2), 3, 7)
    assert request.seed == sample_seed(0, 1, partial, 1, 1)
    assert done.responses[0] == responses[0]
    assert done.responses[1].token_ids == tuple(range(9))
    assert done.first_iteration == 4


def test_the_context_bounds_a_response() -> None:
    (done,) = run(CountingEngine(), [group("a", 40)], context_length=6)
    assert {(r.num_tokens, r.stop) for r in done.responses} == {(4, StopState.LENGTH)}


def test_a_response_that_is_as_long_as_allowed_already_ends_with_length() -> None:
    segment = Segment(token_ids=(0,) * 10, logprobs=(0.0,) * 10, policy_version=1)
    full = Group(prompt=group("a", 40).prompt, responses=(Response(sample=0, segments=(segment,)),))
    engine = CountingEngine()
    (done,) = run(engine, [full])
    assert done.responses[0].stop is StopState.LENGTH
    assert not engine.requests


def test_an_empty_group_and_a_prompt_without_room_are_named() -> None:
    with pytest.raises(ValueError, match="prompt 'a' is empty"):
        run(CountingEngine(), [group("a", 3, num_samples=0)])
    with pytest.raises(ValueError, match="prompt 'b' has 2 tokens; a context of 2 leaves none"):
        run(CountingEngine(), [group("b", 3)], context_length=2)
    assert run(CountingEngine(), []) == []


def test_seeds_are_63_bits_and_differ_in_every_argument() -> None:
    a, b = group("a", 9), group("b", 9)
    again = dataclasses.replace(a, serial=1)  # the same prompt, drawn a second time
    base: tuple[int, int, Group, int, int] = (0, 1, a, 2, 3)
    others = [(9, 1, a, 2, 3), (0, 9, a, 2, 3), (0, 1, b, 2, 3), (0, 1, again, 2, 3), (0, 1, a, 9, 3), (0, 1, a, 2, 9), (0, 12, a, 2, 3)]
    seeds = [sample_seed(*arguments) for arguments in (base, *others)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sample_seed(*base) == seeds[0]


class DyingEngine(CountingEngine):
    """Dies after its first completion."""

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Generator[Completion, None, None]:
        yield next(super().generate(requests, token_budget=token_budget))
        raise EngineDiedError("gone")


def test_what_a_dead_engine_was_generating_comes_back_as_it_was() -> None:
    deaths: list[EngineDiedError] = []
    groups = [group("a", 3, num_samples=1), group("b", 3, num_samples=1)]
    arguments: dict[str, Any] = {"config": CONFIG, "context_length": 50, "seed_of": lambda group, sample, segment: 0, "token_budget": None}
    done, cut = generate_groups(DyingEngine(), groups, on_death=deaths.append, **arguments)
    assert done.is_finished
    assert cut == groups[1]
    assert len(deaths) == 1
    with pytest.raises(EngineDiedError, match="gone"):
        list(generate_groups(DyingEngine(), groups, **arguments))


def test_phases_with_the_embedded_engine_are_reproducible_and_lose_nothing() -> None:
    model = tiny_model()
    prompts = [Prompt(id=str(i), text="", token_ids=(i + 1, 5), answer="") for i in range(6)]

    def phases(engine: EmbeddedEngine) -> list[Group]:
        done, groups = [], [new_group(prompt, 3) for prompt in prompts]
        for iteration in range(20):
            out = list(
                generate_groups(
                    engine,
                    groups,
                    config=CONFIG,
                    context_length=CONTEXT_LENGTH,
                    seed_of=lambda *what, iteration=iteration: sample_seed(0, iteration, *what),
                    token_budget=50,
                )
            )
            done += [g for g in out if g.is_finished]
            groups = [g for g in out if not g.is_finished]
            if not groups:
                return done
        raise AssertionError("the groups never ended")

    with EmbeddedEngine(
        model.config.to_dict(), CONFIG, dtype="float32", context_length=CONTEXT_LENGTH, stop_token_ids=(3,), num_threads=1
    ) as engine:
        serve(engine, model)
        done = phases(engine)
        assert phases(engine) == done
    assert sorted(g.prompt.id for g in done) == [p.id for p in prompts]
    for response in (r for g in done for r in g.responses):
        assert (response.stop is StopState.FINISHED) == (response.token_ids[-1] == 3)
        assert response.stop is StopState.FINISHED or response.num_tokens == CONFIG.max_response_tokens
