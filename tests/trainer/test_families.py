"""Families against Hugging Face in one process and on a small layout; balance of experts, and replay of their choice.

tests/trainer/test_layouts.py has Qwen3 and Qwen3-MoE on every layout, and the large layouts of all.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.algo.pack import TrainingRow, build_microbatch
from tandem.engine.architecture import Architecture, Experts
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.router import routers_of
from tests.ranks import run_ranks
from tests.trainer.compare import Part, combine, compare, deal, gather_gradients, load, relative_errors, squared_errors
from tests.trainer.families import disk_gradients, disk_weights, hf_model
from tests.trainer.layouts import Layout
from tests.trainer.reference import CROSS_ENTROPY, LENGTHS, LOSSES, make_reference, training_rows

# fp32 sums in another order: about 1e-7 an operation, some 40 of them deep.
TOLERANCE = 1e-5
SP = {"sequence_parallel": True}
ONE = Layout(name="1", num_ranks=1)
SMALL = {
    "llama": Layout(name="CP2, selective recomputation", num_ranks=2, mesh=MeshConfig(cp=2), recompute="selective"),
    "llama, tied": Layout(name="PP2", num_ranks=2, mesh=MeshConfig(pp=2)),
    "qwen2": Layout(name="TP4, SP (fewer key heads)", num_ranks=4, mesh=MeshConfig(tp=4, **SP)),
    "deepseek_v3": Layout(name="TP2 EP2, SP, full recomputation", num_ranks=2, mesh=MeshConfig(tp=2, ep=2, **SP), recompute="full"),
    "moonlight": Layout(name="PP2 VPP2", num_ranks=2, mesh=MeshConfig(pp=2, vpp=2)),
}
reference_of = functools.cache(functools.partial(make_reference, losses={CROSS_ENTROPY: LOSSES[CROSS_ENTROPY]}))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "layout"),
    [pytest.param(*case, id=f"{case[0]}, {case[1].name}") for case in [*((family, ONE) for family in SMALL), *SMALL.items()]],
)
def test_a_family_trains_like_hugging_face(family: str, layout: Layout) -> None:
    reference = reference_of(family)
    errors = combine(run_ranks(compare, layout.num_ranks, layout, reference, [CROSS_ENTROPY]), reference)
    assert max(errors.loss, errors.gradient, errors.weight, errors.grad_norm, errors.logprobs) <= TOLERANCE, errors.worst()


def test_latent_attention_without_sequence_parallelism_sums_the_gradient_of_the_shared_key() -> None:
    dense = {"first_k_dense_replace": 4}  # experts would need sequence parallelism
    model = hf_model("deepseek_v3", **dense)
    wanted = routed(model, training_rows(LENGTHS))
    layout = Layout(name="TP2", num_ranks=2, mesh=MeshConfig(tp=2))
    check_gradients(run_ranks(gradients_of, 2, layout, wanted), wanted)


# Experts: one Hugging Face model whose routers are watched and, with a record, overruled.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """What a model made of the cross entropy of all rows, and of the balance loss added to it."""

    hf_config: Mapping[str, Any]
    rows: Sequence[TrainingRow]
    weights: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]
    num_sent_XE: torch.Tensor  # tokens by sparse layer and expert


def scores_of(logits: torch.Tensor, experts: Experts) -> torch.Tensor:
    return logits.float().sigmoid() if experts.scoring == "sigmoid" else logits.float().softmax(-1)


def overrule(experts: Experts, record_TK: torch.Tensor) -> Callable[..., Any]:
    """A hook that replaces a router's choice where the record has one; weights as the family computes them."""

    def hook(_: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, _weights, chosen = output
        chosen = torch.where(record_TK >= 0, record_TK, chosen)
        weights = scores_of(logits, experts).gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * experts.routed_scaling_factor
        return logits, weights, chosen

    return hook


def balance_loss(logits: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Of one sequence and layer: for softmax Hugging Face's, of which the paper takes the K-th part; for sigmoid the paper's."""
    if experts.scoring == "softmax":
        found = load_balancing_loss_func((logits,), experts.num_experts, experts.num_experts_per_tok)
        assert isinstance(found, torch.Tensor)
        return found / experts.num_experts_per_tok
    scores = scores_of(logits, experts)
    best = scores.topk(experts.num_experts_per_tok).indices
    frequency = torch.nn.functional.one_hot(best, experts.num_experts).sum(1).float().mean(0)
    frequency = frequency * experts.num_experts / experts.num_experts_per_tok
    return (frequency * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()


def routed(model: Any, rows: Sequence[TrainingRow], *, replay: bool = False, balance: float = 0.0) -> Routed:
    hf_config = model.config.to_dict()
    experts = Architecture.from_hf(hf_config).experts
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    num_sent = torch.zeros(len(gates), experts.num_experts if experts is not None else 0, dtype=torch.int64)
    loss = torch.zeros(())
    num_tokens = sum(int(row.loss_mask.sum()) for row in rows)
    for row in rows:
        record = build_microbatch([row]).routed_experts_SXK
        seen: list[tuple[torch.Tensor, ...]] = []
        hooks = []
        for x, gate in enumerate(gates):
            if replay and record is not None and experts is not None:
                hooks.append(gate.register_forward_hook(overrule(experts, record[:, x].long())))
            hooks.append(gate.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output)))
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))
        logprobs = model(ids[None, :-1]).logits[0].float().log_softmax(-1).gather(1, ids[1:, None])[len(row.prompt_ids) - 1 :, 0]
        loss = loss - logprobs[torch.from_numpy(row.loss_mask)].sum() / num_tokens
        for hook in hooks:
            hook.remove()
        for x, (logits, _, chosen) in enumerate(seen):
            assert experts is not None
            num_sent[x] += torch.bincount(chosen.flatten(), minlength=experts.num_experts)
            if balance:
                loss = loss + balance * balance_loss(logits, experts) / len(rows)
    model.zero_grad()
    loss.backward()
    return Routed(hf_config=hf_config, rows=rows, weights=disk_weights(model), gradients=disk_gradients(model), num_sent_XE=num_sent)


def trainer_of(layout: Layout, wanted: Routed, changes: Mapping[str, Any]) -> MegatronTrainer:
    mesh = build_mesh(layout.mesh, wanted.hf_config)
    config = dataclasses.replace(layout.trainer_config(TrainerConfig().optimizer), **changes)
    trainer = MegatronTrainer(wanted.hf_config, mesh, config, LossConfig(), 1.0, None)
    load(trainer, wanted.weights)
    return trainer


def gradients_of(layout: Layout, wanted: Routed, changes: Mapping[str, Any] | None = None, per_microbatch: int = 2) -> dict[Part, float]:
    """On every rank: squared errors of the gradients."""
    trainer = trainer_of(layout, wanted, changes or {})
    microbatches = deal(wanted.rows, trainer.mesh.dp_rank, trainer.mesh.dp_size, per_microbatch)
    objective = losses.Supervised(normaliser=float(sum(row.loss_mask.sum() for row in wanted.rows)))
    trainer.accumulate_gradients(microbatches, [objective] * len(microbatches))
    gather_gradients(trainer)
    return squared_errors(trainer, wanted.gradients, gradients=True)


def check_gradients(of_ranks: Sequence[Mapping[Part, float]], wanted: Routed) -> None:
    errors = relative_errors(of_ranks, wanted.gradients)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.1e}"


def recorded_rows(experts: Experts, num_sparse_layers: int) -> list[TrainingRow]:
    """Rows whose tokens were sent to random experts in the rollout; one row has no record, one only for its second half."""
    rng = np.random.default_rng(7)
    rows = []
    for i, row in enumerate(training_rows(LENGTHS)):
        shape = (len(row.response_ids), num_sparse_layers, experts.num_experts)
        record = rng.permuted(np.broadcast_to(np.arange(experts.num_experts), shape), axis=-1)[..., : experts.num_experts_per_tok]
        record = np.ascontiguousarray(record, dtype=np.int16)
        if i == 4:
            record[: len(record) // 2] = -1
        rows.append(dataclasses.replace(row, routed_experts=record if i else None))
    return rows


EXPERT_LAYOUTS = (
    ("qwen3_moe", ONE),
    ("deepseek_v3", Layout(name="full recomputation", num_ranks=1, recompute="full")),
    ("deepseek_v3", Layout(name="TP2 EP2, SP", num_ranks=2, mesh=MeshConfig(tp=2, ep=2, **SP))),
    ("moonlight", Layout(name="CP2 PP2 VPP2, full recomputation", num_ranks=4, mesh=MeshConfig(cp=2, pp=2, vpp=2), recompute="full")),
    ("qwen3_moe", Layout(name="EP2 DP2, allgather", num_ranks=2, mesh=MeshConfig(ep=2), dispatcher="allgather")),
)
expert_layouts = pytest.mark.parametrize(
    ("family", "layout"), [pytest.param(*case, id=f"{case[0]}, {case[1].name}") for case in EXPERT_LAYOUTS]
)


@pytest.mark.distributed
@expert_layouts
def test_replaying_another_choice_equals_hugging_face_with_that_choice(family: str, layout: Layout) -> None:
    model = hf_model(family)
    architecture = Architecture.from_hf(model.config.to_dict())
    assert architecture.experts is not None
    wanted = routed(model, recorded_rows(architecture.experts, sum(architecture.sparse_layers)), replay=True)
    check_gradients(run_ranks(gradients_of, layout.num_ranks, layout, wanted, {"replay_routing": True}), wanted)


def replay_own_choice(layout: Layout, wanted: Routed) -> list[bool]:
    """Record what the routers choose for each row, and whether log-probs and gradients with that record are bitwise the same."""
    trainer = trainer_of(layout, wanted, {"replay_routing": True})
    maps: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda _, inputs, output: maps.append(output[1])) for router in routers_of(trainer._chunks)]
    rows = []
    for row in wanted.rows:
        maps.clear()
        trainer.logprobs([build_microbatch([row])])
        chosen = torch.stack([map_SE[len(row.prompt_ids) - 1 :].nonzero()[:, 1].view(len(row.response_ids), -1) for map_SE in maps], 1)
        backwards = chosen.flip(-1).to(torch.int16).numpy()  # an engine's record has an order of its own
        rows.append(dataclasses.replace(row, routed_experts=backwards))
    for hook in hooks:
        hook.remove()
    results = []
    for of_rows in (wanted.rows, rows):
        microbatches = deal(of_rows, 0, 1, 3)
        logprobs = trainer.logprobs(microbatches)
        trainer.accumulate_gradients(microbatches, [losses.Supervised(normaliser=50.0)] * len(microbatches))
        results.append(
            logprobs + [bucket.grad_data.clone() for chunk in trainer._ddp for group in chunk.bucket_groups for bucket in group.buckets]
        )
    assert all(microbatch.routed_experts_SXK is not None for microbatch in deal(rows, 0, 1, 3))
    return [torch.equal(x, y) for x, y in zip(*results, strict=True)]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_replaying_the_own_choice_changes_nothing(family: str) -> None:
    wanted = routed(hf_model(family), training_rows(LENGTHS))
    (same,) = run_ranks(replay_own_choice, 1, ONE, wanted)
    assert all(same)


@pytest.mark.distributed
@expert_layouts
def test_the_balance_loss_is_one_mean_over_all_sequences(family: str, layout: Layout) -> None:
    wanted = routed(hf_model(family), training_rows(LENGTHS), balance=0.7)
    without = routed(hf_model(family), training_rows(LENGTHS))
    gate = next(name for name in wanted.gradients if name.endswith("mlp.gate.weight"))
    assert (wanted.gradients[gate] - without.gradients[gate]).norm() > 0.05 * without.gradients[gate].norm()
    check_gradients(run_ranks(gradients_of, layout.num_ranks, layout, wanted, {"moe_aux_loss_coef": 0.7}, 3), wanted)


def biases_after_a_step(layout: Layout, wanted: Routed, rate: float) -> dict[str, torch.Tensor]:
    trainer = trainer_of(layout, wanted, {"moe_bias_update_rate": rate})
    microbatches = deal(wanted.rows, trainer.mesh.dp_rank, trainer.mesh.dp_size, 3)
    trainer.logprobs(microbatches)  # counts nothing
    trainer.sft_step(microbatches, num_target_tokens=50)
    return {shard.name: shard.tensor for shard in trainer.weight_shards() if shard.name.endswith("expert_bias")}


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "layout"), [pytest.param(*case, id=f"{case[0]}, {case[1].name}") for case in EXPERT_LAYOUTS[1:4]])
def test_after_a_step_each_expert_bias_moves_towards_balance(family: str, layout: Layout) -> None:
    rate = 0.01
    wanted = routed(hf_model(family), training_rows(LENGTHS))
    found = {
        name: bias for of_rank in run_ranks(biases_after_a_step, layout.num_ranks, layout, wanted, rate) for name, bias in of_rank.items()
    }
    before = [bias for name, bias in wanted.weights.items() if name.endswith("e_score_correction_bias")]
    assert len(found) == len(before) == 3
    for (_, after), bias, num_sent in zip(sorted(found.items()), before, wanted.num_sent_XE.double(), strict=True):
        assert len(num_sent.unique()) > 2
        assert torch.equal(after, bias + rate * (num_sent.mean() - num_sent).sign().float())


def bias_types(wanted: Routed) -> list[torch.dtype]:
    trainer = trainer_of(ONE, wanted, {"dtype": "bfloat16"})
    shards = {shard.name: shard.tensor for shard in trainer.weight_shards()}
    for name, tensor in wanted.weights.items():
        if name.endswith("e_score_correction_bias"):
            layer = name.split(".")[2]
            assert torch.equal(shards[f"decoder.layers.{layer}.mlp.router.expert_bias"], tensor)
    return [tensor.dtype for name, tensor in shards.items() if name.endswith(("expert_bias", "linear_proj.weight"))]


def test_expert_biases_stay_fp32_in_a_bf16_model() -> None:
    wanted = routed(hf_model("deepseek_v3"), training_rows(LENGTHS)[:1])
    (types,) = run_ranks(bias_types, 1, wanted)
    assert sorted(map(str, types)) == ["torch.bfloat16"] * 4 + ["torch.float32"] * 3


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"replay_routing": True}, "trainer.replay_routing is True; but llama has no experts; set it to False"),
        ("llama", {"moe_aux_loss_coef": 0.1}, "trainer.moe_aux_loss_coef is 0.1; but llama has no experts"),
        ("qwen3_moe", {"moe_bias_update_rate": 0.1}, "moe_bias_update_rate is 0.1; but qwen3_moe has no expert biases; set it to 0"),
    ],
)
def test_an_option_that_the_model_would_ignore_is_an_error(family: str, changes: dict[str, Any], message: str) -> None:
    wanted = routed(hf_model(family), training_rows(LENGTHS)[:1])
    with pytest.raises(RuntimeError, match=message):
        run_ranks(trainer_of, 1, ONE, wanted, changes)


def test_a_record_of_another_model_is_an_error() -> None:
    model = hf_model("qwen3_moe")
    experts = Architecture.from_hf(model.config.to_dict()).experts
    assert experts is not None
    wanted = routed(model, recorded_rows(dataclasses.replace(experts, num_experts_per_tok=3), 4))
    with pytest.raises(
        RuntimeError, match=r"recorded \(4, 3\) experts .* but the model has \(4, 2\) of 4; set trainer.replay_routing=False"
    ):
        run_ranks(gradients_of, 1, ONE, wanted, {"replay_routing": True})
