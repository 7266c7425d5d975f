"""Rows that share one copy of their prompt, against the same rows apart and against Hugging Face: log-probs, loss and every gradient."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tandem.engine.algo.pack import Microbatch, TrainingRow, build_microbatch
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.router import routers_of
from tests.ranks import run_ranks
from tests.trainer.compare import TOLERANCE, Part, gather_gradients, load, logprob_error, objectives_of, relative_errors, squared_errors
from tests.trainer.families import VOCAB
from tests.trainer.reference import CROSS_ENTROPY, LOSSES, TEMPERATURE, Reference, make_reference, training_rows

AUX_LOSS_COEF = 0.7
# (prompt's number, prompt tokens, response tokens): a prompt of one token, a row on its own, responses of one token, an empty one, and
# one token after which several responses begin alike or end at once.
GROUPS = [(0, 5, 8), (1, 1, 3), (0, 5, 1), (2, 9, 6), (1, 1, 7), (0, 5, 0), (3, 3, 1), (0, 5, 13), (3, 3, 1), (1, 1, 1), (0, 5, 2)]


def rows_of_groups(groups: Sequence[tuple[int, int, int]], seed: int = 0) -> list[TrainingRow]:
    rows = training_rows([(prompt, response) for _, prompt, response in groups], seed)
    rng = np.random.default_rng(seed)
    prompts = {number: rng.integers(0, VOCAB, prompt).astype(np.int32) for number, prompt, _ in groups}
    return [dataclasses.replace(row, prompt_ids=prompts[number]) for row, (number, _, _) in zip(rows, groups, strict=True)]


def trainer_of(reference: Reference, mesh: MeshConfig, config: TrainerConfig) -> MegatronTrainer:
    built = build_mesh(mesh, reference.hf_config)
    trainer = MegatronTrainer(reference.hf_config, built, config, LossConfig(), TEMPERATURE, None)
    load(trainer, reference.weights)
    return trainer


def packed(rows: Sequence[TrainingRow], trainer: MegatronTrainer, *, share: bool) -> list[Microbatch]:
    """This rank's part in two microbatches, each of which has several prompts."""
    own = rows[trainer.mesh.dp_rank :: trainer.mesh.dp_size]
    return [build_microbatch(own[half::2], share_prompts=share) for half in (0, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    num_tokens: int
    logprobs: float
    loss: float
    squared_errors: dict[Part, float]


def train_shared(reference: Reference, mesh: MeshConfig, config: TrainerConfig, loss: str) -> Outcome:
    trainer = trainer_of(reference, mesh, config)
    microbatches = packed(reference.rows, trainer, share=True)
    logprobs = logprob_error(trainer, microbatches, reference)
    sums = trainer.accumulate_gradients(microbatches, objectives_of(LOSSES[loss], reference.rows, microbatches, reference))
    gather_gradients(trainer)
    return Outcome(
        num_tokens=sum(microbatch.num_tokens for microbatch in microbatches),
        logprobs=logprobs,
        loss=sums[losses.LOSS].item(),
        squared_errors=squared_errors(trainer, reference.gradients[loss].tensors, gradients=True),
    )


PLAIN = TrainerConfig(distributed_optimizer=False)
BALANCED = dataclasses.replace(PLAIN, moe_aux_loss_coef=AUX_LOSS_COEF)
SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
CASES: dict[str, tuple[str, int, MeshConfig, TrainerConfig, str]] = {
    "qwen3, 1": ("qwen3", 1, MeshConfig(), PLAIN, CROSS_ENTROPY),
    "qwen3, TP2, SP": ("qwen3", 2, MeshConfig(**SP), PLAIN, "mirror descent"),
    "qwen3, PP2": ("qwen3", 2, MeshConfig(pp=2), PLAIN, "mirror descent, stale tokens corrected"),
    "qwen3, CP3": ("qwen3", 3, MeshConfig(cp=3), PLAIN, "grpo"),
    "qwen3, CP2 by Ulysses": ("qwen3", 2, MeshConfig(cp=2), dataclasses.replace(PLAIN, cp_attention="ulysses"), "token level"),
    "deepseek_v3, EP2 CP2, balanced": ("deepseek_v3", 2, MeshConfig(ep=2, cp=2), BALANCED, CROSS_ENTROPY),
    "qwen3_moe, TP2 EP2, SP, balanced": ("qwen3_moe", 2, MeshConfig(ep=2, **SP), BALANCED, CROSS_ENTROPY),
    "qwen3, PP2 VPP2 CP2": ("qwen3", 4, MeshConfig(pp=2, vpp=2, cp=2), PLAIN, "gspo"),
    "qwen3, DP2, full recomputation": ("qwen3", 2, MeshConfig(), TrainerConfig(recompute="full"), "ppo_clip"),
    "moonlight, CP4, selective recomputation": (
        "moonlight",
        4,
        MeshConfig(cp=4),
        dataclasses.replace(BALANCED, recompute="selective"),
        "rest",
    ),
    "moonlight, TP2 EP2 CP2 PP2, SP": ("moonlight", 8, MeshConfig(ep=2, cp=2, pp=2, **SP), BALANCED, CROSS_ENTROPY),
    "qwen3_moe, EP2, allgather": ("qwen3_moe", 2, MeshConfig(ep=2), dataclasses.replace(BALANCED, moe_dispatcher="allgather"), "rest"),
}


def check(family: str, num_ranks: int, mesh: MeshConfig, config: TrainerConfig, loss: str) -> None:
    rows = rows_of_groups(GROUPS)
    reference = make_reference(family, rows=rows, losses={loss: LOSSES[loss]}, aux_loss_coef=config.moe_aux_loss_coef)
    of_ranks = run_ranks(train_shared, num_ranks, reference, mesh, config, loss)
    assert of_ranks[0].num_tokens < sum(row.num_tokens for row in rows)
    wanted = reference.gradients[loss]
    errors = relative_errors([outcome.squared_errors for outcome in of_ranks], wanted.tensors)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, f"gradient of {worst} is off by {errors[worst]:.1e}"
    for outcome in of_ranks:
        assert outcome.logprobs <= TOLERANCE
        assert outcome.loss == pytest.approx(wanted.loss, rel=TOLERANCE)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_shared_prompts_train_like_hugging_face(name: str) -> None:
    check(*CASES[name])


def gradients_of(trainer: MegatronTrainer, microbatches: Sequence[Microbatch]) -> list[torch.Tensor]:
    trainer.accumulate_gradients(microbatches, [losses.Supervised(normaliser=10.0)] * len(microbatches))
    groups = [group for chunk in trainer._ddp for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    return [bucket.grad_data.clone() for group in groups for bucket in group.buckets]


def by_row(microbatches: Sequence[Microbatch], values: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    found = {}
    for microbatch, values_T in zip(microbatches, values, strict=True):
        parts = values_T.split(microbatch.cu_seqlens.diff().tolist())
        found |= dict(zip(microbatch.row_ids_R.tolist(), parts, strict=True))
    return found


def apart_and_shared(
    reference: Reference, batches: Sequence[Sequence[TrainingRow]], mesh: MeshConfig, config: TrainerConfig
) -> list[float]:
    """Of each batch, the largest difference of log-probs, and that of gradients in parts of their norm; negative if nothing was shared."""
    trainer = trainer_of(reference, mesh, config)
    errors = []
    for rows in batches:
        apart, shared = (packed(rows, trainer, share=share) for share in (False, True))
        assert any(microbatch.shared is not None for microbatch in shared)
        wanted, found = (by_row(microbatches, trainer.logprobs(microbatches)) for microbatches in (apart, shared))
        assert wanted.keys() == found.keys()
        errors.append(max((wanted[row_id] - found[row_id]).abs().max().item() for row_id in wanted))
        gradients, again = gradients_of(trainer, shared), gradients_of(trainer, shared)
        assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True)), "the same bits in every run"
        of_apart = gradients_of(trainer, apart)
        errors.append(max(((x - y).norm() / y.norm()).item() for x, y in zip(gradients, of_apart, strict=True)))
    return errors


def random_groups(seed: int) -> list[tuple[int, int, int]]:
    rng = np.random.default_rng(seed)
    groups = [(0, 4, 3), (0, 4, 2), (0, 4, 0), (0, 4, 5)]  # each half has two rows with this prompt
    for number in range(1, rng.integers(2, 5)):
        prompt = int(rng.integers(1, 12))
        groups += [(number, prompt, int(rng.integers(0, 9))) for _ in range(rng.integers(1, 5))]
    first = groups[:4]
    rest = [groups[i] for i in rng.permutation(np.arange(4, len(groups)))]
    return [first[0], first[2], first[1], first[3], *rest]


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "mesh"), [("qwen3", MeshConfig()), ("moonlight", MeshConfig(cp=2))], ids=["qwen3", "moonlight, CP2"])
def test_random_groups_come_to_the_same_shared_and_apart(family: str, mesh: MeshConfig) -> None:
    reference = make_reference(family, rows=rows_of_groups(GROUPS), losses={})
    batches = [rows_of_groups(random_groups(seed), seed) for seed in range(6)]
    for errors in run_ranks(apart_and_shared, mesh.cp, reference, batches, mesh, PLAIN):
        assert max(errors) <= TOLERANCE


