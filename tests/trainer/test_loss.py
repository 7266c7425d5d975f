"""The loss of a microbatch, what a step reports, and what happens to numbers that are none."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.algo.pack import Microbatch, build_microbatch
from tandem.engine.config import LossConfig, MeshConfig, OptimizerConfig, TrainerConfig
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer import model
from tandem.engine.trainer.finite import NonFiniteError
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.optimizer import learning_rate
from tests.ranks import run_ranks
from tests.trainer.compare import microbatches_of
from tests.trainer.reference import training_rows
from tests.trainer.test_state import hf_config


def _microbatch() -> Microbatch:
    return build_microbatch(training_rows([(2, 3), (3, 6)]))


def test_tokens_of_earlier_policies_are_weighed_by_a_capped_ratio() -> None:
    microbatch = _microbatch()
    config = LossConfig(variant="rest", stale_segments="correct", importance_cap=1.5)
    reference_T = torch.where(microbatch.loss_mask_T, -torch.rand(microbatch.num_tokens), 0.0)
    logprobs_T = reference_T.clone().requires_grad_()
    objective = losses.Policy(config=config, normaliser=2.0, reference_T=reference_T)
    loss, _ = losses.microbatch_loss(objective, microbatch, logprobs_T, torch.zeros_like(reference_T))
    (grad_T,) = torch.autograd.grad(loss, logprobs_T)
    ratio_T = (reference_T - microbatch.behaviour_logprobs_T).exp().clamp(max=1.5)
    weight_T = torch.where(microbatch.on_policy_T, 1.0, ratio_T)
    advantage_T = torch.repeat_interleave(microbatch.advantages_R, microbatch.cu_seqlens.diff())
    assert torch.allclose(grad_T, torch.where(microbatch.loss_mask_T, -advantage_T * weight_T / 2, 0.0), atol=1e-6)


def test_without_a_reference_the_rollouts_is_taken_and_every_token_weighed() -> None:
    microbatch = _microbatch()
    logprobs_T = torch.full((microbatch.num_tokens,), -0.5, requires_grad=True)
    objective = losses.Policy(config=LossConfig(variant="rest", importance_cap=2.0), normaliser=1.0, reference_T=None)
    loss, sums = losses.microbatch_loss(objective, microbatch, logprobs_T, torch.zeros(microbatch.num_tokens))
    (grad_T,) = torch.autograd.grad(loss, logprobs_T)
    weight_T = (-0.5 - microbatch.behaviour_logprobs_T).exp().clamp(max=2.0)
    advantage_T = torch.repeat_interleave(microbatch.advantages_R, microbatch.cu_seqlens.diff())
    assert torch.allclose(grad_T, torch.where(microbatch.loss_mask_T, -advantage_T * weight_T, 0.0), atol=1e-6)
    apart_T = (-0.5 - microbatch.behaviour_logprobs_T).abs()[microbatch.on_policy_T & microbatch.loss_mask_T]
    assert sums[losses.MISMATCH_MAX].item() == pytest.approx(apart_T.max().item())
    assert sums[losses.MISMATCH].item() == pytest.approx(apart_T.sum().item())


@pytest.mark.parametrize("variant", ["mirror_descent", "grpo", "ppo_clip", "gspo", "rest", "token_level"])
def test_the_coefficients_of_a_policy_that_is_its_reference_are_known_beforehand(variant: Any) -> None:
    microbatch = _microbatch()
    config = LossConfig(variant=variant, stale_segments="correct", importance_cap=1.5, scale=0.5)
    reference_T = torch.where(microbatch.loss_mask_T, -torch.rand(microbatch.num_tokens), 0.0)
    first = losses.Policy(config=config, normaliser=2.0, reference_T=reference_T, is_reference=True)
    coefficients_T = losses.known_coefficients(first, microbatch)
    assert coefficients_T is not None
    logprobs_T = reference_T.clone().requires_grad_()
    loss, _ = losses.microbatch_loss(first, microbatch, logprobs_T, torch.zeros_like(reference_T))
    assert torch.equal(coefficients_T, torch.autograd.grad(loss, logprobs_T)[0])
    assert coefficients_T.any()
    later = losses.known_coefficients(dataclasses.replace(first, is_reference=False), microbatch)
    if variant == "rest":  # it has no ratio to a reference
        assert later is not None
        assert torch.equal(later, coefficients_T)
    else:
        assert later is None
    assert losses.known_coefficients(dataclasses.replace(first, reference_T=None), microbatch) is None


def test_the_coefficients_of_cross_entropy_are_known_beforehand() -> None:
    microbatch = _microbatch()
    coefficients_T = losses.known_coefficients(losses.Supervised(normaliser=4.0), microbatch)
    assert coefficients_T is not None
    assert torch.equal(coefficients_T, torch.where(microbatch.loss_mask_T, -0.25, 0.0))
    assert losses.known_coefficients(losses.Preference(normaliser=1.0, margins_P=torch.zeros(1)), microbatch) is None


CONFIG = TrainerConfig(optimizer=OptimizerConfig(lr=1e-3))


def _stats(mesh: MeshConfig, loss: LossConfig) -> dict[str, Any]:
    trainer = MegatronTrainer(hf_config(), build_mesh(mesh, hf_config()), CONFIG, loss, 0.8, 1)
    microbatches = microbatches_of(trainer.mesh)
    reference = trainer.logprobs(microbatches)
    trainer.set_learning_rate(5e-3)
    return trainer.update([microbatches, microbatches[:1]], [8.0, 8.0], [reference, reference[:1]])


@pytest.mark.distributed
@pytest.mark.parametrize("variant", ["mirror_descent", "grpo", "gspo"])
def test_a_batch_split_in_any_way_reports_the_same(variant: Any) -> None:
    loss = LossConfig(variant=variant, scale=0.1)
    (two,) = {tuple(stats.items()) for stats in run_ranks(_stats, 2, MeshConfig(tp=2), loss)}
    (four,) = {tuple(stats.items()) for stats in run_ranks(_stats, 4, MeshConfig(pp=2, cp=2), loss)}
    assert dict(four) == pytest.approx(dict(two), rel=2e-4, abs=1e-7)
    assert dict(two)["learning_rate"] == 5e-3
    assert dict(two)["kl"] > 0


def _gradients(mesh: MeshConfig) -> list[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """Which function computed the log-probs, the sums and all gradients: in a single pass, then in two."""
    trainer = MegatronTrainer(hf_config(), build_mesh(mesh, hf_config()), CONFIG, LossConfig(), 0.8, 1)
    microbatches = microbatches_of(trainer.mesh)
    kernel: Any = dict(vars(model))
    called: list[str] = []

    def noting(name: str) -> Any:
        return lambda *args, **options: called.append(name) or kernel[name](*args, **options)

    model.linear_logprob, model.linear_logprob_sum = noting("linear_logprob"), noting("linear_logprob_sum")
    fixed: Any = {"config": LossConfig(), "normaliser": 8.0, "is_reference": True}
    objectives = [losses.Policy(reference_T=reference_T, **fixed) for reference_T in trainer.logprobs(microbatches)]
    found = []
    for single_pass in (True, False):
        called.clear()
        trainer.config = dataclasses.replace(CONFIG, single_pass_logprobs=single_pass)
        sums = trainer.accumulate_gradients(microbatches, objectives)
        gradients: Any = [parameter.main_grad.flatten() for chunk in trainer.chunks for parameter in chunk.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
        found.append((sorted(set(called)), sums, torch.cat(gradients)))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", [MeshConfig(tp=2, sequence_parallel=True), MeshConfig(pp=2, cp=2)], ids=["TP2", "PP2 CP2"])
def test_a_gradient_computed_in_the_forward_pass_is_that_of_the_backward_pass(mesh: MeshConfig) -> None:
    ranks = run_ranks(_gradients, mesh.tp * mesh.pp * mesh.cp, mesh)
    assert len([rank for rank in ranks if rank[0][0]]) == mesh.tp * mesh.cp  # those of the last stage
    for (called, sums, gradients), (called_twice, sums_twice, gradients_twice) in ranks:
        assert (called, called_twice) in ((["linear_logprob_sum"], ["linear_logprob"]), ([], []))
        assert torch.allclose(sums, sums_twice, rtol=1e-5, atol=1e-6)
        assert (gradients - gradients_twice).norm() <= 1e-5 * gradients_twice.norm()


def _not_finite(where: str) -> tuple[str, bool]:
    trainer = MegatronTrainer(hf_config(), build_mesh(MeshConfig(), hf_config()), CONFIG, LossConfig(), 1.0, 1)
    microbatches = microbatches_of(trainer.mesh)
    before = [weight.tensor.clone() for weight in trainer.weight_shards()]
    if where == "loss":
        advantages_R = torch.full_like(microbatches[1].advantages_R, math.nan)
        microbatches[1] = dataclasses.replace(microbatches[1], advantages_R=advantages_R)
    else:
        next(w for w in trainer.weight_shards() if w.name.endswith("3.mlp.linear_fc2.weight")).tensor[0, 0] = math.inf
        before = [weight.tensor.clone() for weight in trainer.weight_shards()]
    try:
        trainer.update([microbatches], [8.0], [trainer.logprobs(microbatches)])
    except NonFiniteError as error:
        unchanged = all(torch.equal(weight.tensor, x) for weight, x in zip(trainer.weight_shards(), before, strict=True))
        return str(error), unchanged
    return "", False


@pytest.mark.distributed
def test_a_loss_that_is_no_number_names_rank_and_microbatch_and_changes_nothing() -> None:
    ((message, unchanged),) = run_ranks(_not_finite, 1, "loss")
    assert message.startswith("rank 0: the loss of microbatch 1 of update 0 is nan (rows [2, 3]")
    assert unchanged
    ((message, unchanged),) = run_ranks(_not_finite, 1, "weight")
    assert "microbatch 0 of update 0" in message
    assert unchanged


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=3, decay_style="linear", decay_start=0.5)
    rates = [learning_rate(config, step, 11) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[5] == 1.0
    assert rates[10] == pytest.approx(0.1)
    assert all(np.diff(rates)[5:] < 0)
    cosine = OptimizerConfig(lr=1.0, min_lr=0.0, decay_style="cosine")
    assert learning_rate(cosine, 5, 11) == pytest.approx(0.5)
    assert learning_rate(OptimizerConfig(lr=0.3), 9, 11) == 0.3
