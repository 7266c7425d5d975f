"""What every rollout engine must do (the Protocol in engine/types.py), on tiny models against transformers."""

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.types import Completion, GenerationRequest, RolloutEngine, StopState
from tests.rollout.models import CONTEXT_LENGTH, VOCAB_SIZE, by_id, reference_logprobs, serve, tiny_model
from tests.rollout.sglang_servers import MARKS, MAX_RUNNING, SGLANG, Servers, need_sglang

NO_REPETITION = RepetitionConfig(max_period=0, ngram=0)
Start = Callable[..., RolloutEngine]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module", params=["embedded", pytest.param("sglang", marks=MARKS)])
def start(request: pytest.FixtureRequest, model: PreTrainedModel) -> Iterator[Start]:
    """Gives an engine that serves `model` (or another) as policy version 7."""
    if request.param == "sglang":
        need_sglang()
        yield functools.partial(start_sglang, request.getfixturevalue("sglang_servers"), model)
        return
    engines: dict[Any, EmbeddedEngine] = {}

    def start_engine(
        *,
        model: PreTrainedModel = model,
        dtype: str = "float32",
        stop_token_ids: tuple[int, ...] = (),
        repetition: RepetitionConfig = NO_REPETITION,
        **rollout: Any,
    ) -> RolloutEngine:
        key = (id(model), dtype, stop_token_ids, repetition, tuple(rollout.items()))
        if key not in engines:
            engine = EmbeddedEngine(
                model.config.to_dict(),
                RolloutConfig(repetition=repetition, **rollout),
                dtype=dtype,
                context_length=CONTEXT_LENGTH,
                stop_token_ids=stop_token_ids,
                num_threads=1,
            )
            engines[key] = engine
            serve(engine, model, policy_version=7)
        return engines[key]

    yield start_engine
    for engine in engines.values():
        engine.close()


def start_sglang(
    servers: Servers,
    default: PreTrainedModel,
    *,
    model: PreTrainedModel | None = None,
    dtype: str = "float32",
    stop_token_ids: tuple[int, ...] = (),
    repetition: RepetitionConfig = NO_REPETITION,
    **rollout: Any,
) -> SGLangEngine:
    model = default if model is None else model
    options: dict[str, Any] = {"max_batch": MAX_RUNNING} | rollout
    config = RolloutConfig(repetition=repetition, sglang=SGLANG, **options)
    engine = servers.engine(model, config, dtype=dtype, stop_token_ids=stop_token_ids)
    serve(engine, model, policy_version=7)
    return engine


def ask(name: str, token_ids: tuple[int, ...], max_new_tokens: int, seed: int = 0, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        **({"request_id": name, "token_ids": token_ids, "num_prefix_tokens": 0, "max_new_tokens": max_new_tokens, "seed": seed} | fields)
    )


def model_of(kind: str, **fields: Any) -> PreTrainedModel:
    """SGLang's Qwen3-MoE has experts in every layer, whatever `mlp_only_layers` says."""
    return tiny_model(kind, mlp_only_layers=[], **fields) if kind == "qwen3_moe" else tiny_model(kind, **fields)


def tokens_of(completions: list[Completion]) -> dict[str, tuple[int, ...]]:
    return {completion.request_id: completion.token_ids for completion in completions}


def mixed_requests(num: int, *, num_prompts: int | None = None) -> list[GenerationRequest]:
    rng = random.Random(5)
    prompts = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 40))) for _ in range(num_prompts or num)]
    return [ask(str(i), prompts[i % len(prompts)], rng.randrange(1, 50), seed=rng.getrandbits(63)) for i in range(num)]


