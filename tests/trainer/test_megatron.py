"""The trainer against Hugging Face in fp32: log-probs, loss, every gradient and one optimizer step, on every mesh axis."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.algo.pack import Microbatch, build_microbatch
from tandem.engine.config import LossConfig, MeshConfig, OptimizerConfig, TrainerConfig
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import Mesh, build_mesh
from tandem.engine.trainer.model import named_weights
from tests.ranks import run_ranks
from tests.trainer.qwen3 import hf_logprobs, hf_model, megatron_tensors, shard, training_rows

# Lengths that no number of ranks divides; one response is a single token.
LENGTHS = [(3, 8), (5, 13), (2, 1), (7, 4), (4, 17), (6, 9), (1, 2), (3, 11)]
TAU, ADAM = 0.3, OptimizerConfig(lr=1e-2, eps=1e-3, clip_grad=0.5)


@dataclass(frozen=True)
class Reference:
    hf_config: dict[str, Any]
    weights: dict[str, torch.Tensor]  # Megatron's names, whole
    logprobs: list[torch.Tensor]  # per row
    loss: float
    gradients: dict[str, torch.Tensor]
    grad_norm: float
    stepped: dict[str, torch.Tensor]


def _reference(*, moe: bool, tied: bool = False) -> Reference:
    model = hf_model(moe=moe, tied=tied)
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    rows = training_rows(LENGTHS)
    total, logprobs = torch.zeros(()), []
    for row in rows:
        all_T = hf_logprobs(model, row)
        mask_T = torch.zeros(len(all_T), dtype=torch.bool)
        mask_T[len(row.prompt_ids) - 1 :] = torch.from_numpy(row.loss_mask)
        logprobs.append(torch.where(mask_T, all_T, 0.0).detach())
        sum_logprobs = all_T[mask_T].sum()
        total = total - (row.advantage * sum_logprobs - TAU / 2 * (sum_logprobs - 0.9 * sum_logprobs.detach()) ** 2)
    loss = total / len(rows)
    loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_grad)
    torch.optim.AdamW(model.parameters(), lr=ADAM.lr, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=0.0).step()
    stepped = {name: x.detach().clone() for name, x in model.state_dict().items()}
    if tied:
        before, stepped = ({k: v for k, v in x.items() if k != "lm_head.weight"} for x in (before, stepped))
    return Reference(
        hf_config=model.config.to_dict(),  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        weights=megatron_tensors(before),
        logprobs=logprobs,
        loss=loss.item(),
        gradients=megatron_tensors(gradients),
        grad_norm=norm.item(),
        stepped=megatron_tensors(stepped),
    )


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return {"dense": _reference(moe=False), "tied": _reference(moe=False, tied=True), "moe": _reference(moe=True)}


def load(trainer: MegatronTrainer, whole: dict[str, torch.Tensor]) -> None:
    for weight in trainer.weight_shards():
        weight.tensor.copy_(shard(weight.name, whole[weight.name], weight.tp_rank, weight.tp_size))
    trainer.weights_changed()


def microbatches_of(mesh: Mesh, per_microbatch: int = 2) -> list[Microbatch]:
    """This data-parallel rank's rows, unevenly: the last rank has fewer."""
    rows = training_rows(LENGTHS)
    size = -(-len(rows) // mesh.dp_size)
    own = rows[mesh.dp_rank * size : (mesh.dp_rank + 1) * size]
    return [build_microbatch(own[i : i + per_microbatch]) for i in range(0, len(own), per_microbatch)]


def _relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.float() - y).abs().max() / y.abs().max().clamp_min(1e-9)).item()


