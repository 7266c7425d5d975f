"""The trainer on one rank of a layout against the reference, and the ranks' findings put together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.algo.pack import Microbatch, TrainingRow, build_microbatch
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.config import LossConfig
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import Mesh, build_mesh
from tandem.engine.trainer.model import named_weights
from tandem.engine.types import WeightShard
from tests.trainer.layouts import Layout
from tests.trainer.reference import (
    ADAM,
    LENGTHS,
    LOSSES,
    NUM_ROWS_OF_STEPS,
    STEPPED,
    TEMPERATURE,
    Reference,
    make_reference,
    normaliser_of,
    training_rows,
)

# Of fp32 against fp64. Hugging Face's own fp32 comes hardly nearer: docs/layouts.md.
TOLERANCE = 1e-5
# How many times Hugging Face's own rounding is allowed where that alone takes up a good part of the tolerance.
OF_THEIRS = 2

Part = tuple[str, tuple[tuple[int, int], ...]]  # name and region of a Hugging Face tensor


@dataclass(kw_only=True)
class Findings:
    """What one rank saw: absolute error of log-probs, relative errors of numbers, squared errors of the parts of tensors it holds."""

    logprobs: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0  # of the first step: the second's magnifies the differences between the weights that the first left
    gradients: dict[str, dict[Part, float]] = field(default_factory=dict)
    stepped: dict[Part, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Over all ranks. Of tensors: ‖found - wanted‖ / ‖wanted‖ by Hugging Face name."""

    logprobs: float
    losses: Mapping[str, float]
    grad_norm: float
    gradients: Mapping[str, Mapping[str, float]]
    stepped: Mapping[str, float]

    @property
    def loss(self) -> float:
        return max(self.losses.values())

    @property
    def gradient(self) -> float:
        """The largest of any tensor and loss."""
        return max(max(of_loss.values()) for of_loss in self.gradients.values())

    @property
    def weight(self) -> float:
        return max(self.stepped.values())

    def too_large(self, theirs: "Errors | None" = None) -> list[str]:
        """What exceeds the tolerance in fp32; `theirs` are the errors of Hugging Face in fp32."""
        numbers = {"log-probs": self.logprobs, "loss": self.loss, "gradient norm": self.grad_norm, **self.stepped}
        found = [name for name, error in numbers.items() if error > TOLERANCE]
        for loss, by_name in self.gradients.items():
            for name, error in by_name.items():
                if error > max(TOLERANCE, OF_THEIRS * theirs.gradients[loss][name] if theirs is not None else 0.0):
                    found.append(f"gradient of {name} ({loss})")
        return found

    def worst(self) -> str:
        """The largest gradient and weight errors with their tensors, for a message."""
        loss, name = max(((loss, name) for loss, by in self.gradients.items() for name in by), key=lambda x: self.gradients[x[0]][x[1]])
        weight = max(self.stepped, key=lambda name: self.stepped[name])
        return (
            f"log-probs {self.logprobs:.1e}, losses {self.loss:.1e}, gradient norm {self.grad_norm:.1e}, "
            f"gradient {self.gradient:.1e} ({name}, {loss}), weight {self.weight:.1e} ({weight})"
        )


def relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(abs(wanted), 1e-12)


def local_parameters(trainer: MegatronTrainer, *, gradients: bool) -> Iterator[WeightShard]:
    """All weights of this rank, or the gradients of all that have one; a tied output layer's copy is among them."""
    mesh = trainer.mesh
    for chunk in trainer._chunks:
        for name, parameter in named_weights(chunk, mesh):
            is_expert = "local_experts" in name
            yield WeightShard(
                name=name,
                tensor=parameter.main_grad if gradients else parameter.data,  # pyright: ignore[reportAttributeAccessIssue]
                tp_rank=mesh.etp_rank if is_expert else mesh.tp_rank,
                tp_size=mesh.etp_size if is_expert else mesh.tp_size,
            )
    if not gradients:
        yield from (shard for shard in trainer.weight_shards() if shard.name.endswith("expert_bias"))


