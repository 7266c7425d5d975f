"""Every family generates as its model in transformers does: tokens, log-probs, and the experts that were chosen."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import Completion, GenerationRequest
from tests.rollout.models import by_id, reference_logprobs, send
from tests.trainer.families import FAMILIES, VOCAB, disk_weights, hf_model

CONTEXT_LENGTH = 64
# qwen3 and qwen3_moe have test_engine.py; of the latter only the routing is looked at here.
CASES = ("qwen3_moe", "llama", "llama, tied", "qwen2", "deepseek_v3", "moonlight")
# The prompts are random, and a few of the 48 tokens' logits lie close: float32 rounding moves log-probs by less than this.
TOLERANCE = 1e-5


def start(model: PreTrainedModel, family: str, *, dtype: str = "float32", max_batch: int = 8) -> EmbeddedEngine:
    config = RolloutConfig(
        max_batch=max_batch, record_routing=FAMILIES[family].has_experts, repetition=RepetitionConfig(max_period=0, ngram=0)
    )
    fixed: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "stop_token_ids": (), "num_threads": 1}
    engine = EmbeddedEngine(model.config.to_dict(), config, dtype=dtype, **fixed)
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    weights = disk_weights(model)
    send(engine, {name: x if name.endswith("e_score_correction_bias") else x.to(wanted) for name, x in weights.items()}, 0)
    engine.commit()
    return engine


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, PreTrainedModel, EmbeddedEngine]]:
    model = hf_model(request.param)
    with start(model, request.param) as engine:
        yield request.param, model, engine


def requests(num: int, temperature: float | None = None) -> list[GenerationRequest]:
    rng = random.Random(num)
    prompts = [tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))) for _ in range(num)]
    return [
        GenerationRequest(
            request_id=str(i),
            token_ids=prompt,
            num_prefix_tokens=0,
            max_new_tokens=CONTEXT_LENGTH - len(prompt) if i == 0 else 12,
            seed=i,
            temperature=temperature,
        )
        for i, prompt in enumerate(prompts)
    ]


def assert_logprobs(model: PreTrainedModel, request: GenerationRequest, completion: Completion) -> None:
    expected = reference_logprobs(model, request.token_ids, completion.token_ids)
    assert (expected - torch.tensor(completion.logprobs)).abs().max().item() <= TOLERANCE


def test_greedy_tokens_and_logprobs_are_those_of_transformers(case: tuple[str, PreTrainedModel, EmbeddedEngine]) -> None:
    _, model, engine = case
    asked = requests(5, temperature=0.0)
    completions = by_id(list(engine.generate(asked)))
    for request in asked:
        completion = completions[request.request_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*request.token_ids, *completion.token_ids]])).logits[0, len(request.token_ids) - 1 : -1]
        assert list(completion.token_ids) == logits.argmax(-1).tolist()
        assert_logprobs(model, request, completion)


def test_sampled_logprobs_are_those_of_transformers(case: tuple[str, PreTrainedModel, EmbeddedEngine]) -> None:
    _, model, engine = case
    asked = requests(6)
    completions = by_id(list(engine.generate(asked)))
    for request in asked:
        assert_logprobs(model, request, completions[request.request_id])


def test_a_response_is_the_same_alone_and_in_company(case: tuple[str, PreTrainedModel, EmbeddedEngine]) -> None:
    _, _, engine = case
    asked = requests(11)
    together = by_id(list(engine.generate(asked)))
    for request in asked[::3]:
        (alone,) = engine.generate([request])
        assert alone == together[request.request_id]
        assert np.array_equal(alone.routed_experts, together[request.request_id].routed_experts)  # pyright: ignore[reportArgumentType]


def test_recorded_experts_are_those_that_transformers_chooses(case: tuple[str, PreTrainedModel, EmbeddedEngine]) -> None:
    family, model, engine = case
    asked = requests(4)
    completions = list(engine.generate(asked))
    if not FAMILIES[family].has_experts:
        assert all(completion.routed_experts is None for completion in completions)
        return
    chosen: list[torch.Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _module, _inputs, outputs: chosen.append(outputs[-1])) for gate in gates]
    for request, completion in zip(asked, map(by_id(completions).get, [r.request_id for r in asked]), strict=True):
        assert completion is not None
        chosen.clear()
        with torch.no_grad():
            model(torch.tensor([[*request.token_ids, *completion.token_ids]]))
        expected = torch.stack(chosen, dim=1)[len(request.token_ids) - 1 : -1].sort(-1).values.numpy()
        assert completion.routed_experts is not None
        assert completion.routed_experts.dtype == np.int16
        assert np.array_equal(np.sort(completion.routed_experts, axis=-1), expected)
    for hook in hooks:
        hook.remove()


def test_recorded_completions_keep_their_experts(case: tuple[str, PreTrainedModel, EmbeddedEngine]) -> None:
    family, _, engine = case
    asked = requests(9)
    whole = list(engine.generate(asked, token_budget=60))
    known = by_id(whole[::2])
    again = list(
        engine.generate([dataclasses.replace(request, recorded=known.get(request.request_id)) for request in asked], token_budget=60)
    )
    assert again == whole
    if FAMILIES[family].has_experts:
        pairs = [(a.routed_experts, b.routed_experts) for a, b in zip(again, whole, strict=True)]
        assert all(np.array_equal(a, b) for a, b in pairs if a is not None and b is not None)
        assert [a is None for a, _ in pairs] == [b is None for _, b in pairs] == [not completion.token_ids for completion in whole]


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_bfloat16_stays_near_the_float32_model(family: str) -> None:
    model = hf_model(family)
    rounded = hf_model(family)
    for name, tensor in rounded.state_dict().items():
        if not name.endswith("e_score_correction_bias"):
            tensor.copy_(tensor.bfloat16())
    with start(model, family, dtype="bfloat16") as engine:
        asked = requests(4)
        completions = by_id(list(engine.generate(asked)))
    pairs = [(request, completions[request.request_id]) for request in asked]
    expected = torch.cat([reference_logprobs(rounded, request.token_ids, completion.token_ids) for request, completion in pairs])
    differences = expected - torch.tensor([logprob for _, completion in pairs for logprob in completion.logprobs])
    # Activations have 8 bits, and a token may choose another expert than in float32: the mean tells a wrong layer from rounding.
    assert differences.abs().mean().item() < 0.1


def test_recording_needs_experts() -> None:
    config = RolloutConfig(record_routing=True)
    with pytest.raises(ValueError, match="record_routing is True, but llama has no experts; set it to False"):
        EmbeddedEngine(hf_model("llama").config.to_dict(), config, dtype="float32", context_length=16, stop_token_ids=(), num_threads=1)
