"""The embedded engine's two versions of the weights: what is computed from the tensors is always that of the version that serves."""

from types import SimpleNamespace
from typing import Any

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.rollout.receive import WeightStore, gaps, note_received
from tests.rollout.models import disk_tensors, send, tiny_model


def sink_of(store: WeightStore) -> Any:
    return SimpleNamespace(prepare=store.prepare, load=store.load)


def test_the_float32_head_is_one_tensor_and_that_of_the_version_that_serves() -> None:
    models = [tiny_model(dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    heads = [disk_tensors(model)["model.embed_tokens.weight"].float() for model in models]  # tied
    store = WeightStore(Architecture.from_hf(models[0].config.to_dict()), torch.bfloat16)

    def receive(version: int) -> None:
        send(sink_of(store), disk_tensors(models[version]), version)

    def serves(version: int) -> bool:
        assert store.serving is not None
        return store.serving.policy_version == version and torch.equal(store.serving.head_fp32, heads[version])

    receive(0)
    store.commit()
    assert store.serving is not None
    first = store.serving.head_fp32
    receive(1)
    assert serves(0)  # until the commit
    store.rollback()
    assert serves(0)
    receive(1)
    store.commit()
    assert serves(1)
    store.take_back()
    assert serves(0)
    receive(2)
    store.commit()
    assert serves(2)
    assert store.serving.head_fp32 is first


def test_neighbouring_ranges_are_joined_and_gaps_are_found() -> None:
    received: list[tuple[int, int]] = []
    for start, end in ((0, 4), (4, 8), (12, 16), (16, 20), (8, 9)):
        note_received(received, start, end)
    assert received == [(0, 8), (12, 20), (8, 9)]
    assert list(gaps(received, 24)) == [(9, 12), (20, 24)]