def squared_errors(trainer: MegatronTrainer, wanted: Mapping[str, torch.Tensor], *, gradients: bool) -> dict[Part, float]:
    """Of each part of a Hugging Face tensor that this rank holds."""
    names, errors = NameMap(trainer.hf_config), {}
    for parameter in local_parameters(trainer, gradients=gradients):
        for view in names.views(parameter):
            found = torch.empty(view.region_shape, dtype=parameter.tensor.dtype)
            view.copy_to(found)
            error = (found.double() - _part(wanted[view.name], view.region)).square().sum().item()
            part = (view.name, view.region)
            errors[part] = max(error, errors.get(part, 0.0))
    return errors


def _part(whole: torch.Tensor, region: tuple[tuple[int, int], ...]) -> torch.Tensor:
    return whole[tuple(slice(start, stop) for start, stop in region)]


def relative_errors(of_ranks: Sequence[Mapping[Part, float]], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Put the ranks' parts together: of a part that several ranks hold, the worst. Asserts that every element was compared."""
    parts: dict[Part, float] = {}
    for of_rank in of_ranks:
        for part, error in of_rank.items():
            parts[part] = max(error, parts.get(part, 0.0))
    totals, num_compared = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0)
    for (name, region), error in parts.items():
        totals[name] += error
        num_compared[name] += torch.Size(stop - start for start, stop in region).numel()
    assert num_compared == {name: tensor.numel() for name, tensor in wanted.items()}
    norms = {name: tensor.double().norm().item() for name, tensor in wanted.items()}
    return {name: totals[name] ** 0.5 / norms[name] if norms[name] else totals[name] ** 0.5 for name in wanted}


@torch.no_grad()
def load(trainer: MegatronTrainer, weights: Mapping[str, torch.Tensor]) -> None:
    """Fill the trainer with whole Hugging Face tensors."""
    names = NameMap(trainer.hf_config)
    for shard in trainer.weight_shards():
        for view in names.views(shard):
            view.copy_from(_part(weights[view.name], view.region).to(shard.tensor.dtype).contiguous())
    trainer.weights_changed()


