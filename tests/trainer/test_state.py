"""What a trainer keeps and restores: its optimizer afresh, distributed checkpoints under another layout, weights by name."""

import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainerConfig
from tandem.engine.trainer.layers import qwen3_hf_config
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tests.ranks import run_ranks
from tests.trainer.test_megatron import LENGTHS, microbatches_of

CONFIG = TrainerConfig(optimizer=OptimizerConfig(lr=1e-2, eps=1e-3))
NUM_TARGETS = sum(response for _, response in LENGTHS)


def hf_config(**changes: Any) -> dict[str, Any]:
    sizes: Any = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return qwen3_hf_config(ModelConfig(**(sizes | {"intermediate_size": 48, "moe_intermediate_size": 16} | changes)), 64)


def _trainer(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig = CONFIG, seed: int = 7) -> MegatronTrainer:
    return MegatronTrainer(model, build_mesh(mesh, model), config, LossConfig(), 1.0, seed)


def _train(trainer: MegatronTrainer, steps: int) -> list[float]:
    return [trainer.sft_step(microbatches_of(trainer.mesh), NUM_TARGETS)["loss"] for _ in range(steps)]


def _losses(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig, steps: int) -> list[float]:
    return _train(_trainer(mesh, model, config), steps)


@pytest.mark.distributed
def test_random_weights_and_training_do_not_depend_on_the_layout() -> None:
    for model, meshes in (
        (hf_config(), [(2, MeshConfig(tp=2)), (4, MeshConfig(pp=2, cp=2)), (2, MeshConfig(pp=2, vpp=2))]),
        (hf_config(num_experts=4), [(2, MeshConfig(ep=2)), (2, MeshConfig(tp=2, sequence_parallel=True))]),
    ):
        one = run_ranks(_losses, 1, MeshConfig(), model, CONFIG, 3)[0]
        assert one[2] < one[0]
        for num_ranks, mesh in meshes:
            for losses in run_ranks(_losses, num_ranks, mesh, model, CONFIG, 3):
                assert losses == pytest.approx(one, rel=1e-5), mesh


def _weights(trainer: MegatronTrainer) -> list[torch.Tensor]:
    return [weight.tensor.clone() for weight in trainer.weight_shards()]


def _reset(config: TrainerConfig) -> tuple[bool, bool]:
    """After training and a reset with the first weights put back, a step is the first step of all again; without the reset it is not."""
    trainer = _trainer(MeshConfig(), hf_config(), config)
    first = _weights(trainer)
    _train(trainer, 1)
    stepped = _weights(trainer)
    same = []
    for reset in (False, True):
        _train(trainer, 1)
        for weight, value in zip(trainer.weight_shards(), first, strict=True):
            weight.tensor.copy_(value)
        trainer.weights_changed()
        if reset:
            trainer.reset_optimizer()
        _train(trainer, 1)
        same.append(all(torch.equal(x, y) for x, y in zip(_weights(trainer), stepped, strict=True)))
    return same[0], same[1]


@pytest.mark.distributed
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_reset_optimizer_steps_like_a_fresh_one(distributed_optimizer: bool) -> None:
    config = TrainerConfig(distributed_optimizer=distributed_optimizer, optimizer=CONFIG.optimizer)
    assert run_ranks(_reset, 2, config) == [(False, True)] * 2


def _save(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig, folder: str) -> list[float]:
    trainer = _trainer(mesh, model, config)
    _train(trainer, 2)
    # Saved in this process: megatron's own queue would start an interpreter for its results.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(trainer.sharded_state_dict(), folder)
    return _train(trainer, 2)


def _load(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig, folder: str) -> list[float]:
    trainer = _trainer(mesh, model, config, seed=8)
    loaded: Any = dist_checkpointing.load(trainer.sharded_state_dict(is_loading=True), folder)
    trainer.load_sharded(loaded)
    return _train(trainer, 2)


def _loaded_groups(folder: str, config: TrainerConfig) -> set[tuple[Any, ...]]:
    trainer = _trainer(MeshConfig(), hf_config(), config)
    trainer.load_sharded(dist_checkpointing.load(trainer.sharded_state_dict(is_loading=True), folder))  # pyright: ignore[reportArgumentType]
    return {(group["eps"], group["betas"], group["weight_decay"], group["lr"]) for group in trainer._optimizer.param_groups}


