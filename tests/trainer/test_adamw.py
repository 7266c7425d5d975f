"""The fused step in the trainer: against Megatron's own step, bit for bit in plain torch, and in Triton."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tests.kernels.interpreter  # noqa: F401  before any kernel
from tandem.engine.config import LossConfig, MeshConfig, OptimizerConfig, TrainerConfig
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.optimizer import parts_of
from tandem.engine.trainer.state import MOMENTS
from tandem.kernels.backend import chosen
from tests.ranks import run_ranks
from tests.trainer.compare import microbatches_of
from tests.trainer.test_state import NUM_TARGETS, hf_config

SETTINGS = OptimizerConfig(lr=1e-2, eps=1e-3, weight_decay=0.1)
OTHERS = OptimizerConfig(lr=1e-2, eps=1e-2, beta1=0.5, beta2=0.8, weight_decay=0.3, clip_grad=0.5)
Choice = Any  # Megatron's own step ("megatron"), or the fused one on this backend


def _step(trainer: MegatronTrainer, choice: Choice) -> None:
    """Only the optimizer on the chosen backend: the model would take Triton's interpreter minutes."""
    microbatches = microbatches_of(trainer.mesh)
    trainer.accumulate_gradients(microbatches, [losses.Supervised(normaliser=NUM_TARGETS)] * len(microbatches))
    with chosen("triton" if choice == "triton" else "reference"):
        trainer._optimizer.step()


def _unfuse(trainer: MegatronTrainer) -> None:
    for part in parts_of(trainer._optimizer):
        del part.optimizer.step, part._copy_main_params_to_model_params


def _tensors(trainer: MegatronTrainer) -> dict[str, list[torch.Tensor]]:
    """What a step changes, on this rank."""
    found = {"model": [shard.tensor.float() for shard in trainer.weight_shards()], "master": [], "step": []}
    found |= {name: [] for name in MOMENTS}
    for part in parts_of(trainer._optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                found["master"].append(parameter.detach())
                for name in ("step", *MOMENTS):
                    found[name].append(part.optimizer.state[parameter][name])
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in found.items()}


def _trained(mesh: MeshConfig, config: TrainerConfig, num_experts: int, choices: list[Choice]) -> list[list[dict[str, list[torch.Tensor]]]]:
    """Of each choice: after one step, and after one more, other settings, a reset, and another."""
    model = hf_config(num_experts=num_experts, num_layers=2)
    built, found = build_mesh(mesh, model), []
    for choice in choices:
        trainer = MegatronTrainer(model, built, config, LossConfig(), 1.0, 7)
        if choice == "megatron":
            _unfuse(trainer)
        _step(trainer, choice)
        first = _tensors(trainer)
        _step(trainer, choice)
        trainer.set_optimizer_config(OTHERS)
        trainer.reset_optimizer()
        trainer.set_learning_rate(5e-3)
        _step(trainer, choice)
        found.append([first, _tensors(trainer)])
    return found


def _pairs(one: Any, other: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for name in one:
        yield from ((name, x, y) for x, y in zip(one[name], other[name], strict=True))


CASES: dict[str, tuple[int, MeshConfig, TrainerConfig, int]] = {
    "distributed, bf16, experts apart": (2, MeshConfig(ep=2), TrainerConfig(dtype="bfloat16", optimizer=SETTINGS), 4),
    "distributed, fp32": (2, MeshConfig(), TrainerConfig(optimizer=SETTINGS), 0),
    "whole, bf16": (2, MeshConfig(pp=2), TrainerConfig(dtype="bfloat16", distributed_optimizer=False, optimizer=SETTINGS), 0),
    "whole, fp32": (1, MeshConfig(), TrainerConfig(distributed_optimizer=False, optimizer=SETTINGS), 0),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_megatrons_own_step_does(case: str) -> None:
    """In plain torch to the bit, so that a run on a CPU is what it was; in Triton up to the rounding of a step."""
    num_ranks, mesh, config, num_experts = CASES[case]
    for plain, reference, triton in run_ranks(_trained, num_ranks, mesh, config, num_experts, ["megatron", "reference", "triton"]):
        for own, right in zip(reference, plain, strict=True):
            assert all(torch.equal(x, y) for _, x, y in _pairs(own, right))
            assert all(step == step.round() for step in own["step"])
        assert any(not torch.equal(x, y) for _, x, y in _pairs(triton[0], plain[0]))  # so it did run
        for name, x, y in _pairs(triton[0], plain[0]):
            is_rounded = name == "model" and config.dtype == "bfloat16"
            assert (x - y).norm() <= (1e-3 if is_rounded else 1e-6) * y.norm() + 1e-12, name
        # A weight on the other side of a rounding to bf16 changes the gradients of the steps that follow.
        bound = 1e-2 if config.dtype == "bfloat16" else 1e-4
        for name, x, y in _pairs(triton[1], plain[1]):
            assert (x - y).norm() <= bound * y.norm() + 1e-12, name
        assert {float(step) for step in triton[1]["step"]} == {1.0}


def _moved(choice: Choice) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Model and master weights of a bf16 model whose weights moved in memory between two steps."""
    model = hf_config(num_layers=2)
    trainer = MegatronTrainer(model, build_mesh(MeshConfig(), model), CASES["whole, bf16"][2], LossConfig(), 1.0, 7)
    _step(trainer, choice)
    (part,) = parts_of(trainer._optimizer)
    weights = [weight for group in part.float16_groups for weight in group]
    for weight in weights:
        weight.data = weight.data.clone()
    before = [weight.detach().clone() for weight in weights]
    _step(trainer, choice)
    assert any(not torch.equal(x, y) for x, y in zip(weights, before, strict=True))
    mains = [main for group in part.fp32_from_float16_groups for main in group]
    return [weight.detach().clone() for weight in weights], [main.detach().clone() for main in mains]


@pytest.mark.distributed
@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_a_models_weights_are_its_rounded_master_weights_wherever_they_are(choice: Choice) -> None:
    weights, mains = run_ranks(_moved, 1, choice)[0]
    assert len(weights) > 10
    assert all(torch.equal(weight, main.bfloat16()) for weight, main in zip(weights, mains, strict=True))
    assert all(main.isfinite().all() for main in mains)
