"""What a trainer keeps and restores: its optimizer afresh, distributed checkpoints under another layout, weights by name."""

import math
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.checkpoint.names import NameMap, Region
from tandem.engine.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainerConfig
from tandem.engine.hf_config import qwen3_hf_config
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.state import random_state, rectangles, set_random_state
from tests.ranks import run_ranks
from tests.trainer.compare import microbatches_of
from tests.trainer.reference import LENGTHS

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


Weights = dict[tuple[str, Region], torch.Tensor]


def _held(trainer: MegatronTrainer) -> Weights:
    """What this rank holds of the model's tensors under their Hugging Face names, which do not depend on the layout."""
    names, held = NameMap(trainer.hf_config), {}
    for shard in trainer.weight_shards():
        for view in names.views(shard):
            view.copy_to(out := torch.empty(view.region_shape, dtype=shard.tensor.dtype))
            held[view.name, view.region] = out
    return held


def _whole(model: dict[str, Any], ranks: list[Weights], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    whole = {meta.name: torch.full(meta.shape, torch.nan, dtype=dtype) for meta in NameMap(model).tensors(dtype)}
    for held in ranks:
        for (name, region), values in held.items():
            whole[name][tuple(slice(*bounds) for bounds in region)] = values
    assert not any(values.isnan().any() for values in whole.values())
    return whole


def _distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest of all tensors' differences, each relative to the tensor (Frobenius norms)."""
    return max(((x - second[name]).norm() / x.norm()).item() for name, x in first.items())


def _save(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig, folder: str) -> Weights:
    """Two steps, a checkpoint, and the weights after one more."""
    trainer = _trainer(mesh, model, config)
    _train(trainer, 2)
    # Saved in this process: megatron's own queue would start an interpreter for its results.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(trainer.sharded_state_dict(), folder)
    if config.reset_optimizer:
        trainer.reset_optimizer()
    _train(trainer, 1)
    return _held(trainer)


def _load(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig, folder: str, optimizer: bool = True) -> Weights:
    """The weights after one step on from a checkpoint."""
    trainer = _trainer(mesh, model, config, seed=8)
    _train(trainer, 1)  # so that there are other moments to overwrite
    if not optimizer:
        trainer.reset_optimizer()
    wanted = trainer.sharded_state_dict(optimizer=optimizer)
    loaded: Any = dist_checkpointing.load(wanted, folder)
    trainer.load_sharded({name: value for name, value in loaded.items() if name in wanted})
    if config.reset_optimizer:
        trainer.reset_optimizer()
    _train(trainer, 1)
    return _held(trainer)


def _loaded_groups(folder: str, config: TrainerConfig) -> set[tuple[Any, ...]]:
    trainer = _trainer(MeshConfig(), hf_config(), config)
    trainer.load_sharded(dist_checkpointing.load(trainer.sharded_state_dict(), folder))  # pyright: ignore[reportArgumentType]
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
    state: Any = dist_checkpointing.load(trainer.sharded_state_dict(optimizer=False), folder)
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
KEPT = TrainerConfig(reset_optimizer=False, optimizer=CONFIG.optimizer)
PLAIN = TrainerConfig(reset_optimizer=False, distributed_optimizer=False, optimizer=CONFIG.optimizer)
TP2_EP2 = MeshConfig(tp=2, sequence_parallel=True, ep=2)

CASES: dict[str, tuple[TrainerConfig, int, tuple[int, MeshConfig], TrainerConfig, tuple[int, MeshConfig]]] = {
    "tp2 pp2 to dp4": (KEPT, 0, (4, MeshConfig(tp=2, pp=2)), KEPT, (4, MeshConfig())),
    "dp3 to pp2 vpp2": (KEPT, 0, (3, MeshConfig()), KEPT, (2, MeshConfig(pp=2, vpp=2))),
    "dp2 plain to dp3": (PLAIN, 0, (2, MeshConfig()), KEPT, (3, MeshConfig())),
    "dp2 to tp2 plain": (KEPT, 0, (2, MeshConfig()), PLAIN, (2, MeshConfig(tp=2, sequence_parallel=True))),
    "ep2 to 1": (KEPT, 4, (2, MeshConfig(ep=2)), KEPT, (1, MeshConfig())),
    "1 to ep4": (KEPT, 4, (1, MeshConfig()), KEPT, (4, MeshConfig(ep=4))),
    "ep2 tp2 to pp2": (KEPT, 4, (2, TP2_EP2), KEPT, (2, MeshConfig(pp=2))),
    "ep2 etp2 to dp3": (KEPT, 4, (4, MeshConfig(tp=2, sequence_parallel=True, ep=2, etp=2)), KEPT, (3, MeshConfig())),
    "ep2 to pp2, reset": (CONFIG, 4, (2, MeshConfig(ep=2)), CONFIG, (2, MeshConfig(pp=2))),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in ("ep2 etp2 to dp3", "dp2 to tp2 plain") else []) for case in CASES]
)
def test_a_checkpoint_continues_under_another_layout(case: str, tmp_path: Path) -> None:
    config, num_experts, saved, other, loaded = CASES[case]
    model = hf_config(num_experts=num_experts)
    wanted = _whole(model, run_ranks(_save, saved[0], saved[1], model, config, str(tmp_path)))
    found = _whole(model, run_ranks(_load, loaded[0], loaded[1], model, other, str(tmp_path)))
    assert _distance(wanted, found) <= 1e-6


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "num_experts", "num_ranks", "mesh"),
    [(KEPT, 4, 2, TP2_EP2), (PLAIN, 0, 2, MeshConfig(pp=2, vpp=2)), (BF16, 0, 2, MeshConfig()), (CONFIG, 0, 2, MeshConfig(pp=2))],
    ids=["ep2 tp2", "pp2 vpp2 plain", "dp2 bf16", "pp2 reset"],
)
def test_a_checkpoint_continues_bit_for_bit_under_its_own_layout(
    config: TrainerConfig, num_experts: int, num_ranks: int, mesh: MeshConfig, tmp_path: Path
) -> None:
    model = hf_config(num_experts=num_experts)
    wanted = run_ranks(_save, num_ranks, mesh, model, config, str(tmp_path))
    found = run_ranks(_load, num_ranks, mesh, model, config, str(tmp_path))
    for before, after in zip(wanted, found, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(values, after[place]) for place, values in before.items())


