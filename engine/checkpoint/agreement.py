"""What all ranks of a swap tell each other: a process group with a deadline, and failures that name rank, bucket and tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tandem.engine.types import WeightTransferError


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the swap failed on a rank."""

    rank: int
    where: str  # "bucket 3 of 8, tensor x", or the step
    reason: str  # "" on a rank that only saw another one fail

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.where}: {self.reason}"


class Agreement:
    """A group of the same ranks as `control_group`, of its own: its deadline is the swap's, and its messages meet no others.

    Args:
        who_is_lost: raises RuntimeError naming a rank of this node that is gone; asked when a collective fails.
    """

    def __init__(self, control_group: dist.ProcessGroup, *, timeout_s: float, who_is_lost: Callable[[], None]) -> None:
        group = dist.new_group(dist.get_process_group_ranks(control_group), timeout=timedelta(seconds=timeout_s), backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.group, self.rank, self.num_ranks = group, group.rank(), group.size()
        self._who_is_lost = who_is_lost

    def reduce_max(self, step: str, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        tensor = torch.tensor(values, dtype=torch.int64)
        self.largest(step, tensor)
        return tensor.tolist()

    def largest(self, step: str, numbers: torch.Tensor) -> None:
        """Replace every one of these integers, as many on all ranks, by the largest of all ranks."""
        try:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        except RuntimeError as error:
            raise self._lost(step, error) from error

    def gather(self, step: str, value: Any) -> list[Any]:
        """What every rank gives, in the order of the ranks."""
        values: list[Any] = [None] * self.num_ranks
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise self._lost(step, error) from error
        return values

    def _lost(self, step: str, error: RuntimeError) -> WeightTransferError:
        """The error of a collective that a rank did not come to."""
        who = f"a rank was not there to {step}"
        try:
            self._who_is_lost()
        except RuntimeError as lost:
            who = f"{lost}; it was not there to {step}"
        return WeightTransferError(f"weight swap rolled back on rank {self.rank}: {who} ({error})")


def raise_all(failures: Sequence[Failure]) -> None:
    """One error of all failures, if there are any."""
    if failures:
        raise WeightTransferError("weight swap rolled back on all ranks: " + "; ".join(map(str, failures)))
