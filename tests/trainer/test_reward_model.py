"""The reward model against one Hugging Face …ForSequenceClassification in fp64 and one process, on layouts of every axis."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tandem.engine.algo.pack import build_microbatch
from tandem.engine.algo.preference import PairRows, deal_pairs, pair_rows, scored_row
from tandem.engine.architecture import Architecture
from tandem.engine.config import LossConfig, MeshConfig
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.reward_model import HEAD, draw_head, preference_step, reward_model_config, scores
from tests.ranks import run_ranks
from tests.trainer.compare import OF_THEIRS, TOLERANCE, gather_gradients, load, relative, relative_errors, squared_errors
from tests.trainer.families import VOCAB, disk_gradients, disk_weights, hf_model
from tests.trainer.layouts import Layout
from tests.trainer.reference import ADAM, _Float64

# (prompt, chosen, rejected) tokens; no number of ranks divides them, and a response may be a single token.
LENGTHS = [(3, 8, 5), (5, 1, 13), (1, 4, 2), (6, 9, 9), (2, 2, 1)]
MARGINS = [0.0, 0.7, 0.0, -0.3, 0.1]
NUM_PAIRS_OF_STEPS = (len(LENGTHS), 1)  # the second step leaves some data-parallel ranks without a pair


def token_ids(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, VOCAB, length).astype(np.int32)


@functools.cache
def pairs() -> tuple[PairRows, ...]:
    rng = np.random.default_rng(0)
    made = []
    for number, ((prompt, chosen, rejected), margin) in enumerate(zip(LENGTHS, MARGINS, strict=True)):
        ids = (token_ids(rng, prompt), token_ids(rng, chosen), token_ids(rng, rejected))
        made.append(pair_rows(*ids, margin=margin, number=number))
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What Hugging Face finds."""

    hf_config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    scores: Mapping[int, float]  # by row id
    loss: float
    gradients: Mapping[str, torch.Tensor]
    stepped: Mapping[str, torch.Tensor]  # weights after two steps
    rounding: Mapping[str, float]  # relative errors of the gradients of the same model in fp32


def classifier(family: str) -> torch.nn.Module:
    """The family's tiny network under a random head."""
    model: Any = hf_model(family)
    config = type(model.config).from_dict(reward_model_config(model.config.to_dict(), pad_token_id=None))
    reward_model: Any = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager", experts_implementation="eager")
    reward_model.model.load_state_dict(model.model.state_dict())
    generator = torch.Generator().manual_seed(9)
    reward_model.score.weight.data = 0.3 * torch.randn(reward_model.score.weight.shape, generator=generator)
    return reward_model.float().eval()


def hf_score(model: Any, row: Any) -> torch.Tensor:
    """The sequence on its own; the row's last response token stands only for the place of the score."""
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids[:-1]]).astype(np.int64))
    return model(ids[None]).logits[0, 0]


def hf_loss(model: Any, of_pairs: Sequence[PairRows]) -> torch.Tensor:
    lead = [hf_score(model, pair.chosen) - hf_score(model, pair.rejected) - pair.margin for pair in of_pairs]
    return torch.stack([torch.log1p(torch.exp(-x)) for x in lead]).mean()


