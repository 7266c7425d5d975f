"""One normalisation: the same global batch gives the same gradient and the same statistics however it is split.

Batches and splits are drawn from seeded generators: rows of any length, some with no response, some with no trained token; a split
assigns rows to data-parallel ranks (some get few or none), puts them in any order and cuts them into microbatches, empty ones among them.

Always: losses that are divided by responses and by tokens, the balance loss on three layouts. `make test-all`: every loss and more batches.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tandem.engine.algo.pack import TrainingRow, build_microbatch
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tests.ranks import run_ranks
from tests.trainer.compare import (
    TOLERANCE,
    Errors,
    Part,
    gather_gradients,
    load,
    objectives_of,
    relative_errors,
    rounding_errors,
    squared_errors,
)
from tests.trainer.families import VOCAB
from tests.trainer.reference import CROSS_ENTROPY, LOSSES, TEMPERATURE, Reference, make_reference

SOME_LOSSES = (CROSS_ENTROPY, "mirror descent, stale tokens corrected", "grpo", "ppo_clip")
AUX_LOSS_COEF = 0.5  # large, so that its gradient is a good part of the whole


def random_rows(rng: np.random.Generator) -> list[TrainingRow]:
    """Rows of every kind; the first has trained tokens."""
    rows = []
    for i in range(int(rng.integers(5, 12))):
        num_response = 0 if i and rng.random() < 0.1 else int(rng.geometric(0.12))
        on_policy = np.arange(num_response) >= rng.integers(0, num_response + 1) * (rng.random() < 0.5)
        masks = (np.ones(num_response, dtype=np.bool_), on_policy, rng.random(num_response) < 0.5, np.zeros(num_response, dtype=np.bool_))
        rows.append(
            TrainingRow(
                prompt_ids=rng.integers(0, VOCAB, rng.integers(1, 9)).astype(np.int32),
                response_ids=rng.integers(0, VOCAB, num_response).astype(np.int32),
                behaviour_logprobs=(-6 * rng.random(num_response)).astype(np.float32),
                loss_mask=masks[int(rng.integers(0, 4)) if i else 0],
                on_policy=on_policy,
                advantage=float(rng.normal()),
                row_id=i,
            )
        )
    return rows


def random_split(rng: np.random.Generator, num_rows: int, dp_size: int) -> list[list[list[int]]]:
    """[data-parallel rank][microbatch][row]."""
    weights = rng.random(dp_size) ** 3 + 1e-3  # some ranks get most
    owners = rng.choice(dp_size, num_rows, p=weights / weights.sum())
    split = []
    for rank in range(dp_size):
        own = rng.permutation(np.flatnonzero(owners == rank)).tolist()
        cuts = sorted(rng.integers(0, len(own) + 1, rng.integers(0, 5)).tolist())
        split.append([own[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(own)], strict=True)])
    return split


def expected_statistics(reference: Reference, name: str) -> dict[int, float]:
    """What the trainer reports of a batch, from Hugging Face's log-probs and entropies of each response token."""
    loss = LOSSES[name]

    def joined(values: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([x[row.loss_mask] for row, x in zip(reference.rows, values, strict=True)]).astype(np.float64)

    of_rows = [row.row_id for row in reference.rows]
    logprobs = joined(reference.logprobs[i].numpy() for i in of_rows)
    behaviour = joined(row.behaviour_logprobs for row in reference.rows)
    expected = {
        losses.LOSS: reference.gradients[name].loss,
        losses.TOKENS: len(logprobs),
        losses.ENTROPY: joined(reference.entropies[i].numpy() for i in of_rows).sum(),
    }
    if loss is None:
        return expected
    start = behaviour if loss.reference == "rollout" else joined(reference.reference_logprobs[i].numpy() for i in of_rows)
    on_policy = joined(row.on_policy for row in reference.rows) > 0
    apart = np.abs(logprobs - behaviour)[on_policy]
    ratio = logprobs - start
    return expected | {
        losses.KL: (np.exp(ratio) - 1 - ratio).sum(),
        losses.ON_POLICY: on_policy.sum(),
        losses.MISMATCH: apart.sum(),
        losses.MISMATCH_MAX: apart.max(initial=0.0),
    }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one batch, loss and split, on one rank."""

    batch: int
    loss: str
    statistics: list[float]
    squared_errors: dict[Part, float]


def _train_on_splits(mesh: MeshConfig, config: TrainerConfig, references: Sequence[Reference], of_losses: Sequence[str]) -> list[Outcome]:
    trainer = MegatronTrainer(references[0].hf_config, build_mesh(mesh, references[0].hf_config), config, LossConfig(), TEMPERATURE, None)
    load(trainer, references[0].weights)
    outcomes = []
    for number, reference in enumerate(references):
        for name in of_losses:
            rng = np.random.default_rng([number, list(LOSSES).index(name)])  # the same on all ranks
            split = random_split(rng, len(reference.rows), trainer.mesh.dp_size)[trainer.mesh.dp_rank]
            microbatches = [build_microbatch([reference.rows[row] for row in rows]) for rows in split]
            sums = trainer.accumulate_gradients(microbatches, objectives_of(LOSSES[name], reference.rows, microbatches, reference))
            gather_gradients(trainer)
            errors = squared_errors(trainer, reference.gradients[name].tensors, gradients=True)
            outcomes.append(Outcome(batch=number, loss=name, statistics=sums.tolist(), squared_errors=errors))
    return outcomes


@functools.cache
def references(family: str, aux_loss_coef: float, of_losses: tuple[str, ...], num_batches: int) -> list[Reference]:
    """Batches of one model."""
    chosen = {name: LOSSES[name] for name in of_losses}
    rows = [random_rows(np.random.default_rng(seed)) for seed in range(num_batches)]
    return [make_reference(family, rows=rows, losses=chosen, aux_loss_coef=aux_loss_coef) for rows in rows]


@functools.cache
def rounding(family: str, aux_loss_coef: float, of_losses: tuple[str, ...], num_batches: int) -> list[Errors]:
    """Of each batch: what Hugging Face errs by in fp32."""
    batches = references(family, aux_loss_coef, of_losses, num_batches)
    return [rounding_errors(family, exact, aux_loss_coef=aux_loss_coef) for exact in batches]


def _check(num_ranks: int, mesh: MeshConfig, config: TrainerConfig, family: str, of_losses: tuple[str, ...], num_batches: int = 2) -> None:
    batches = references(family, config.moe_aux_loss_coef, of_losses, num_batches)
    theirs = rounding(family, config.moe_aux_loss_coef, of_losses, num_batches)
    of_ranks = run_ranks(_train_on_splits, num_ranks, mesh, config, batches, of_losses, timeout_s=280)
    for outcomes in zip(*of_ranks, strict=True):
        batch, loss = outcomes[0].batch, outcomes[0].loss
        wanted = batches[batch].gradients[loss].tensors
        errors = relative_errors([outcome.squared_errors for outcome in outcomes], wanted)
        # The token-level loss magnifies the rounding of the log-probs, in Hugging Face as here; by how much is chance.
        allowed = max(TOLERANCE, 3 * max(theirs[batch].gradients[loss].values()))
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= allowed, f"batch {batch}, {loss}: gradient of {worst} is off by {errors[worst]:.1e}"
        for outcome in outcomes:
            for place, expected in expected_statistics(batches[batch], loss).items():
                assert outcome.statistics[place] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), (batch, loss, place)


SP = {"tp": 2, "sequence_parallel": True}
PLAIN = TrainerConfig(distributed_optimizer=False)
DENSE = {
    "1": (1, MeshConfig(), PLAIN),
    "DP3, distributed optimizer, overlapped": (3, MeshConfig(), TrainerConfig(overlap_grad_reduce=True)),
    "CP3": (3, MeshConfig(cp=3), PLAIN),
    "TP2 DP2, SP": (4, MeshConfig(**SP), PLAIN),
    "CP2 DP2, distributed optimizer": (4, MeshConfig(cp=2), TrainerConfig()),
    "PP2 DP2": (4, MeshConfig(pp=2), PLAIN),
    "PP2 VPP2 DP2": (4, MeshConfig(pp=2, vpp=2), PLAIN),
    "TP2 PP2 CP2, SP": (8, MeshConfig(pp=2, cp=2, **SP), PLAIN),
}
BALANCED = TrainerConfig(moe_aux_loss_coef=AUX_LOSS_COEF)
EXPERTS = {
    "qwen3_moe, EP2, overlapped": (2, MeshConfig(ep=2), replace(BALANCED, overlap_grad_reduce=True), "qwen3_moe"),
    "qwen3_moe, TP2 EP2 PP2, SP": (4, MeshConfig(ep=2, pp=2, **SP), BALANCED, "qwen3_moe"),
    "deepseek_v3, EP2 CP2": (2, MeshConfig(ep=2, cp=2), BALANCED, "deepseek_v3"),
}
MORE_EXPERTS = {
    "qwen3_moe, 1": (1, MeshConfig(), BALANCED, "qwen3_moe"),
    "qwen3_moe, EP2 CP2 DP2": (4, MeshConfig(ep=2, cp=2), BALANCED, "qwen3_moe"),
    "qwen3_moe, EP2, allgather": (2, MeshConfig(ep=2), replace(BALANCED, moe_dispatcher="allgather"), "qwen3_moe"),
    "moonlight, EP4, overlapped": (4, MeshConfig(ep=4), replace(BALANCED, overlap_grad_reduce=True), "moonlight"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", DENSE)
def test_a_batch_has_one_gradient_and_one_set_of_statistics_however_it_is_split(layout: str) -> None:
    _check(*DENSE[layout], "qwen3", SOME_LOSSES)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", EXPERTS)
def test_so_has_a_batch_with_a_balance_loss(layout: str) -> None:
    _check(*EXPERTS[layout], (CROSS_ENTROPY, "grpo"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", DENSE)
def test_every_loss_has_one_gradient_however_a_batch_is_split(layout: str) -> None:
    _check(*DENSE[layout], "qwen3", tuple(LOSSES), num_batches=4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", EXPERTS | MORE_EXPERTS)
def test_every_loss_with_a_balance_loss_has_one_gradient_however_a_batch_is_split(layout: str) -> None:
    _check(*(EXPERTS | MORE_EXPERTS)[layout], tuple(LOSSES), num_batches=3)
