"""What one rank does for each bucket in the memory of its parameters' device: one launch packs it, and another makes its checksums.

On a CPU the same steps run on host memory, which is how they are tested; on a GPU they have not run yet.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem.engine.buckets import NUM_SLOTS, SharedBuckets
from tandem.engine.checkpoint.names import HFView
from tandem.engine.checkpoint.plan import PlacePlan, Plan
from tandem.engine.checkpoint.staging import Copy, part_of
from tandem.engine.checkpoint.transport import Mail, Transport, mail_of
from tandem.engine.checkpoint.writer import by_name, copies_from, in_slot
from tandem.engine.types import TensorMeta
from tandem.kernels.checksum import Checksums
from tandem.kernels.packing import Packer, Part


class Launched:
    """A bucket that the device is writing."""

    def __init__(self, checksums: torch.Tensor, slot: int) -> None:
        self._slot = slot
        self._done: torch.cuda.Event | None = None
        self._checksums = checksums
        if checksums.is_cuda:
            self._checksums = torch.empty(checksums.shape, dtype=checksums.dtype, pin_memory=True).copy_(checksums, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(checksums.device))

    def finish(self, shared: SharedBuckets) -> None:
        """Wait for the device, and show the checksums. After that the bucket may be published."""
        if self._done is not None:
            self._done.synchronize()
        shared.checksums[self._slot, : len(self._checksums)] = self._checksums.numpy().view(np.uint64)


@dataclass(slots=True)
class DeviceWork:
    """This rank's part of one bucket; the whole bucket, where it is one of its own place."""

    mail: Mail
    filler: Packer  # of what this rank sends
    outbox: torch.Tensor
    slot: int
    packer: Packer | None = None
    checksums: Checksums | None = None

    def exchange(self, transport: Transport) -> None:
        """Pack what others lack, send it, and receive; on a GPU, launch it."""
        failed: Exception | None = None
        try:
            self.filler.pack(self.outbox)
        except Exception as error:  # others wait for it
            failed = error
        transport.exchange(self.mail.messages)
        if failed is not None:
            raise failed

    def launch(self, shared: SharedBuckets) -> Launched:
        """Write the bucket."""
        assert self.packer is not None, "only the rank of a place writes"
        assert self.checksums is not None
        slot = shared.slots[self.slot]
        self.packer.pack(slot)
        return Launched(self.checksums(slot), self.slot)


def make_device_work(
    rank: int,
    plan: Plan,
    place: PlacePlan | None,
    tensors: Sequence[TensorMeta],
    views: Sequence[HFView],
    shared: SharedBuckets | None,
    scales: Mapping[str, torch.Tensor],
    device: torch.device,
) -> list[DeviceWork]:
    """Turn the plan into launches that read live tensors and messages.

    Raises: ValueError for a parameter whose dtype no kernel casts to the engines'.
    """
    metas = {meta.name: meta for meta in tensors}
    held = by_name(views)
    works = []
    for bucket, mail in enumerate(mail_of(rank, plan, tensors, device)):
        outbox, filled = _outbox(mail, rank, device), []
        for transfer, memory in mail.to_send(rank):
            filled += copies_from(held[transfer.name], transfer.region, memory, scales)
        works.append(DeviceWork(mail, Packer([_part(copy, outbox) for copy in filled]), outbox, bucket % NUM_SLOTS))
    if place is None or shared is None:
        return works
    copies: defaultdict[int, list[Copy]] = defaultdict(list)
    received = [{(transfer.name, transfer.region): memory for transfer, memory in work.mail.received(rank)} for work in works]
    for piece in place.pieces:
        entry = place.buckets[piece.bucket][piece.entry]
        destination = in_slot(shared.slots[piece.bucket % NUM_SLOTS], entry, piece.region, metas[entry.name])
        if piece.source == rank:
            copies[piece.bucket] += copies_from(held[entry.name], piece.region, destination, scales)
        else:
            copies[piece.bucket].append(Copy(destination, received[piece.bucket][entry.name, piece.region]))
    for bucket, entries in enumerate(place.buckets):
        work = works[bucket]
        work.packer = Packer([_part(copy, shared.slots[work.slot]) for copy in copies[bucket]])
        work.checksums = Checksums([(entry.bucket_start, entry.num_bytes) for entry in entries], device)
    return works


def _outbox(mail: Mail, rank: int, device: torch.device) -> torch.Tensor:
    """The memory of all messages that the rank sends: from the first one on to the end of the last."""
    sent = [message.memory for message in mail.messages if message.source == rank]
    if not sent:
        return torch.empty(0, dtype=torch.uint8, device=device)
    first, last = sent[0].storage_offset(), sent[-1].storage_offset() + len(sent[-1])
    return sent[0].as_strided((last - first,), (1,), first)


def _part(copy: Copy, memory: torch.Tensor) -> Part:
    """A copy to a view of `memory`, as a part of it."""
    start = copy.destination.data_ptr() - memory.data_ptr()
    return part_of(copy, start, tuple(copy.destination.stride()))