def greedy_reference(model: PreTrainedModel, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_greedy_tokens_are_those_of_transformers(start: Start, kind: str) -> None:
    model = model_of(kind)
    requests = [ask(str(i), tuple(range(1 + i, 3 + 4 * i)), 12, temperature=0.0) for i in range(5)]
    completions = by_id(list(start(model=model, max_batch=3).generate(requests)))
    for request in requests:
        completion = completions[request.request_id]
        assert list(completion.token_ids) == greedy_reference(model, request.token_ids, 12)
        assert (completion.stop, completion.policy_version) == (StopState.LENGTH, 7)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_sampled_tokens_are_those_of_transformers(start: Start, kind: str, temperature: float) -> None:
    model = model_of(kind, peaked=False)
    requests = mixed_requests(40, num_prompts=15)
    engine = start(model=model, max_batch=16, temperature=temperature, top_p=0.9, top_k=20)
    for completion in engine.generate(requests):
        request = requests[int(completion.request_id)]
        assert len(completion.token_ids) == request.max_new_tokens
        expected = reference_logprobs(model, request.token_ids, completion.token_ids, temperature)
        # Two float32 implementations that add in a different order; the project's bound on train against rollout.
        assert (torch.tensor(completion.logprobs) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("start", ["embedded", pytest.param("sglang", marks=(*MARKS, pytest.mark.slow))], indirect=True)
def test_bfloat16_logprobs_are_near_those_of_float32(start: Start) -> None:
    model = tiny_model(dtype=torch.bfloat16, peaked=False)
    requests = mixed_requests(20)
    completions = list(start(model=model, dtype="bfloat16").generate(requests))
    model = model.float()
    for completion in completions:
        expected = reference_logprobs(model, requests[int(completion.request_id)].token_ids, completion.token_ids)
        # bfloat16 keeps 8 bits: activations are off by 0.4 % each, log-probs of a few nats by some hundredths.
        assert (torch.tensor(completion.logprobs) - expected).abs().mean() < 0.05


def test_the_same_seeds_give_the_same_tokens_and_others_do_not(start: Start) -> None:
    engine = start(max_batch=8)
    requests = mixed_requests(20)
    first, again = (tokens_of(list(engine.generate(requests))) for _ in range(2))
    assert first == again
    others = [ask(r.request_id, r.token_ids, r.max_new_tokens, seed=r.seed + 1) for r in requests]
    assert tokens_of(list(engine.generate(others))) != first


def test_tokens_do_not_depend_on_how_many_rows_decode_together(start: Start) -> None:
    requests = mixed_requests(60, num_prompts=20)
    small, large = (tokens_of(list(start(max_batch=rows).generate(requests))) for rows in (4, 64))
    assert small == large


def test_a_response_resumed_from_its_prefix_ends_like_one_that_was_not_cut(start: Start) -> None:
    engine = start()
    prompt = (5, 9, 2)
    (whole,) = engine.generate([ask("whole", prompt, 30, temperature=0.0)])
    (half,) = engine.generate([ask("half", prompt, 30, temperature=0.0)], token_budget=11)
    assert half.stop is StopState.BUDGET
    resumed = ask("resumed", prompt + half.token_ids, 19, num_prefix_tokens=11, temperature=0.0)
    (rest,) = engine.generate([resumed])
    assert half.token_ids + rest.token_ids == whole.token_ids
    assert max(abs(a - b) for a, b in zip(half.logprobs + rest.logprobs, whole.logprobs, strict=True)) <= 1e-5


def test_a_stop_token_ends_the_response_and_is_part_of_it(start: Start, model: PreTrainedModel) -> None:
    prompt = (1, 2, 3)
    tokens = greedy_reference(model, prompt, 20)
    stop = tokens[6]
    (completion,) = start(stop_token_ids=(stop,)).generate([ask("a", prompt, 20, temperature=0.0)])
    assert list(completion.token_ids) == tokens[: tokens.index(stop) + 1]
    assert completion.stop is StopState.FINISHED


def test_a_response_that_repeats_itself_is_stopped_and_earlier_tokens_count(start: Start) -> None:
    model = tiny_model()
    with torch.no_grad():  # without attention and feed-forward the likeliest next token is the last one again
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    engine = start(model=model, repetition=RepetitionConfig(max_period=4, min_repeats=4, min_tokens=0, ngram=0))
    requests = [
        ask("fresh", (1, 2, 3), 20, temperature=0.0),
        ask("a loop in the prompt is not the response's", (1, 3, 3, 3), 20, temperature=0.0),
        ask("resumed", (1, 2, 3, 3, 3), 20, num_prefix_tokens=2, temperature=0.0),
        ask("too short to tell", (1, 2, 3), 3, temperature=0.0),
    ]
    completions = by_id(list(engine.generate(requests)))
    got = [(completions[r.request_id].token_ids, completions[r.request_id].stop) for r in requests]
    repeated = StopState.REPETITION
    assert got == [((3,) * 4, repeated), ((3,) * 4, repeated), ((3,) * 2, repeated), ((3,) * 3, StopState.LENGTH)]


def test_the_token_budget_is_met_exactly(start: Start) -> None:
    engine = start(max_batch=8)
    requests = [ask(str(i), (i + 1,), 20, seed=i) for i in range(20)]
    for budget in (0, 3, 45, 399):
        completions = by_id(list(engine.generate(requests, token_budget=budget)))
        assert sum(len(c.token_ids) for c in completions.values()) == budget
        assert len(completions) == 20
        assert {c.stop for c in completions.values()} <= {StopState.BUDGET, StopState.LENGTH}
    completions = list(engine.generate(requests, token_budget=400))
    assert {c.stop for c in completions} == {StopState.LENGTH}


def test_no_requests_give_no_completions(start: Start) -> None:
    assert list(start().generate([])) == []


def test_no_new_tokens_is_a_response_of_length_zero(start: Start) -> None:
    completions = by_id(list(start().generate([ask("none", (1, 2), 0), ask("one", (1, 2), 1)])))
    assert (completions["none"].token_ids, completions["none"].stop) == ((), StopState.LENGTH)
    assert len(completions["one"].token_ids) == 1


def test_aborted_requests_keep_what_they_have_whether_they_run_or_wait(start: Start) -> None:
    engine = start(max_batch=2)
    requests = [ask("first", (1,), 1), ask("running", (2,), 90), ask("waiting", (3,), 90), ask("last", (4,), 90)]
    completions = {}
    for completion in engine.generate(requests):
        if completion.request_id == "first":
            engine.abort(["running", "last", "unknown"])
        completions[completion.request_id] = completion
    assert completions["last"].stop is StopState.ABORTED
    assert completions["running"].stop is StopState.ABORTED
    assert 0 < len(completions["running"].token_ids) < 90
    assert len(completions["running"].logprobs) == len(completions["running"].token_ids)
    assert completions["waiting"].stop is StopState.LENGTH


def test_abort_without_ids_ends_all(start: Start) -> None:
    engine = start(max_batch=4)
    engine.abort()
    completions = []
    for completion in engine.generate([ask("0", (1,), 1)] + [ask(str(i), (i,), 90) for i in range(1, 30)]):
        completions.append(completion)
        engine.abort()
    assert len(completions) == 30
    assert completions[-1].stop is StopState.ABORTED


def test_a_closed_iterator_leaves_the_engine_ready(start: Start) -> None:
    engine = start(max_batch=4)
    running = engine.generate([ask(str(i), (i + 1,), 5 + 20 * i) for i in range(4)])
    next(running)
    with pytest.raises(RuntimeError, match=r"while .* generates"):
        engine.generate([ask("other", (1,), 1)])
    running.close()
    (completion,) = engine.generate([ask("next", (1,), 3)])
    assert len(completion.token_ids) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": tuple(range(50)) * 2}, "request 'bad': 100 tokens and max_new_tokens=4 exceed the context of 96"),
        ({"max_new_tokens": 94}, "request 'bad': 3 tokens and max_new_tokens=94 exceed the context"),
        ({"token_ids": ()}, "request 'bad' has no tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"token_ids": (1, VOCAB_SIZE)}, r"token ids must lie in \[0, 64\)"),
        ({"num_prefix_tokens": 3}, "num_prefix_tokens is 3"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"request_id": "good"}, "'good' occurs twice"),
    ],
)
def test_a_bad_request_is_named(start: Start, fields: dict[str, Any], message: str) -> None:
    bad = {"token_ids": (1, 2, 3), "max_new_tokens": 4} | fields
    with pytest.raises(ValueError, match=message):
        start().generate([ask("good", (1,), 1), ask("bad", **bad)])
