"""The side of a swap that runs in SGLang's processes, on a model that fails on demand: all of it, or none."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tandem.engine.architecture import Architecture
from tandem.engine.rollout.sglang_receiver import Receiver
from tandem.engine.types import WeightTransferError
from tests.rollout.models import buckets, disk_tensors, metas, tiny_model


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    return [tiny_model(seed=seed) for seed in range(2)]


class RefusingModel(torch.nn.Module):
    """Takes weights as SGLang's models do, and fails after the first tensor when it is told to."""

    def __init__(self, names: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = list(names)
        self.values = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in names.values()])
        self.fails_in = -1  # a call of load_weights
        self.num_calls = 0

    def load_weights(self, weights: Any) -> None:
        self.num_calls += 1
        for name, tensor in weights:
            self.values[self.names.index(name)].data.copy_(tensor)
            if self.num_calls == self.fails_in:
                raise RuntimeError("no room for more")

    def holds(self, tensors: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(self.values[self.names.index(name)], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("fails_in", [None, 2])
def test_a_commit_that_fails_within_the_model_or_after_it_brings_the_old_weights_back(
    models: list[PreTrainedModel], fails_in: int | None
) -> None:
    old, new = disk_tensors(models[0]), disk_tensors(models[1])
    model = RefusingModel(old)
    receiver = Receiver(model, Architecture.from_hf(models[0].config.to_dict()), torch.float32)

    def transfer(tensors: dict[str, torch.Tensor], version: int) -> None:
        receiver.run("prepare", (version, metas(tensors)))
        for number, (data, entries) in enumerate(buckets(tensors, 1 << 15)):
            path = Path(f"/dev/shm/tandem-test-receiver-{os.getpid()}-{number}")
            path.write_bytes(data)
            receiver.run("load", (str(path), entries))
            path.unlink()

    transfer(old, 0)
    receiver.run("commit", (1,))
    assert model.holds(old)
    digest = receiver.run("digest", ())
    transfer(new, 1)
    if fails_in is None:
        receiver.run("commit", (2,))
        assert model.holds(new)
        receiver.run("revert", (2,))  # another process of the server failed
    else:
        model.fails_in = fails_in
        with pytest.raises(WeightTransferError, match=r"does not take the weights .*no room for more.*; it has the old ones again"):
            receiver.run("commit", (2,))
        receiver.run("revert", (2,))  # it never got so far: nothing to undo
    assert model.holds(old)
    assert receiver.run("digest", ()) == digest
    transfer(new, 2)
    receiver.run("commit", (3,))
    assert model.holds(new)