def with_records(rows: Sequence[TrainingRow], shape: tuple[int, int], num_experts: int) -> list[TrainingRow]:
    """Random choices; rows with one prompt agree on its last token, but for one, and a row without a record."""
    rng = np.random.default_rng(0)
    made, of_prompt = [], {}
    for i, row in enumerate(rows):
        record = np.stack([np.argsort(rng.random((len(row.response_ids), num_experts)))[:, : shape[1]] for _ in range(shape[0])], axis=1)
        if len(record) and i != 4:
            record[0] = of_prompt.setdefault(row.prompt_ids.tobytes(), record[0].copy())
        made.append(dataclasses.replace(row, routed_experts=record.astype(np.int16) if i != 8 else None))
    return made


def test_replayed_experts_come_to_the_same_shared_and_apart() -> None:
    reference = make_reference("qwen3_moe", rows=rows_of_groups(GROUPS), losses={})
    rows = with_records(reference.rows, (4, 2), 4)
    config = dataclasses.replace(PLAIN, replay_routing=True)
    (errors,) = run_ranks(apart_and_shared, 1, reference, [rows], MeshConfig(), config)
    assert max(errors) <= TOLERANCE


def tokens_sent(reference: Reference) -> tuple[list[int], int]:
    trainer = trainer_of(reference, MeshConfig(), dataclasses.replace(PLAIN, moe_bias_update_rate=0.01))
    microbatches = packed(reference.rows, trainer, share=True)
    gradients_of(trainer, microbatches)
    return [int(router.num_sent_E.sum()) for router in routers_of(trainer.chunks)], sum(m.num_tokens for m in microbatches)


def test_expert_biases_count_a_shared_token_once() -> None:
    reference = make_reference("deepseek_v3", rows=rows_of_groups(GROUPS), losses={})
    ((sent, num_tokens),) = run_ranks(tokens_sent, 1, reference)
    assert sent == [3 * num_tokens] * 3  # experts per token; sparse layers
    assert num_tokens < sum(row.num_tokens for row in reference.rows)