@pytest.mark.distributed
def test_without_its_moments_an_optimizer_steps_elsewhere(tmp_path: Path) -> None:
    """What the tests above compare would show if the optimizer's state were not loaded."""
    model = hf_config()
    wanted = _whole(model, run_ranks(_save, 1, MeshConfig(), model, KEPT, str(tmp_path)))
    found = _whole(model, run_ranks(_load, 1, MeshConfig(), model, KEPT, str(tmp_path), False))
    assert _distance(wanted, found) > 1e-3


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1), (4, 1, 3)])
def test_a_run_of_elements_is_cut_into_rectangles_that_cover_it_once(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    whole = torch.arange(size).view(shape)
    for start in range(size + 1):
        for stop in range(start, size + 1):
            found, expected_before = [], 0
            for offset, extent, before in rectangles(shape, start, stop):
                assert before == expected_before
                found.append(whole[tuple(slice(at, at + n) for at, n in zip(offset, extent, strict=True))].reshape(-1))
                expected_before += math.prod(extent)
            assert torch.equal(torch.cat([*found, torch.empty(0, dtype=torch.int64)]), torch.arange(start, stop))
            assert len(found) <= 2 * len(shape) - 1


def _roll_dice(saved: dict[str, Any] | None) -> tuple[dict[str, Any], torch.Tensor]:
    build_mesh(MeshConfig(), hf_config())
    if saved is None:
        torch.manual_seed(dist.get_rank())
        torch.rand(3)
    else:
        set_random_state(saved[str(dist.get_rank())])
    state = random_state()
    return state, torch.rand(4)


@pytest.mark.distributed
def test_random_generators_go_on_where_they_were_saved() -> None:
    before = run_ranks(_roll_dice, 2, None)
    after = run_ranks(_roll_dice, 2, {str(rank): state for rank, (state, _) in enumerate(before)})
    assert [torch.equal(x, y) for (_, x), (_, y) in zip(before, after, strict=True)] == [True, True]
    assert not torch.equal(before[0][1], before[1][1])


@pytest.mark.distributed
def test_bf16_trains_like_fp32_within_its_rounding() -> None:
    exact = run_ranks(_losses, 1, MeshConfig(), hf_config(), CONFIG, 3)[0]
    for num_ranks, mesh in ((1, MeshConfig()), (4, MeshConfig(tp=2, pp=2, sequence_parallel=True))):
        for losses in run_ranks(_losses, num_ranks, mesh, hf_config(), BF16, 3):
            assert losses == pytest.approx(exact, rel=2e-2)
