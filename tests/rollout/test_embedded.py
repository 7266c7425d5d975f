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
from tandem.engine.types import BucketEntry, GenerationRequest, StopState, TensorMeta, WeightTransferError
from tests.rollout.models import (
    CONTEXT_LENGTH,
    buckets,
    by_id,
    disk_tensors,
    metas,
    process_exists,
    reference_logprobs,
    send,
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
        timeout_s=60,
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


def test_each_swap_serves_the_weights_of_its_version(engine: EmbeddedEngine, models: list[PreTrainedModel]) -> None:
    for version in range(5):
        serve(engine, models[version % 3], policy_version=version)
        assert serves(engine, models[version % 3], version)


def test_old_weights_serve_until_the_commit(engine: EmbeddedEngine, models: list[PreTrainedModel]) -> None:
    send(engine, disk_tensors(models[1]), 1)
    assert serves(engine, models[0], 0)
    engine.commit()
    assert serves(engine, models[1], 1)


def test_a_rollback_keeps_the_old_weights_and_the_next_swap_works(engine: EmbeddedEngine, models: list[PreTrainedModel]) -> None:
    engine.rollback()
    send(engine, disk_tensors(models[1]), 1)
    engine.rollback()
    engine.rollback()
    assert serves(engine, models[0], 0)
    with pytest.raises(WeightTransferError, match="outside a transaction"):
        engine.commit()
    serve(engine, models[2], policy_version=2)
    assert serves(engine, models[2], 2)


def test_a_damaged_byte_is_found_and_names_bucket_and_tensor(engine: EmbeddedEngine, models: list[PreTrainedModel]) -> None:
    tensors = disk_tensors(models[1])
    victim = buckets(tensors, 1 << 15)[2][1][-1]

    def corrupt(number: int, data: bytearray) -> None:
        if number == 2:
            data[victim.bucket_start + victim.num_bytes - 1] ^= 1

    with pytest.raises(WeightTransferError, match=f"bucket /dev/shm/tandem-test-.*{victim.name}.*checksum"):
        send(engine, tensors, 1, corrupt=corrupt)
    with pytest.raises(WeightTransferError, match="roll back"):
        engine.commit()
    assert serves(engine, models[0], 0)
    engine.rollback()
    serve(engine, models[1], policy_version=1)
    assert serves(engine, models[1], 1)


def test_an_incomplete_swap_does_not_commit(engine: EmbeddedEngine, models: list[PreTrainedModel], tmp_path: Path) -> None:
    tensors = disk_tensors(models[1])
    filled = buckets(tensors, 1 << 15)
    engine.prepare(1, metas(tensors))
    for data, entries in filled[:-1]:
        (tmp_path / "bucket").write_bytes(data)
        engine.load(str(tmp_path / "bucket"), entries)
    with pytest.raises(WeightTransferError, match=r"tensor \S+ is incomplete"):
        engine.commit()
    assert serves(engine, models[0], 0)


def test_tensors_that_are_not_the_models_are_named(engine: EmbeddedEngine, models: list[PreTrainedModel]) -> None:
    tensors = metas(disk_tensors(models[0]))
    norm = next(t for t in tensors if t.name == "model.norm.weight")
    rest = [t for t in tensors if t is not norm]
    for wrong, message in [
        (rest, r"1 tensors of the model are missing, the first is model\.norm\.weight"),
        ([*tensors, TensorMeta(name="model.extra", shape=(1,), dtype=torch.float32)], r"model\.extra is not one of the model"),
        ([*rest, TensorMeta(name=norm.name, shape=(3,), dtype=norm.dtype)], r"model\.norm\.weight has shape \[3\]; the model has \[48\]"),
        ([*rest, TensorMeta(name=norm.name, shape=norm.shape, dtype=torch.bfloat16)], r"is torch\.bfloat16; the model is torch\.float32"),
    ]:
        with pytest.raises(WeightTransferError, match=message):
            engine.prepare(1, wrong)
    serve(engine, models[0], policy_version=2)
    assert serves(engine, models[0], 2)


def test_buckets_that_cannot_be_are_errors(engine: EmbeddedEngine, models: list[PreTrainedModel], tmp_path: Path) -> None:
    (tmp_path / "bucket").write_bytes(bytes(64))
    bucket = str(tmp_path / "bucket")

    def entry(name: str = "model.norm.weight", tensor_start: int = 0, num_bytes: int = 64) -> list[BucketEntry]:
        return [BucketEntry(name=name, tensor_start=tensor_start, num_bytes=num_bytes, bucket_start=0, checksum=0)]

    with pytest.raises(WeightTransferError, match="outside a transaction"):
        engine.load(bucket, entry())
    engine.prepare(0, metas(disk_tensors(models[0])))
    for path, entries, message in [
        (bucket, entry(name="model.extra"), "not one of the model"),
        (bucket, entry(tensor_start=160), "bytes 160:224 of tensor model.norm.weight, which has 192"),
        (bucket, entry(num_bytes=128), "ends within tensor model.norm.weight: 64 of 128 bytes"),
        (str(tmp_path / "none"), entry(), "cannot be opened"),
    ]:
        with pytest.raises(WeightTransferError, match=message):
            engine.load(path, entries)


def test_equal_weights_have_equal_digests_however_they_arrive(engine: EmbeddedEngine, models: list[PreTrainedModel]) -> None:
    first = engine.weights_digest
    assert first is not None
    send(engine, disk_tensors(models[1]), 1)
    assert engine.weights_digest == first, "the old weights serve until the commit"
    engine.commit()
    assert engine.weights_digest not in (None, first)
    send(engine, dict(reversed(disk_tensors(models[0]).items())), 2, bucket_bytes=1 << 12)
    engine.commit()
    assert engine.weights_digest == first
    changed = disk_tensors(models[0])
    changed["model.norm.weight"] = changed["model.norm.weight"].clone()
    changed["model.norm.weight"].view(torch.int32)[-1] ^= 1
    send(engine, changed, 3)
    engine.commit()
    assert engine.weights_digest not in (None, first)


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
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"embedded rollout engine \(process \d+\) died \(exit status -9\); call restart"):
        list(generation)
    assert time.monotonic() - start < 10
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
    time.sleep(60)
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
    deadline = time.monotonic() + 30
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