def gather_gradients(trainer: MegatronTrainer) -> None:
    """The distributed optimizer leaves a rank the sum of its own part of the gradients only: fetch the others'."""
    if not trainer.config.distributed_optimizer:
        return
    for chunk in trainer._ddp:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks: Any = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                own = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def aligned(microbatch: Microbatch, rows: Mapping[int, TrainingRow], values: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """[T]: `values` of the response tokens of each row, by row id, at the positions that predict them; 0 elsewhere."""
    parts = [torch.zeros(0)]
    for row_id in microbatch.row_ids_R.tolist():
        if row_id in rows:
            parts += [torch.zeros(len(rows[row_id].prompt_ids) - 1), values[row_id]]
        else:
            parts.append(torch.zeros(1))  # a filler
    return torch.cat(parts)


def objectives_of(
    loss: LossConfig | None, rows: Sequence[TrainingRow], microbatches: Sequence[Microbatch], reference: Reference
) -> list[losses.Objective]:
    """The objective of each microbatch when `rows` are the whole batch."""
    normaliser = normaliser_of(loss, rows)
    if loss is None:
        return [losses.Supervised(normaliser=normaliser)] * len(microbatches)
    by_id = {row.row_id: row for row in rows}
    return [
        losses.Policy(
            config=loss,
            normaliser=normaliser,
            reference_T=None if loss.reference == "rollout" else aligned(microbatch, by_id, reference.reference_logprobs),
        )
        for microbatch in microbatches
    ]


def deal(rows: Sequence[TrainingRow], dp_rank: int, dp_size: int, per_microbatch: int) -> list[Microbatch]:
    """A data-parallel rank's rows, unevenly: the last ranks have fewer or none."""
    size = -(-len(rows) // dp_size)
    own = rows[dp_rank * size : (dp_rank + 1) * size]
    return [build_microbatch(own[i : i + per_microbatch]) for i in range(0, len(own), per_microbatch)]


def microbatches_of(mesh: Mesh, per_microbatch: int = 2) -> list[Microbatch]:
    """This rank's part of the rows that all tests of the trainer share."""
    return deal(training_rows(LENGTHS), mesh.dp_rank, mesh.dp_size, per_microbatch)


def logprob_error(trainer: MegatronTrainer, microbatches: Sequence[Microbatch], reference: Reference) -> float:
    """Largest absolute error of the trained tokens' log-probs, in nats; 0 is wanted elsewhere."""
    by_id, largest = {row.row_id: row for row in reference.rows}, 0.0
    for microbatch, found in zip(microbatches, trainer.logprobs(microbatches), strict=True):
        wanted = torch.where(microbatch.loss_mask_T, aligned(microbatch, by_id, reference.logprobs), 0.0)
        largest = max(largest, (found - wanted).abs().max().item())
    return largest


def compare(layout: Layout, reference: Reference, of_losses: Sequence[str], dtype: Literal["float32", "bfloat16"] = "float32") -> Findings:
    """Runs on every rank of the layout: log-probs, the gradients of `of_losses`, and two steps."""
    mesh = build_mesh(layout.mesh, reference.hf_config)
    step_loss = LOSSES[STEPPED]
    assert step_loss is not None
    trainer = MegatronTrainer(reference.hf_config, mesh, layout.trainer_config(ADAM, dtype), step_loss, TEMPERATURE, None)
    load(trainer, reference.weights)
    microbatches = deal(reference.rows, mesh.dp_rank, mesh.dp_size, 2)
    findings = Findings(logprobs=logprob_error(trainer, microbatches, reference))
    for name in of_losses:
        wanted = reference.gradients[name]
        sums = trainer.accumulate_gradients(microbatches, objectives_of(LOSSES[name], reference.rows, microbatches, reference))
        gather_gradients(trainer)
        findings.losses[name] = relative(sums[losses.LOSS].item(), wanted.loss)
        findings.gradients[name] = squared_errors(trainer, wanted.tensors, gradients=True)
    by_id = {row.row_id: row for row in reference.rows}
    for step, num_rows in enumerate(NUM_ROWS_OF_STEPS):
        rows = reference.rows[:num_rows]
        own = deal(rows, mesh.dp_rank, mesh.dp_size, 2)
        references = [aligned(microbatch, by_id, reference.reference_logprobs) for microbatch in own]
        stats = trainer.update([own], [normaliser_of(step_loss, rows)], [references])
        if step == 0:
            findings.grad_norm = relative(stats["grad_norm"], reference.grad_norm)
    findings.stepped = squared_errors(trainer, reference.stepped, gradients=False)
    return findings


def findings_of(other: Reference, reference: Reference) -> Findings:
    """The same for a Hugging Face model in place of the trainer."""

    def errors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[Part, float]:
        return {
            (name, tuple((0, extent) for extent in tensor.shape)): (found[name].double() - tensor).square().sum().item()
            for name, tensor in wanted.items()
        }

    return Findings(
        logprobs=max((other.logprobs[row_id] - wanted).abs().amax().item() for row_id, wanted in reference.logprobs.items() if len(wanted)),
        losses={name: relative(other.gradients[name].loss, wanted.loss) for name, wanted in reference.gradients.items()},
        grad_norm=relative(other.grad_norm, reference.grad_norm),
        gradients={name: errors(other.gradients[name].tensors, wanted.tensors) for name, wanted in reference.gradients.items()},
        stepped=errors(other.stepped, reference.stepped),
    )


def rounding_errors(family: str, exact: Reference, num_layers: int = 4, aux_loss_coef: float = 0.0) -> Errors:
    """Those of the same Hugging Face model in fp32, on the rows and losses of `exact`, which was made of the same arguments."""
    of_losses, logprobs = {name: LOSSES[name] for name in exact.gradients}, exact.reference_logprobs
    rounded = make_reference(
        family, num_layers, exact.rows, of_losses, dtype=torch.float32, reference_logprobs=logprobs, aux_loss_coef=aux_loss_coef
    )
    return combine([findings_of(rounded, exact)], exact)


def combine(of_ranks: Sequence[Findings], reference: Reference) -> Errors:
    """The findings of all ranks as errors of whole tensors."""
    return Errors(
        logprobs=max(findings.logprobs for findings in of_ranks),
        losses={name: max(findings.losses[name] for findings in of_ranks) for name in of_ranks[0].losses},
        grad_norm=max(findings.grad_norm for findings in of_ranks),
        gradients={
            name: relative_errors([findings.gradients[name] for findings in of_ranks], reference.gradients[name].tensors)
            for name in of_ranks[0].gradients
        },
        stepped=relative_errors([findings.stepped for findings in of_ranks], reference.stepped),
    )