@functools.cache
def wanted_of(family: str) -> Wanted:
    rounded = classifier(family)
    hf_loss(rounded, pairs()).backward()
    in_fp32 = disk_gradients(rounded)
    model: Any = classifier(family).double()
    weights = {name: tensor.float() for name, tensor in disk_weights(model).items()}
    with _Float64():
        rows = [row for pair in pairs() for row in (pair.chosen, pair.rejected)]
        found = {row.row_id: hf_score(model, row).item() for row in rows}
        loss = hf_loss(model, pairs())
        loss.backward()
        gradients = disk_gradients(model)
        decays = [x for x in model.parameters() if x.dim() > 1]
        plain = [x for x in model.parameters() if x.dim() == 1]
        groups = [{"params": decays, "weight_decay": ADAM.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        adam = torch.optim.AdamW(groups, lr=ADAM.lr, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps)
        for num_pairs in NUM_PAIRS_OF_STEPS:
            model.zero_grad()
            hf_loss(model, pairs()[:num_pairs]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_grad)
            adam.step()
    return Wanted(
        hf_config=model.config.to_dict(),
        weights=weights,
        scores=found,
        loss=loss.item(),
        gradients=gradients,
        stepped=disk_weights(model),
        rounding={name: ((in_fp32[name] - x).norm() / x.norm()).item() for name, x in gradients.items() if x.norm()},
    )


def compare(layout: Layout, wanted: Wanted) -> dict[str, Any]:
    """Runs on every rank: errors of scores, loss, gradients and stepped weights."""
    mesh = build_mesh(layout.mesh, wanted.hf_config)
    trainer = MegatronTrainer(wanted.hf_config, mesh, layout.trainer_config(ADAM), LossConfig(), 1.0, None)
    load(trainer, wanted.weights)

    def deal(num_pairs: int) -> tuple[list[Any], list[torch.Tensor]]:
        dealt = deal_pairs(pairs()[:num_pairs], dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, microbatch_tokens=24, crossover_tokens=99)
        return [microbatch for microbatch, _ in dealt], [torch.tensor([pairs()[i].margin for i in held]) for _, held in dealt]

    microbatches, margins = deal(len(LENGTHS))
    found = scores(trainer, microbatches)
    expected = [[wanted.scores[i] for i in sorted(m.row_ids_R.tolist()) if i >= 0] for m in microbatches]
    score_error = max((a - torch.tensor(b)).abs().amax().item() for a, b in zip(found, expected, strict=True) if len(b))
    objectives = [losses.Preference(normaliser=float(len(LENGTHS)), margins_P=margins_P) for margins_P in margins]
    sums = trainer.accumulate_gradients(microbatches, objectives)
    gather_gradients(trainer)
    gradients = squared_errors(trainer, wanted.gradients, gradients=True)
    stats = [preference_step(trainer, *deal(num_pairs), num_pairs) for num_pairs in NUM_PAIRS_OF_STEPS]
    stepped = squared_errors(trainer, wanted.stepped, gradients=False)
    loss = relative(sums[losses.LOSS].item(), wanted.loss)
    return {"scores": score_error, "loss": loss, "gradients": gradients, "stepped": stepped, "stats": stats[0]}


SP = {"sequence_parallel": True}
LAYOUTS = (
    Layout(name="1", num_ranks=1),
    Layout(name="TP2", num_ranks=2, mesh=MeshConfig(tp=2)),
    Layout(name="TP2, SP", num_ranks=2, mesh=MeshConfig(tp=2, **SP)),
    Layout(name="PP2", num_ranks=2, mesh=MeshConfig(pp=2)),
    Layout(name="CP2", num_ranks=2, mesh=MeshConfig(cp=2)),
    Layout(name="DP2, distributed optimizer", num_ranks=2, distributed_optimizer=True),
    Layout(name="TP2 PP2 CP2, SP", num_ranks=8, mesh=MeshConfig(tp=2, pp=2, cp=2, **SP)),
)
CASES = [("qwen3", layout) for layout in LAYOUTS] + [
    ("qwen3, tied", LAYOUTS[3]),
    ("qwen3_moe", Layout(name="EP2", num_ranks=2, mesh=MeshConfig(ep=2))),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "layout"), [pytest.param(*case, id=f"{case[0]}, {case[1].name}") for case in CASES])
def test_a_reward_model_trains_like_hugging_face(family: str, layout: Layout) -> None:
    wanted = wanted_of(family)
    found = run_ranks(compare, layout.num_ranks, layout, wanted)
    assert max(of_rank["scores"] for of_rank in found) <= TOLERANCE
    assert max(of_rank["loss"] for of_rank in found) <= TOLERANCE
    gradients = relative_errors([of_rank["gradients"] for of_rank in found], wanted.gradients)
    bounds = {name: max(TOLERANCE, OF_THEIRS * wanted.rounding.get(name, 0.0)) for name in gradients}
    assert not {name: (error, bounds[name]) for name, error in gradients.items() if error > bounds[name]}
    stepped = relative_errors([of_rank["stepped"] for of_rank in found], wanted.stepped)
    assert max(stepped.values()) <= TOLERANCE, max(stepped, key=lambda name: stepped[name])
    leads = [wanted.scores[2 * i] - wanted.scores[2 * i + 1] for i in range(len(LENGTHS))]
    for of_rank in found:
        assert of_rank["stats"]["accuracy"] == pytest.approx(sum(lead > 0 for lead in leads) / len(leads))
        assert of_rank["stats"]["lead"] == pytest.approx(sum(leads) / len(leads), abs=1e-5)
        assert of_rank["stats"]["pairs"] == len(leads)


def test_a_pair_has_one_copy_of_its_prompt_and_one_trained_position_for_each_response() -> None:
    ((microbatch, held),) = deal_pairs(pairs()[:2], dp_rank=0, dp_size=1, microbatch_tokens=100, crossover_tokens=99)
    assert held == [0, 1]
    assert microbatch.row_ids_R.tolist() == [0, 1, 2, 3]
    assert microbatch.num_tokens == (3 + 8 + 5) + (5 + 1 + 13)
    assert microbatch.loss_mask_T.sum() == 4
    assert microbatch.loss_mask_T[microbatch.cu_seqlens[1:].long() - 1].all()


def test_scores_are_told_by_row_id_and_a_filler_has_none() -> None:
    rows = [scored_row(np.array([1], dtype=np.int32), np.arange(length, dtype=np.int32), row_id) for row_id, length in ((5, 2), (3, 1))]
    microbatch = build_microbatch(rows)
    assert losses.scores_of(microbatch, torch.arange(5.0)).tolist() == [4.0, 2.0]
    assert losses.scores_of(build_microbatch([]), torch.zeros(1)).tolist() == []


def test_an_empty_response_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="row 7 has an empty response"):
        scored_row(np.array([1], dtype=np.int32), np.array([], dtype=np.int32), 7)


