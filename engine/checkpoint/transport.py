"""Values between ranks: all that one rank sends to the same others for one bucket is one message."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist

from tandem.engine.checkpoint.plan import ALIGNMENT, Plan, Transfer, volume
from tandem.engine.types import TensorMeta


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes that one rank sends to others."""

    source: int
    writers: tuple[int, ...]
    memory: torch.Tensor  # uint8
    views: tuple[tuple[Transfer, torch.Tensor], ...]  # of the memory, with the regions' shapes


class Transport:
    """Moves the messages of a plan. Every rank makes it at the same point and exchanges bucket after bucket.

    Args:
        group: of all ranks that take part, on a CPU backend.
        device: where the values lie while they move; NCCL brings them from GPU to GPU.
    """

    def __init__(self, group: dist.ProcessGroup, plan: Plan, *, device: torch.device, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        members = dist.get_process_group_ranks(group)
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._rank, self._group = group.rank(), group
        if plan.transfers:  # of its own: a message that is late closes the connections of its group
            made = dist.new_group(members, timeout=self._timeout, backend=backend)
            assert isinstance(made, dist.ProcessGroup)
            self._group = made
        self._groups: dict[tuple[int, tuple[int, ...]], dist.ProcessGroup] = {}
        # every rank makes every group, in one order, also those that it is not in
        for source, writers in sorted({(transfer.source, transfer.writers) for transfer in plan.transfers if len(transfer.writers) > 1}):
            ranks = sorted(members[rank] for rank in (source, *writers))
            made = dist.new_group(ranks, timeout=self._timeout, backend=backend)
            if self._rank in (source, *writers):
                assert isinstance(made, dist.ProcessGroup)
                self._groups[source, writers] = made
        self._members = members
        self.is_broken = False  # a message was lost; those of the next swap could be taken for it

    def exchange(self, messages: Sequence[Message]) -> None:
        """Send and receive the messages of one bucket, in the same order on all ranks. On a GPU only for what the stream does next.

        Raises: RuntimeError if a rank is gone or did not come in time; nothing is exchanged after that.
        """
        if self.is_broken or not messages:
            return
        try:
            requests = []
            direct = [message for message in messages if len(message.writers) == 1]
            if direct:
                requests += dist.batch_isend_irecv([self._operation(message) for message in direct])
            for message in messages:
                if len(message.writers) > 1:
                    group = self._groups[message.source, message.writers]
                    requests.append(dist.broadcast(message.memory, self._members[message.source], group=group, async_op=True))
            for request in requests:
                request.wait(self._timeout)
        except RuntimeError:
            self.is_broken = True
            raise

    def _operation(self, message: Message) -> dist.P2POp:
        if message.source == self._rank:
            return dist.P2POp(dist.isend, message.memory, group=self._group, group_peer=message.writers[0])
        return dist.P2POp(dist.irecv, message.memory, group=self._group, group_peer=message.source)


@dataclass(slots=True)
class Mail:
    """A rank's messages of one bucket."""

    messages: list[Message] = field(default_factory=list)

    def to_send(self, rank: int) -> list[tuple[Transfer, torch.Tensor]]:
        """What the rank has to fill before they are exchanged."""
        return [pair for message in self.messages if message.source == rank for pair in message.views]

    def received(self, rank: int) -> list[tuple[Transfer, torch.Tensor]]:
        return [pair for message in self.messages if message.source != rank for pair in message.views]


def mail_of(rank: int, plan: Plan, tensors: Sequence[TensorMeta], device: torch.device) -> list[Mail]:
    """Of each bucket. They share one memory: a bucket's messages are done with when those of the next are exchanged."""
    dtypes = {meta.name: meta.dtype for meta in tensors}
    mine = [transfer for transfer in plan.transfers if rank == transfer.source or rank in transfer.writers]
    grouped: list[dict[tuple[int, tuple[int, ...]], list[tuple[Transfer, int]]]] = [{} for _ in range(plan.num_steps)]
    size_of: defaultdict[int, int] = defaultdict(int)
    for bucket, transfers in groupby(mine, key=lambda transfer: transfer.bucket):
        by_ranks: defaultdict[tuple[int, tuple[int, ...]], list[Transfer]] = defaultdict(list)
        for transfer in transfers:
            by_ranks[transfer.source, transfer.writers].append(transfer)
        for ranks, together in sorted(by_ranks.items()):
            placed = []
            for transfer in together:
                placed.append((transfer, size_of[bucket]))
                size_of[bucket] += -(-volume(transfer.region) * dtypes[transfer.name].itemsize // ALIGNMENT) * ALIGNMENT
            grouped[bucket][ranks] = placed
    arena = torch.empty(max(size_of.values(), default=0), dtype=torch.uint8, device=device)
    mail = []
    for of_bucket in grouped:
        messages = []
        for (source, writers), placed in of_bucket.items():
            views = tuple((transfer, _view(arena, start, transfer, dtypes[transfer.name])) for transfer, start in placed)
            last, view = views[-1]
            begin, end = placed[0][1], placed[-1][1] + volume(last.region) * view.element_size()
            messages.append(Message(source, writers, arena[begin:end], views))
        mail.append(Mail(messages))
    return mail


def _view(arena: torch.Tensor, start: int, transfer: Transfer, dtype: torch.dtype) -> torch.Tensor:
    num_bytes = volume(transfer.region) * dtype.itemsize
    return arena[start : start + num_bytes].view(dtype).view([last - first for first, last in transfer.region])
