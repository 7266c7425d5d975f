"""The embedded engine's swaps and its child process: nothing half-loaded serves, nothing is left behind."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import GenerationRequest, StopState
from tests.rollout.models import (
    CONTEXT_LENGTH,
    by_id,
    disk_tensors,
    metas,
    process_exists,
    reference_logprobs,
    serve,
    tiny_model,
)

PROMPT = (4, 8, 15)


def new_engine(model: PreTrainedModel, log_path: Path | None = None) -> EmbeddedEngine:
    return EmbeddedEngine(
        model.config.to_dict(),
        RolloutConfig(max_batch=8, repetition=RepetitionConfig(max_period=0, ngram=0)),
        dtype="float32",
        context_length=CONTEXT_LENGTH,
        stop_token_ids=(),
        num_threads=1,
        log_path=log_path,
        timeout_s=240,
    )


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    return [tiny_model(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def shared_engine(models: list[PreTrainedModel]) -> Iterator[EmbeddedEngine]:
    with new_engine(models[0]) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: EmbeddedEngine, models: list[PreTrainedModel]) -> EmbeddedEngine:
    """An engine that serves models[0] as version 0, without an open transaction."""
    serve(shared_engine, models[0], policy_version=0)
    return shared_engine


def request(max_new_tokens: int = 8, name: str = "a") -> GenerationRequest:
    return GenerationRequest(request_id=name, token_ids=PROMPT, num_prefix_tokens=0, max_new_tokens=max_new_tokens, seed=1, temperature=0.0)


def serves(engine: EmbeddedEngine, model: PreTrainedModel, policy_version: int) -> bool:
    """Whether a generation has the log-probs and the version of this model."""
    (completion,) = engine.generate([request()])
    difference = reference_logprobs(model, PROMPT, completion.token_ids) - torch.tensor(completion.logprobs)
    return difference.abs().max().item() <= 1e-5 and completion.policy_version == engine.policy_version == policy_version


def test_where_a_budget_ends_is_the_same_every_time_and_the_first_requests_get_the_last_tokens(engine: EmbeddedEngine) -> None:
    requests = [replace(request(20, str(i)), token_ids=(i + 1,), temperature=None) for i in range(20)]
    for budget in (0, 3, 45, 399):
        first, again = (by_id(list(engine.generate(requests, token_budget=budget))) for _ in range(2))
        assert first == again
    completions = by_id(list(engine.generate(requests[:6], token_budget=4)))
    assert [len(completions[str(i)].token_ids) for i in range(6)] == [1, 1, 1, 1, 0, 0]


def test_a_child_killed_while_it_generates_is_noticed_and_replaced(models: list[PreTrainedModel]) -> None:
    with new_engine(models[0]) as engine:
        assert engine.policy_version == -1
        assert engine.weights_digest is None
        with pytest.raises(RuntimeError, match="has no weights"):
            engine.generate([request()])
        serve(engine, models[0], policy_version=0)
        kill_and_replace(engine, models[1])


def kill_and_replace(engine: EmbeddedEngine, next_model: PreTrainedModel) -> None:
    generation = engine.generate([request(1, "short"), *(request(90, str(i)) for i in range(200))])
    assert next(generation).stop is StopState.LENGTH
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"embedded rollout engine \(process \d+\) died \(exit status -9\); call restart"):
        list(generation)
    with pytest.raises(RuntimeError, match="has no weights"):
        engine.generate([request()])
    with pytest.raises(RuntimeError, match="died"):
        engine.prepare(1, metas(disk_tensors(next_model)))
    engine.restart()
    assert engine.policy_version == -1
    assert engine.weights_digest is None
    serve(engine, next_model, policy_version=1)
    assert serves(engine, next_model, 1)


def test_a_dead_childs_log_is_shown(models: list[PreTrainedModel], tmp_path: Path) -> None:
    log_path = tmp_path / "rollout.log"
    with new_engine(models[0], log_path) as engine:
        engine.rollback()
        with log_path.open("a") as log:
            log.write("the last words\n")
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"the end of .*rollout\.log:\nthe last words"):
            engine.rollback()


def test_closing_or_forgetting_an_engine_leaves_no_process(models: list[PreTrainedModel]) -> None:
    closed = new_engine(models[0])
    pids = [closed.pid]
    closed.close()
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.rollback()
    forgotten = new_engine(models[0])
    serve(forgotten, models[0])
    pids.append(forgotten.pid)
    del forgotten
    gc.collect()
    assert [process_exists(pid) for pid in pids] == [False, False]


def test_the_child_dies_with_its_parent_even_when_a_fork_holds_the_socket() -> None:
    program = """
import os, sys, time
from tandem.engine.config import RolloutConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
config = eval(sys.argv[1])
engine = EmbeddedEngine(config, RolloutConfig(), dtype="float32", context_length=16, stop_token_ids=(), num_threads=1)
engine.rollback()  # answered: the child is up
fork = os.fork()
if fork == 0:
    time.sleep(240)
    os._exit(0)
print(engine.pid, fork, flush=True)
os.kill(os.getpid(), 9)
"""
    config = tiny_model().config.to_dict()
    config = {name: value for name, value in config.items() if isinstance(value, int | float | str | dict | list)}
    process = subprocess.Popen([sys.executable, "-c", program, repr(config)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        pid, fork = map(int, process.stdout.readline().split())
    process.wait()
    deadline = time.monotonic() + 120
    while process_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(fork, signal.SIGKILL)
    assert not process_exists(pid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type is 'longrope'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_a_model_that_the_engine_cannot_run_is_refused(change: dict[str, object], message: str, models: list[PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddedEngine(
            models[0].config.to_dict() | change,
            RolloutConfig(),
            dtype="float32",
            context_length=16,
            stop_token_ids=(),
            num_threads=1,
        )


def test_no_shared_memory_is_left() -> None:
    assert not list(Path("/dev/shm").glob("tandem-test-*"))