@pytest.mark.distributed
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_loaded_optimizer_keeps_the_settings_of_its_trainer(distributed_optimizer: bool, tmp_path: Path) -> None:
    saved = TrainerConfig(distributed_optimizer=distributed_optimizer, optimizer=CONFIG.optimizer)
    other = OptimizerConfig(lr=2e-3, eps=1e-6, beta1=0.5, beta2=0.75, weight_decay=0.25)
    run_ranks(_save, 1, MeshConfig(), hf_config(), saved, str(tmp_path))
    config = TrainerConfig(distributed_optimizer=distributed_optimizer, optimizer=other)
    groups = run_ranks(_loaded_groups, 1, str(tmp_path), config)[0]
    assert groups == {(1e-6, (0.5, 0.75), 0.25, 2e-3), (1e-6, (0.5, 0.75), 0.0, 2e-3)}  # Megatron does not decay norms


def _load_model(mesh: MeshConfig, model: dict[str, Any], folder: str) -> tuple[list[torch.Tensor], float]:
    """Weights that were loaded alone, and how far a step of learning rate 0 moves them."""
    trainer = _trainer(mesh, model, BF16, seed=8)
    state: Any = dist_checkpointing.load(trainer.sharded_state_dict(is_loading=True, optimizer=False), folder)
    assert "optimizer" not in trainer.sharded_state_dict(optimizer=False)
    trainer.load_sharded({name: value for name, value in state.items() if name != "optimizer"})
    trainer.set_learning_rate(0.0)
    weights = _weights(trainer)
    _train(trainer, 1)
    return weights, max((x - y).abs().max().item() for x, y in zip(weights, _weights(trainer), strict=True))


def _save_model(model: dict[str, Any], folder: str) -> list[torch.Tensor]:
    trainer = _trainer(MeshConfig(), model, BF16)
    _train(trainer, 1)
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(trainer.sharded_state_dict(), folder)
    return _weights(trainer)


@pytest.mark.distributed
def test_a_model_loads_without_its_optimizer(tmp_path: Path) -> None:
    saved = run_ranks(_save_model, 1, hf_config(), str(tmp_path))[0]
    weights, moved = run_ranks(_load_model, 1, MeshConfig(), hf_config(), str(tmp_path))[0]
    assert all(torch.equal(x, y) for x, y in zip(weights, saved, strict=True))
    assert moved == 0.0  # the step writes the optimizer's master weights into the model's


BF16 = TrainerConfig(dtype="bfloat16", optimizer=CONFIG.optimizer)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "num_experts", "saved", "loaded"),
    [
        (CONFIG, 0, (1, MeshConfig()), (1, MeshConfig())),
        (CONFIG, 0, (2, MeshConfig()), (2, MeshConfig(tp=2, sequence_parallel=True))),
        (CONFIG, 0, (2, MeshConfig(pp=2)), (3, MeshConfig())),
        (CONFIG, 0, (2, MeshConfig(pp=2, vpp=2)), (2, MeshConfig(pp=2, vpp=2))),
        (CONFIG, 4, (2, MeshConfig(ep=2)), (2, MeshConfig(ep=2))),
        (TrainerConfig(distributed_optimizer=False, optimizer=CONFIG.optimizer), 0, (2, MeshConfig(tp=2)), (1, MeshConfig())),
    ],
)
def test_a_checkpoint_continues_under_another_layout(
    config: TrainerConfig, num_experts: int, saved: tuple[int, MeshConfig], loaded: tuple[int, MeshConfig], tmp_path: Path
) -> None:
    model = hf_config(num_experts=num_experts)
    wanted = run_ranks(_save, saved[0], saved[1], model, config, str(tmp_path))[0]
    for losses in run_ranks(_load, loaded[0], loaded[1], model, config, str(tmp_path)):
        assert losses == pytest.approx(wanted, rel=1e-6)
        if saved == loaded:
            assert losses == wanted  # bit for bit


@pytest.mark.distributed
def test_bf16_trains_like_fp32_within_its_rounding() -> None:
    exact = run_ranks(_losses, 1, MeshConfig(), hf_config(), CONFIG, 3)[0]
    for num_ranks, mesh in ((1, MeshConfig()), (4, MeshConfig(tp=2, pp=2, sequence_parallel=True))):
        for losses in run_ranks(_losses, num_ranks, mesh, hf_config(), BF16, 3):
            assert losses == pytest.approx(exact, rel=2e-2)
