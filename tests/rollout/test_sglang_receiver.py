"""The side of a swap that runs in SGLang's processes: a version serves whole or not at all, in the parameters that SGLang computes with."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tandem.engine.architecture import Architecture
from tandem.engine.rollout.sglang_receiver import Receiver
from tandem.engine.rollout.sglang_spare import Holding, Parameters
from tandem.engine.rollout.sglang_store import ParameterStore
from tandem.engine.rollout.sglang_trace import UntraceableError, trace_load
from tandem.engine.rollout.sglang_whole import WholeTensors
from tandem.engine.rollout.weights import ModelWeights, tensor_metas
from tandem.engine.types import WeightTransferError
from tests.rollout.models import buckets, disk_tensors, metas, tiny_model
from tests.rollout.sharded_model import ShardedModel, loaded

Tensors = Mapping[str, torch.Tensor]
ON_CPU = Holding(kept=True, by_pointer=True)
ON_GPU = Holding(kept=False, by_pointer=False)  # the same code, on a CPU's memory


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    return [tiny_model(seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def versions(models: list[PreTrainedModel]) -> list[dict[str, torch.Tensor]]:
    return [disk_tensors(model) for model in models]


@pytest.fixture
def architecture(models: list[PreTrainedModel]) -> Architecture:
    return Architecture.from_hf(models[0].config.to_dict())


def store_of(model: ShardedModel, architecture: Architecture, holding: Holding) -> ParameterStore:
    expected = tensor_metas(architecture, torch.float32)
    trace = trace_load(model, expected.values())
    return ParameterStore(trace, Parameters(model, trace.targets, holding), expected, model.post_load_weights)


def transfer(run: Callable[..., Any], tensors: Tensors, version: int, *, bucket_bytes: int = 1 << 15) -> None:
    """One swap without its commit."""
    run("prepare", (version, metas(tensors)))
    path = Path(f"/dev/shm/tandem-test-receiver-{os.getpid()}")
    try:
        for data, entries in buckets(tensors, bucket_bytes):
            path.write_bytes(data)
            run("load", (str(path), entries))
    finally:
        path.unlink(missing_ok=True)


def run_of(store: ParameterStore) -> Callable[..., Any]:
    return lambda command, arguments: getattr(store, command)(*arguments)


# ---- what is learned of a model


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("holding", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("bucket_bytes", [1 << 15, 1536])
def test_every_process_gets_its_part_of_the_tensors_as_its_model_would_load_it(
    versions: list[dict[str, torch.Tensor]], architecture: Architecture, tp: int, holding: Holding, bucket_bytes: int
) -> None:
    for index in range(tp):
        model = ShardedModel(versions[0], index, tp, derives=True)
        store = store_of(model, architecture, holding)
        for number, tensors in enumerate((*versions, versions[0])):
            transfer(run_of(store), tensors, number, bucket_bytes=bucket_bytes)
            assert number == 0 or model.equals(loaded(versions[number - 1], index, tp, derives=True)), "the old version serves"
            store.commit()
            store.settle()
            assert model.equals(loaded(tensors, index, tp, derives=True))


def test_tracing_moves_nothing(versions: list[dict[str, torch.Tensor]], architecture: Architecture) -> None:
    model = loaded(versions[1])
    trace = trace_load(model, tensor_metas(architecture, torch.float32).values())
    assert model.equals(loaded(versions[1]))
    assert sum(copy.copy.num_elements for copy in trace.copies) == sum(tensor.numel() for tensor in versions[0].values())


def test_what_a_process_wants_is_enough_for_it(versions: list[dict[str, torch.Tensor]], architecture: Architecture) -> None:
    wanted = []
    for index in range(2):
        model = ShardedModel(versions[0], index, 2)
        store = store_of(model, architecture, ON_CPU)
        wanted.append(store.wanted())
        assert len(wanted[-1]) == len(versions[0])
        rest = {name: torch.full_like(tensor, torch.nan) for name, tensor in versions[0].items()}
        for name, region in wanted[-1]:
            box = tuple(slice(*bounds) for bounds in region)
            rest[name][box] = versions[0][name][box]
        transfer(run_of(store), rest, 0)
        store.commit()
        assert model.equals(loaded(versions[0], index, 2))
    name, region = next(item for item in wanted[1] if "down_proj" in item[0])
    rows, columns = versions[0][name].shape
    assert region == ((0, rows), (columns // 2, columns))


def test_a_parameter_that_no_tensor_fills_is_named(versions: list[dict[str, torch.Tensor]], architecture: Architecture) -> None:
    model = ShardedModel(versions[0])
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(WeightTransferError, match=r"no tensor fills SGLang's parameter extra"):
        Receiver(model, architecture, torch.float32, 0)
    del model.extra
    model.model_norm_weight = torch.nn.Parameter(torch.zeros(50))
    model.load_weights = (
        lambda weights: [  # pyright: ignore[reportAttributeAccessIssue]
            model.model_norm_weight.data[:48].copy_(tensor)
            if name == "model.norm.weight"
            else ShardedModel.load_weights(model, [(name, tensor)])
            for name, tensor in weights
            if "proj" not in name or "qkv" in model._fused(name)[0] or "o_proj" in name or "down" in name
        ]
    )
    with pytest.raises(WeightTransferError, match=r"no tensor fills SGLang's parameter model_\S+"):
        Receiver(model, architecture, torch.float32, 0)


def test_a_model_that_computes_with_what_it_loads_still_gets_it(
    versions: list[dict[str, torch.Tensor]], architecture: Architecture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Scaling(ShardedModel):
        def load_weights(self, weights: Any) -> None:
            super().load_weights((name, tensor * 2 if name == "model.norm.weight" else tensor) for name, tensor in weights)

    model = Scaling(versions[0])
    with pytest.raises(UntraceableError, match=r"it computes aten\.mul\.Tensor of the tensors that it loads"):
        trace_load(model, tensor_metas(architecture, torch.float32).values())
    receiver = Receiver(model, architecture, torch.float32, 0)
    assert isinstance(receiver._store, WholeTensors)
    assert "loads whole tensors at every commit, from two more copies of the model: UntraceableError: it computes" in capfd.readouterr().out
    assert receiver.run("wanted", ()) is None
    for number, tensors in enumerate(versions):
        transfer(receiver.run, tensors, number)
        receiver.run("commit", (number,))
        assert torch.equal(model.model_norm_weight, tensors["model.norm.weight"] * 2)
    receiver.run("revert", (1,))
    assert torch.equal(model.model_norm_weight, versions[0]["model.norm.weight"] * 2)


def test_a_parameter_that_sglang_replaced_is_found_again(versions: list[dict[str, torch.Tensor]], architecture: Architecture) -> None:
    model = ShardedModel(versions[0])
    receiver = Receiver(model, architecture, torch.float32, 0)
    transfer(receiver.run, versions[0], 0)
    receiver.run("commit", (1,))
    model.model_norm_weight = torch.nn.Parameter(torch.zeros(48), requires_grad=False)
    transfer(receiver.run, versions[1], 1)
    receiver.run("commit", (2,))
    assert model.equals(loaded(versions[1]))


# ---- transactions


@pytest.mark.parametrize("holding", [ON_CPU, ON_GPU])
@pytest.mark.parametrize(
    "fault", ["another process fails", "what follows from the weights cannot be computed", "the exchange fails half-way"]
)
def test_a_commit_that_fails_anywhere_brings_the_old_weights_back(
    versions: list[dict[str, torch.Tensor]],
    architecture: Architecture,
    holding: Holding,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Holding, "of", lambda *_: holding)
    model = ShardedModel(versions[0], derives=True)
    receiver = Receiver(model, architecture, torch.float32, 0)
    transfer(receiver.run, versions[0], 0)
    receiver.run("commit", (1,))
    receiver.run("settle", ())
    digest = receiver.run("digest", ())
    transfer(receiver.run, versions[1], 1)
    with monkeypatch.context() as patch:
        if fault == "another process fails":
            receiver.run("commit", (2,))
            assert model.equals(loaded(versions[1], derives=True))
        else:
            fail_once(patch, receiver, model, fault, holding)
            with pytest.raises(WeightTransferError, match=r"does not take the weights .*no room for more.*; it has the old ones again"):
                receiver.run("commit", (2,))
    receiver.run("revert", (2,))
    assert model.equals(loaded(versions[0], derives=True))
    assert receiver.run("digest", ()) == digest
    receiver.run("rollback", ())
    transfer(receiver.run, versions[1], 2)
    receiver.run("commit", (3,))
    assert model.equals(loaded(versions[1], derives=True))


def fail_once(patch: pytest.MonkeyPatch, receiver: Receiver, model: ShardedModel, fault: str, holding: Holding) -> None:
    """The next commit fails: in `post_load_weights`, or at the fifth step of the exchange."""
    left = 1 if fault.startswith("what follows") else 5

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            result = original(*arguments)
            if left == 0:
                raise MemoryError("no room for more")
            return result

        return call

    assert isinstance(receiver._store, ParameterStore)
    if fault.startswith("what follows"):
        patch.setattr(receiver._store, "_post_load", failing(model.post_load_weights))
    elif holding.by_pointer:
        patch.setattr(torch, "as_strided", failing(torch.as_strided))
    else:
        patch.setattr(torch.Tensor, "copy_", failing(torch.Tensor.copy_))


def test_bytes_that_were_damaged_or_never_came_are_not_committed(
    versions: list[dict[str, torch.Tensor]], architecture: Architecture, tmp_path: Path
) -> None:
    model = ShardedModel(versions[0], 1, 2)
    store = store_of(model, architecture, ON_CPU)
    transfer(run_of(store), versions[0], 0)
    store.commit()
    for number, (data, entries) in enumerate(filled := buckets(versions[1], 1 << 13)):
        store.prepare(1, metas(versions[1]))
        damaged = bytearray(data)
        damaged[entries[-1].bucket_start] ^= 1  # of the half that is the other process's as well: all of an entry is verified
        (tmp_path / "bucket").write_bytes(damaged)
        wanted = {name: region for name, region in store.wanted()}[entries[-1].name]
        row_bytes = versions[1][entries[-1].name][0].nbytes if len(wanted) == 2 else 4
        if entries[-1].tensor_start + entries[-1].num_bytes <= wanted[0][0] * row_bytes:
            store.load(str(tmp_path / "bucket"), entries[-1:])  # nothing of it is wanted: it is not read
        else:
            with pytest.raises(WeightTransferError, match=rf"tensor {entries[-1].name}, bytes \d+:\d+: checksum"):
                store.load(str(tmp_path / "bucket"), entries)
            with pytest.raises(WeightTransferError, match="roll back"):
                store.commit()
        assert number < len(filled)
    store.prepare(1, metas(versions[1]))
    for data, entries in filled[1:]:
        (tmp_path / "bucket").write_bytes(data)
        store.load(str(tmp_path / "bucket"), entries)
    with pytest.raises(WeightTransferError, match=r"tensor \S+ is incomplete: byte \d+ of \d+ never came"):
        store.commit()
    assert model.equals(loaded(versions[0], 1, 2))


# ---- memory and digests


def test_after_the_second_swap_nothing_is_allocated_any_more(versions: list[dict[str, torch.Tensor]], architecture: Architecture) -> None:
    model = ShardedModel(versions[0])
    store = store_of(model, architecture, ON_CPU)
    places = []
    for number in range(6):
        transfer(run_of(store), versions[number % 2], number)
        store.commit()
        places.append([parameter.data_ptr() for parameter in model.parameters()])
    assert places[0] == places[2] == places[4] != places[1] == places[3] == places[5]


def test_a_spare_that_is_not_kept_has_memory_during_a_swap_only(
    versions: list[dict[str, torch.Tensor]], architecture: Architecture
) -> None:
    model = ShardedModel(versions[0])
    places = [parameter.data_ptr() for parameter in model.parameters()]
    store = store_of(model, architecture, ON_GPU)

    def spare_bytes() -> int:
        return sum(flat.untyped_storage().nbytes() for flat in store._parameters.spare)

    assert spare_bytes() == 0
    for number in range(3):
        transfer(run_of(store), versions[number % 2], number)
        assert spare_bytes() == store._parameters.num_bytes
        if number == 1:
            store.rollback()
        else:
            store.commit()
            assert store.must_settle
            store.settle()
        assert spare_bytes() == 0
    assert model.equals(loaded(versions[0]))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places, "graphs know the addresses"


def test_a_model_that_holds_a_parameter_in_another_way_too_is_overwritten_in_place(versions: list[dict[str, torch.Tensor]]) -> None:
    model = ShardedModel(versions[0])
    targets = {name: parameter.data for name, parameter in model.named_parameters()}
    assert Holding.of(model, targets) == ON_CPU
    model.kept_aside = [{"view": model.model_norm_weight.data[3:]}]
    assert Holding.of(model, targets) == Holding(kept=True, by_pointer=False)


def test_equal_weights_have_equal_digests_and_those_of_the_embedded_engine(
    versions: list[dict[str, torch.Tensor]], architecture: Architecture
) -> None:
    model = ShardedModel(versions[0])
    store = store_of(model, architecture, ON_CPU)
    assert store.digest() is None
    digests = []
    for number in (0, 1, 0):
        transfer(run_of(store), versions[number], number, bucket_bytes=1 << (12 + number))
        store.commit()
        digests.append(store.digest())
    assert digests[0] == digests[2] != digests[1]
    weights = ModelWeights(architecture, torch.float32)
    for name, tensor in versions[0].items():
        weights.named[name].copy_(tensor)
    assert digests[0] == weights.digest()
