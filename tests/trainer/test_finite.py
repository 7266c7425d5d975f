"""A step whose loss or gradient is no number: every rank hears which microbatch of which rank and which tensor, and nothing changes."""

import dataclasses
import math
from typing import Any

import pytest
import torch

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.config import LossConfig, MeshConfig, OptimizerConfig, TrainerConfig
from tandem.engine.trainer.finite import NonFiniteError
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.model import named_weights
from tests.ranks import run_ranks
from tests.trainer.compare import microbatches_of
from tests.trainer.test_state import hf_config

STOP = TrainerConfig(optimizer=OptimizerConfig(lr=1e-3))
SKIP = dataclasses.replace(STOP, on_nonfinite="skip", max_nonfinite_skips=2)


def _trainer(mesh: MeshConfig, config: TrainerConfig, loss: LossConfig | None = None) -> MegatronTrainer:
    return MegatronTrainer(hf_config(), build_mesh(mesh, hf_config()), config, loss or LossConfig(), 1.0, 1)


def _with_bad_advantage(trainer: MegatronTrainer, dp_rank: int, index: int) -> list[Any]:
    microbatches = microbatches_of(trainer.mesh)
    if trainer.mesh.dp_rank == dp_rank:
        bad = torch.full_like(microbatches[index].advantages_R, math.inf)
        microbatches[index] = dataclasses.replace(microbatches[index], advantages_R=bad)
    return microbatches


def _message(mesh: MeshConfig, dp_rank: int, index: int) -> str:
    trainer = _trainer(mesh, STOP)
    microbatches = _with_bad_advantage(trainer, dp_rank, index)
    with pytest.raises(NonFiniteError) as caught:
        trainer.update([microbatches], [8.0], [trainer.logprobs(microbatches)])
    return str(caught.value)


@pytest.mark.distributed
def test_every_rank_hears_of_the_microbatch_of_the_one_rank() -> None:
    messages = run_ranks(_message, 2, MeshConfig(), 1, 1)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 1: the loss of microbatch 1 of update 0 is ")
    # Only the last stage has a loss.
    messages = run_ranks(_message, 2, MeshConfig(pp=2), 0, 1)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 1: the loss of microbatch 1 of update 0 is ")


def _state(trainer: MegatronTrainer) -> list[torch.Tensor]:
    parts = [weight.tensor for weight in trainer.weight_shards()]
    for group in trainer._optimizer.param_groups:
        for parameter in group["params"]:
            parts += [parameter.data, *trainer._optimizer.optimizer.state[parameter].values()]
    return [part.clone() for part in parts if torch.is_tensor(part)]


def _skips(dp_rank: int) -> tuple[bool, bool, dict[str, float], dict[str, float], str]:
    trainer = _trainer(MeshConfig(), SKIP)
    good, bad = microbatches_of(trainer.mesh), _with_bad_advantage(trainer, dp_rank, 0)
    reference = trainer.logprobs(good)
    trainer.update([good], [8.0], [reference])
    before = _state(trainer)
    only_bad = trainer.update([bad], [8.0], [reference])
    untouched = all(torch.equal(x, y) for x, y in zip(_state(trainer), before, strict=True))
    mixed = trainer.update([bad, good, bad, bad], [8.0] * 4, [reference] * 4)
    # The good update between makes the two before it and the two after it runs of their own.
    after_mixed = _state(trainer)
    plain = MegatronTrainer(hf_config(), trainer.mesh, SKIP, LossConfig(), 1.0, 1)
    for _ in range(2):
        plain.update([good], [8.0], [reference])
    same = all(torch.equal(x, y) for x, y in zip(after_mixed, _state(plain), strict=True))
    with pytest.raises(NonFiniteError) as caught:
        trainer.update([bad], [8.0], [reference])
    return untouched, same, only_bad, mixed, str(caught.value)


@pytest.mark.distributed
def test_a_skipped_update_leaves_weights_and_optimizer_bitwise_and_too_many_in_a_row_stop() -> None:
    for untouched, same, only_bad, mixed, message in run_ranks(_skips, 2, 1):
        assert untouched
        assert same
        assert only_bad == {"skipped_updates": 1.0, "learning_rate": 1e-3, "tokens": 0.0}
        assert mixed["skipped_updates"] == 3
        assert math.isfinite(mixed["loss"])
        assert message.startswith("more than trainer.max_nonfinite_skips=2 updates in a row: rank 1: the loss of microbatch 0")


def _overflow() -> str:
    """One element of one gradient of rank 1 overflows on its way back, and its sum over the ranks with it."""
    trainer = _trainer(MeshConfig(), STOP)
    if trainer.mesh.rank == 1:
        (chunk,) = trainer._chunks
        weights = dict(named_weights(chunk, trainer.mesh))
        weights["decoder.layers.1.mlp.linear_fc1.weight"].register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), math.inf))
    microbatches = microbatches_of(trainer.mesh)
    with pytest.raises(NonFiniteError) as caught:
        trainer.update([microbatches], [8.0], [trainer.logprobs(microbatches)])
    return str(caught.value)


@pytest.mark.distributed
def test_a_gradient_that_overflows_names_its_tensor_though_the_loss_is_a_number() -> None:
    first, second = run_ranks(_overflow, 2)
    assert first == second
    tensor = "the first gradient that is not finite is that of decoder.layers.1.mlp.linear_fc1.weight"
    assert f"{tensor}, in update 0, though every loss is a number" in first


def _bad_weight() -> str:
    trainer = _trainer(MeshConfig(), STOP)
    weight = next(w for w in trainer.weight_shards() if w.name == "decoder.layers.2.mlp.linear_fc2.weight")
    weight.tensor[0, 0] = math.nan
    microbatches = microbatches_of(trainer.mesh)
    with pytest.raises(NonFiniteError) as caught:
        trainer.update([microbatches], [8.0], [trainer.logprobs(microbatches)])
    return str(caught.value)


@pytest.mark.distributed
def test_a_weight_that_is_no_number_is_named() -> None:
    (message,) = run_ranks(_bad_weight, 1)
    assert "the weight decoder.layers.2.mlp.linear_fc2.weight itself is not finite on rank 0" in message
    assert "first log-prob that is no number: token" in message
