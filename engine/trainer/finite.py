"""Losses and gradients that are no numbers: which microbatch of which rank, and which tensor, told alike on every rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tandem.engine.algo.pack import Microbatch
from tandem.engine.trainer.mesh import Mesh
from tandem.engine.trainer.model import PolicyModel, named_weights


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite, on some rank; raised on all. The weights are those of before the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Findings:
    """What one rank saw. Tensors are placed in the order of the model: (virtual stage, stage, position)."""

    rank: int
    microbatch: int | None
    loss: str
    weight: tuple[tuple[int, int, int], str] | None
    gradient: tuple[tuple[int, int, int], str] | None


class FiniteCheck:
    """Of one computation of gradients. A rank notes what it sees and goes on, since others wait for it; `finish` tells everyone.

    Args:
        what: the step, as messages name it.
    """

    def __init__(self, mesh: Mesh, what: str) -> None:
        self._mesh, self._what = mesh, what
        self._microbatch: int | None = None
        self._loss = ""

    def check_loss(self, index: int, microbatch: Microbatch, loss: torch.Tensor, logprobs_T: torch.Tensor) -> None:
        """Note the first microbatch of this rank whose loss is no number."""
        value = loss.item()
        if math.isfinite(value) or self._microbatch is not None:
            return
        bad_T = microbatch.loss_mask_T & ~torch.isfinite(logprobs_T.detach())
        where = f", first log-prob that is no number: token {int(bad_T.int().argmax())}" if bad_T.any() else ""
        self._microbatch, self._loss = index, f"{value} (rows {microbatch.row_ids_R[:8].tolist()}…{where})"

    def finish(self, chunks: Sequence[PolicyModel], ddp: Sequence[Any]) -> None:
        """Look at the reduced gradients. A collective over all ranks.

        Raises: NonFiniteError, with the same message on all ranks, if anything is not finite on any.
        """
        gradient = _first_not_finite(chunks, self._mesh, of_gradients=True) if _any_not_finite(ddp) else None
        is_bad = torch.tensor([gradient is not None or self._microbatch is not None], dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(is_bad, dist.ReduceOp.MAX)
        if not is_bad.item():
            return
        weight = _first_not_finite(chunks, self._mesh, of_gradients=False)
        mine = _Findings(rank=self._mesh.rank, microbatch=self._microbatch, loss=self._loss, weight=weight, gradient=gradient)
        findings: list[Any] = [None] * self._mesh.size
        dist.all_gather_object(findings, mine)
        raise NonFiniteError(_message(findings, self._what))


def _message(findings: Sequence[_Findings], what: str) -> str:
    losses = sorted((found for found in findings if found.microbatch is not None), key=lambda found: (found.microbatch, found.rank))
    gradients = sorted((found.gradient, found.rank) for found in findings if found.gradient is not None)
    weights = sorted((found.weight, found.rank) for found in findings if found.weight is not None)
    parts = []
    if losses:
        parts.append(f"rank {losses[0].rank}: the loss of microbatch {losses[0].microbatch} of {what} is {losses[0].loss}")
    if gradients:
        (_, name), rank = gradients[0]
        text = f"the first gradient that is not finite is that of {name}"
        parts.append(text if losses else f"rank {rank}: {text}, in {what}, though every loss is a number")
    if weights:
        (_, name), rank = weights[0]
        parts.append(f"the weight {name} itself is not finite on rank {rank}; no skipping helps, go back to an earlier checkpoint")
    return "; ".join([*parts, "the weights are unchanged"])


def _any_not_finite(ddp: Sequence[Any]) -> bool:
    """Whether the sum of any gradient buffer is no number: one pass, and no false negatives."""
    groups = (group for chunk in ddp for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups)
    return any(not math.isfinite(bucket.grad_data.sum().item()) for group in groups for bucket in group.buckets)


def _first_not_finite(chunks: Sequence[PolicyModel], mesh: Mesh, *, of_gradients: bool) -> tuple[tuple[int, int, int], str] | None:
    for i, chunk in enumerate(chunks):
        for position, (name, parameter) in enumerate(named_weights(chunk, mesh)):
            values: Any = parameter.main_grad if of_gradients else parameter  # pyright: ignore[reportAttributeAccessIssue]
            if not torch.isfinite(values).all():
                return (i, mesh.pp_rank, position), name
    return None
