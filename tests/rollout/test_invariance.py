"""In float32 a response is a function of its request and the weights, to the last bit: its company in the batch changes nothing."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import Completion, GenerationRequest
from tests.rollout.models import VOCAB_SIZE, by_id, serve, tiny_model

CONTEXT_LENGTH = 440  # beyond two blocks of MKL's sums
NO_REPETITION = RepetitionConfig(max_period=0, ngram=0)
# Queries per key/value head, head widths and hidden widths take the libraries' various paths: odd, single, and sums beyond one block.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3, odd heads": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 208},
    "qwen3, one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 208},
    # Latents of more than one block of MKL's sums; an odd number of experts in the sigmoids.
    "deepseek_v3": {"kv_lora_rank": 200, "num_attention_heads": 3, "n_routed_experts": 9, "n_group": 3},
    "qwen3_moe": {"num_attention_heads": 3, "num_key_value_heads": 3, "moe_intermediate_size": 37, "num_experts": 5},
}


def start(shape: str, dtype: str, *, max_batch: int, num_threads: int = 1, **rollout: Any) -> EmbeddedEngine:
    model = tiny_model(shape.split(",")[0], dtype=getattr(torch, dtype), peaked=False, **SHAPES[shape])
    config = RolloutConfig(max_batch=max_batch, repetition=NO_REPETITION, **rollout)
    fixed: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "stop_token_ids": (3,), "num_threads": num_threads}
    engine = EmbeddedEngine(model.config.to_dict(), config, dtype=dtype, **fixed)
    serve(engine, model)
    return engine


@pytest.fixture(scope="module", params=SHAPES)
def engines(request: pytest.FixtureRequest) -> Iterator[list[EmbeddedEngine]]:
    """The same weights with many rows, with one, and with a few, which two threads compute for one of the shapes."""
    sizes = ((64, 1), (1, 1), (7, 2 if request.param == "qwen3, odd heads" else 1))
    engines = [start(request.param, "float32", max_batch=rows, num_threads=threads) for rows, threads in sizes]
    yield engines
    for engine in engines:
        engine.close()


def random_requests(rng: random.Random, num: int) -> list[GenerationRequest]:
    """Prompts of 1 to 400 tokens, mostly short; some share a prompt, some are resumed ones, some greedy."""
    prompts: list[tuple[int, ...]] = []
    for _ in range(num):
        longest = rng.choice((5, 20, 60, 210, 400))
        is_new = not prompts or rng.random() < 0.6
        prompts.append(tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, longest))) if is_new else rng.choice(prompts))
    return [
        GenerationRequest(
            request_id=str(i),
            token_ids=prompt,
            num_prefix_tokens=rng.randrange(len(prompt)),
            max_new_tokens=rng.randrange(1, 25),
            seed=rng.getrandbits(63),
            temperature=rng.choice((None, None, 0.0, 0.7)),
        )
        for i, prompt in enumerate(prompts)
    ]


def assert_same(got: Sequence[Completion], wanted: dict[str, Completion]) -> None:
    assert by_id(got) == {completion.request_id: wanted[completion.request_id] for completion in got}


def test_neither_company_nor_order_nor_the_number_of_rows_changes_a_bit(
    engines: list[EmbeddedEngine], request: pytest.FixtureRequest
) -> None:
    rng = random.Random(request.node.name)
    many, one, few = engines
    requests = random_requests(rng, 24)
    together = list(many.generate(requests))
    assert len({completion.token_ids for completion in together}) > len(requests) // 2
    assert_same(together, by_id(list(one.generate(requests))))
    assert_same(together, by_id(list(few.generate(rng.sample(requests, len(requests))))))
    assert_same(list(many.generate(rng.sample(requests, 11))), by_id(together))


def test_a_resumed_response_is_the_same_in_any_company(engines: list[EmbeddedEngine]) -> None:
    many, one, _ = engines
    requests = random_requests(random.Random(1), 12)
    cut = list(many.generate(requests, token_budget=100))
    rest = [
        dataclasses.replace(
            request,
            token_ids=request.token_ids + completion.token_ids,
            num_prefix_tokens=request.num_prefix_tokens + len(completion.token_ids),
            max_new_tokens=request.max_new_tokens - len(completion.token_ids),
        )
        for request in requests
        for completion in [by_id(cut)[request.request_id]]
    ]
    assert_same(list(many.generate(rest)), by_id(list(one.generate(rest))))


def test_top_k_and_top_p_change_nothing_about_it() -> None:
    requests = random_requests(random.Random(2), 20)
    options: dict[str, Any] = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    with start("qwen3", "float32", max_batch=64, **options) as many, start("qwen3", "float32", max_batch=3, **options) as few:
        assert_same(list(many.generate(requests)), by_id(list(few.generate(requests[::-1]))))


def test_bfloat16_holds_it_on_this_machine_too() -> None:
    requests = random_requests(random.Random(3), 20)
    with start("qwen3", "bfloat16", max_batch=64) as many, start("qwen3", "bfloat16", max_batch=3) as few:
        assert_same(list(many.generate(requests)), by_id(list(few.generate(requests[::-1]))))