def test_a_reward_model_has_one_label() -> None:
    hf_config: Any = hf_model("qwen3").config.to_dict()
    config = reward_model_config(hf_config, pad_token_id=0)
    assert Architecture.from_hf(config).has_score_head
    assert not Architecture.from_hf(hf_config).has_score_head
    with pytest.raises(ValueError, match="num_labels is 2"):
        Architecture.from_hf({**config, "num_labels": 2})


def head_drawn(layout: Layout, hf_config: Mapping[str, Any], seed: int = 5) -> list[float]:
    trainer = MegatronTrainer(hf_config, build_mesh(layout.mesh, hf_config), layout.trainer_config(ADAM), LossConfig(), 1.0, 4)
    for shard in trainer.weight_shards():
        shard.tensor.fill_(0.5)
    before = {shard.name: shard.tensor.clone() for shard in trainer.weight_shards()}
    draw_head(trainer, seed)
    changed = [shard for shard in trainer.weight_shards() if not torch.equal(shard.tensor, before[shard.name])]
    assert [shard.name for shard in changed] in ([], [HEAD])
    return changed[0].tensor.flatten().tolist() if changed else []


@pytest.mark.distributed
def test_a_head_is_drawn_alike_on_every_layout_and_nothing_else_changes() -> None:
    hf_config = reward_model_config(hf_model("qwen3").config.to_dict(), pad_token_id=None)  # pyright: ignore[reportAttributeAccessIssue]
    (alone,) = run_ranks(head_drawn, 1, LAYOUTS[0], hf_config)
    first, last = run_ranks(head_drawn, 2, LAYOUTS[3], hf_config)
    assert len(alone) == 32
    assert (first, last) == ([], alone)
    (other,) = run_ranks(head_drawn, 1, LAYOUTS[0], hf_config, 6)
    assert not set(other) & set(alone)