def _compare(mesh_config: MeshConfig, config: TrainerConfig, reference: Reference, per_microbatch: int = 2) -> dict[str, float]:
    """Errors of this rank: log-probs (absolute), loss, gradients, their norm and stepped weights (relative)."""
    mesh = build_mesh(mesh_config, reference.hf_config)
    trainer = MegatronTrainer(reference.hf_config, mesh, config, LossConfig(tau=TAU), 1.0, None)
    load(trainer, reference.weights)
    microbatches = microbatches_of(mesh, per_microbatch)
    found = trainer.logprobs(microbatches)
    wanted = [torch.cat([reference.logprobs[i] for i in m.row_ids_R.tolist()]) for m in microbatches]
    errors = {"logprobs": max((_relative(x, y) for x, y in zip(found, wanted, strict=True)), default=0.0)}
    before_T = [0.9 * x for x in found]
    objectives = [losses.Policy(config=LossConfig(tau=TAU), normaliser=float(len(LENGTHS)), reference_T=x) for x in before_T]
    sums = trainer.accumulate_gradients(microbatches, objectives)
    errors["loss"] = abs(sums[losses.LOSS].item() - reference.loss) / abs(reference.loss)
    # The distributed optimizer reduces a gradient to the rank that owns it only; the stepped weights tell about the others.
    if not config.distributed_optimizer or mesh.dp_size * mesh.cp_size == 1:
        errors["gradients"] = 0.0
        for chunk in trainer._chunks:
            for name, parameter in named_weights(chunk, mesh):
                is_expert = "local_experts" in name
                rank, size = (mesh.etp_rank, mesh.etp_size) if is_expert else (mesh.tp_rank, mesh.tp_size)
                tied = name == "output_layer.weight" and reference.hf_config["tie_word_embeddings"]
                whole = reference.gradients["embedding.word_embeddings.weight" if tied else name]
                errors["gradients"] = max(errors["gradients"], _relative(parameter.main_grad, shard(name, whole, rank, size)))  # pyright: ignore[reportAttributeAccessIssue]
    stats = trainer.update([microbatches], [float(len(LENGTHS))], [before_T])
    errors["grad_norm"] = abs(stats["grad_norm"] - reference.grad_norm) / reference.grad_norm
    errors["stepped"] = max(
        (w.tensor.float() - shard(w.name, reference.stepped[w.name], w.tp_rank, w.tp_size)).abs().max().item() / ADAM.lr
        for w in trainer.weight_shards()
    )
    return errors


def _check(errors: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    worst = {name: max(e[name] for e in errors if name in e) for name in {name for e in errors for name in e}}
    # A stepped weight is lr * m / (sqrt(v) + eps): where a gradient is near eps its relative error is that of the smallest gradients.
    allowed = {name: 100 * tolerance if name == "stepped" else tolerance for name in worst}
    assert all(worst[name] <= allowed[name] for name in worst), worst


PLAIN = TrainerConfig(distributed_optimizer=False, optimizer=ADAM)
DISTRIBUTED = TrainerConfig(optimizer=ADAM)
CASES = {
    "one rank": ("dense", 1, MeshConfig(), DISTRIBUTED),
    "one rank, tied": ("tied", 1, MeshConfig(), PLAIN),
    "one rank, experts": ("moe", 1, MeshConfig(), DISTRIBUTED),
    "tp": ("dense", 2, MeshConfig(tp=2), PLAIN),
    "tp, more ranks than key heads": ("dense", 4, MeshConfig(tp=4), PLAIN),
    "sequence parallel": ("tied", 2, MeshConfig(tp=2, sequence_parallel=True), DISTRIBUTED),
    "pp": ("dense", 2, MeshConfig(pp=2), PLAIN),
    "pp, tied": ("tied", 2, MeshConfig(pp=2), PLAIN),
    "vpp": ("dense", 2, MeshConfig(pp=2, vpp=2), PLAIN),
    "cp": ("dense", 2, MeshConfig(cp=2), PLAIN),
    "dp": ("dense", 2, MeshConfig(), PLAIN),
    "dp, overlapped": ("dense", 3, MeshConfig(), TrainerConfig(overlap_grad_reduce=True, optimizer=ADAM)),
    "dp, distributed optimizer": ("tied", 2, MeshConfig(), DISTRIBUTED),
    "ep": ("moe", 2, MeshConfig(ep=2), PLAIN),
    "ep, allgather": ("moe", 2, MeshConfig(ep=2), TrainerConfig(moe_dispatcher="allgather", distributed_optimizer=False, optimizer=ADAM)),
    "ep, tp": ("moe", 2, MeshConfig(ep=2, tp=2, sequence_parallel=True), PLAIN),
    "ep, etp, pp": ("moe", 4, MeshConfig(ep=1, etp=2, tp=2, pp=2, sequence_parallel=True), DISTRIBUTED),
    "tp, pp, dp": ("dense", 8, MeshConfig(tp=2, pp=2, sequence_parallel=True), DISTRIBUTED),
    "tp, cp, sequence parallel": ("dense", 4, MeshConfig(tp=2, cp=2, sequence_parallel=True), PLAIN),
    "cp, pp": ("tied", 4, MeshConfig(cp=2, pp=2), DISTRIBUTED),
    "ep, cp": ("moe", 2, MeshConfig(ep=2, cp=2), PLAIN),
    "full recomputation": ("dense", 1, MeshConfig(), TrainerConfig(recompute="full", optimizer=ADAM)),
    "selective recomputation": ("moe", 2, MeshConfig(tp=2, sequence_parallel=True), TrainerConfig(recompute="selective", optimizer=ADAM)),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_logprobs_gradients_and_a_step_equal_those_of_hugging_face(case: str, references: dict[str, Reference]) -> None:
    model, num_ranks, mesh, config = CASES[case]
    _check(run_ranks(_compare, num_ranks, mesh, config, references[model]))
