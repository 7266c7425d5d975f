"""What every rollout engine must do with weights (`WeightSink` in engine/types.py): nothing half-loaded serves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.types import BucketEntry, GenerationRequest, TensorMeta, WeightTransferError
from tests.rollout.models import CONTEXT_LENGTH, buckets, disk_tensors, metas, reference_logprobs, send, serve, tiny_model
from tests.rollout.sglang_servers import MARKS, SGLANG, need_sglang

PROMPT = (4, 8, 15)
Engine = EmbeddedEngine | SGLangEngine


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    return [tiny_model(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module", params=["embedded", pytest.param("sglang", marks=MARKS)])
def shared_engine(request: pytest.FixtureRequest, models: list[PreTrainedModel]) -> Iterator[Engine]:
    config = RolloutConfig(max_batch=8, repetition=RepetitionConfig(max_period=0, ngram=0), sglang=SGLANG)
    if request.param == "sglang":
        need_sglang()
        yield request.getfixturevalue("sglang_servers").engine(models[0], config)
        return
    hf_config = models[0].config.to_dict()
    sizes = {"context_length": CONTEXT_LENGTH, "num_threads": 1}
    with EmbeddedEngine(hf_config, config, dtype="float32", stop_token_ids=(), **sizes, log_path=None) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine, models: list[PreTrainedModel]) -> Engine:
    """An engine that serves models[0] as version 0, without an open transaction."""
    serve(shared_engine, models[0], policy_version=0)
    return shared_engine


def serves(engine: Engine, model: PreTrainedModel, policy_version: int) -> bool:
    """Whether a generation has the log-probs and the version of this model."""
    request = GenerationRequest(request_id="a", token_ids=PROMPT, num_prefix_tokens=0, max_new_tokens=8, seed=1, temperature=0.0)
    (completion,) = engine.generate([request])
    difference = reference_logprobs(model, PROMPT, completion.token_ids) - torch.tensor(completion.logprobs)
    return difference.abs().max().item() <= 1e-5 and completion.policy_version == engine.policy_version == policy_version


def test_each_swap_serves_the_weights_of_its_version(engine: Engine, models: list[PreTrainedModel]) -> None:
    for version in range(5):
        serve(engine, models[version % 3], policy_version=version)
        assert serves(engine, models[version % 3], version)


def test_old_weights_serve_until_the_commit(engine: Engine, models: list[PreTrainedModel]) -> None:
    send(engine, disk_tensors(models[1]), 1)
    assert serves(engine, models[0], 0)
    engine.commit()
    assert serves(engine, models[1], 1)


def test_a_rollback_keeps_the_old_weights_and_the_next_swap_works(engine: Engine, models: list[PreTrainedModel]) -> None:
    engine.rollback()
    send(engine, disk_tensors(models[1]), 1)
    engine.rollback()
    engine.rollback()
    assert serves(engine, models[0], 0)
    with pytest.raises(WeightTransferError, match="outside a transaction"):
        engine.commit()
    serve(engine, models[2], policy_version=2)
    assert serves(engine, models[2], 2)


def test_a_damaged_byte_is_found_and_names_bucket_and_tensor(engine: Engine, models: list[PreTrainedModel]) -> None:
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


def test_a_commit_that_is_reverted_was_never_made(engine: Engine, models: list[PreTrainedModel]) -> None:
    digest = engine.weights_digest
    send(engine, disk_tensors(models[1]), 1)
    engine.commit()
    assert serves(engine, models[1], 1)
    engine.revert()
    assert serves(engine, models[0], 0)
    assert engine.weights_digest == digest
    serve(engine, models[2], policy_version=2)
    assert serves(engine, models[2], 2)


def test_an_incomplete_swap_does_not_commit(engine: Engine, models: list[PreTrainedModel], tmp_path: Path) -> None:
    tensors = disk_tensors(models[1])
    filled = buckets(tensors, 1 << 15)
    engine.prepare(1, metas(tensors))
    for data, entries in filled[:-1]:
        (tmp_path / "bucket").write_bytes(data)
        engine.load(str(tmp_path / "bucket"), entries)
    with pytest.raises(WeightTransferError, match=r"tensor \S+ is incomplete"):
        engine.commit()
    assert serves(engine, models[0], 0)


def test_tensors_that_are_not_the_models_are_named(engine: Engine, models: list[PreTrainedModel]) -> None:
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


def test_buckets_that_cannot_be_are_errors(engine: Engine, models: list[PreTrainedModel], tmp_path: Path) -> None:
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


def test_equal_weights_have_equal_digests_however_they_arrive(engine: Engine, models: list[PreTrainedModel]) -> None:
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
