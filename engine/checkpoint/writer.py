"""What one rank does for each bucket in host memory: the copies from its live parameters, prepared once from the plan."""

import ctypes
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from tandem.engine.buckets import NUM_SLOTS, Region, SharedBuckets
from tandem.engine.checkpoint.names import HFView
from tandem.engine.checkpoint.plan import Entry, PlacePlan, Plan
from tandem.engine.checkpoint.staging import Copy, Staged, stage
from tandem.engine.checkpoint.transport import Mail, Transport, mail_of
from tandem.engine.types import TensorMeta
from tandem.kernels.backend import runs_triton


class ByteCopy(NamedTuple):
    """Of neighbours in host memory, by their addresses: there are thousands, and a tensor or memoryview of each takes a KiB.

    Addresses, also because a storage that was handed to NumPy can never shrink again, as a trainer's do that sleeps.
    """

    destination: int
    source: int
    num_bytes: int

    def run(self) -> None:
        ctypes.memmove(*self)  # half the time of torch's


@dataclass(frozen=True, slots=True)
class EntryWork:
    """This rank's copies into one entry; `computes_checksum` if it is the entry's only writer."""

    name: str
    index: int
    slot: int
    start: int
    num_bytes: int
    copies: tuple[Copy | ByteCopy, ...]  # tensors where values are converted, strided rows gathered, or a device has no kernels
    computes_checksum: bool

    def write(self, shared: SharedBuckets) -> None:
        for copy in self.copies:
            copy.run()
        if self.computes_checksum:
            self.checksum(shared)

    def checksum(self, shared: SharedBuckets) -> None:
        shared.checksums[self.slot, self.index] = shared.checksum(self.slot, self.start, self.num_bytes)


@dataclass(slots=True)
class BucketWork:
    """This rank's part of one bucket."""

    entries: list[EntryWork] = field(default_factory=list)
    late_checksums: list[EntryWork] = field(default_factory=list)  # of entries that several ranks write
    shared_checksums: bool = False  # whether any rank of the place has late checksums
    mail: Mail = field(default_factory=Mail)
    fills: list[Copy | ByteCopy] = field(default_factory=list)  # what this rank sends
    staged: Staged | None = None  # what comes from a device
    views: Sequence[HFView] = ()  # the parameters, which stay as long as their addresses are known

    def exchange(self, transport: Transport) -> None:
        """Bring over what lies on a device; send and receive. A failed copy is raised after that: others wait for it."""
        failed: Exception | None = None
        try:
            if self.staged is not None:
                self.staged.fill()
            for copy in self.fills:
                copy.run()
        except Exception as error:
            failed = error
        transport.exchange(self.mail.messages)
        if failed is not None:
            raise failed


def make_bucket_work(
    rank: int,
    plan: Plan,
    place: PlacePlan | None,
    tensors: Sequence[TensorMeta],
    views: Sequence[HFView],
    shared: SharedBuckets | None,
    scales: Mapping[str, torch.Tensor],
) -> list[BucketWork]:
    """Turn the plan into copies between live tensors, messages and the slots of the rank's place.

    Args:
        scales: of the matrices that are quantised as they are copied, by name.
    """
    metas = {meta.name: meta for meta in tensors}
    held = by_name(views)
    works = [BucketWork(mail=mail, views=views) for mail in mail_of(rank, plan, tensors, torch.device("cpu"))]
    live: list[list[Copy]] = [[] for _ in works]  # those that read this rank's parameters
    fills: list[list[Copy]] = [[] for _ in works]
    for work, reads, filled in zip(works, live, fills, strict=True):
        for transfer, memory in work.mail.to_send(rank):
            filled += copies_from(held[transfer.name], transfer.region, memory, scales)
        reads += filled
    copies: defaultdict[tuple[int, int], list[Copy | ByteCopy]] = defaultdict(list)
    writers: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for piece in place.pieces if place is not None else ():
        writers[piece.bucket, piece.entry].add(piece.writer)
    if place is not None and shared is not None:
        received = [{(transfer.name, transfer.region): memory for transfer, memory in work.mail.received(rank)} for work in works]
        for piece in place.pieces:
            if piece.writer != rank:
                continue
            entry = place.buckets[piece.bucket][piece.entry]
            destination = in_slot(shared.slots[piece.bucket % NUM_SLOTS], entry, piece.region, metas[entry.name])
            if piece.source != rank:
                copies[piece.bucket, piece.entry].append(Copy(destination, received[piece.bucket][entry.name, piece.region]))
                continue
            for copy in copies_from(held[entry.name], piece.region, destination, scales):
                if runs_triton(copy.source):
                    live[piece.bucket].append(copy)
                    copies[piece.bucket, piece.entry].append(copy)
                else:
                    copies[piece.bucket, piece.entry].append(_as_bytes(copy))
    all_staged, hosts = stage(live)
    for work, staged, filled in zip(works, all_staged, fills, strict=True):
        work.staged, work.fills = staged, [_as_bytes(_from_host(copy, hosts)) for copy in filled]
    if place is None:
        return works
    for bucket, checksum_ranks in enumerate(place.checksum_ranks):
        work = works[bucket]
        for index, (entry, checksum_rank) in enumerate(zip(place.buckets[bucket], checksum_ranks, strict=True)):
            alone = len(writers[bucket, index]) == 1
            work.shared_checksums |= not alone
            if rank not in writers[bucket, index]:
                continue
            mine = checksum_rank == rank
            entry_work = EntryWork(
                name=entry.name,
                index=index,
                slot=bucket % NUM_SLOTS,
                start=entry.bucket_start,
                num_bytes=entry.num_bytes,
                copies=tuple(_as_bytes(_from_host(copy, hosts)) for copy in copies[bucket, index]),
                computes_checksum=mine and alone,
            )
            work.entries.append(entry_work)
            if mine and not alone:
                work.late_checksums.append(entry_work)
    return works


def by_name(views: Sequence[HFView]) -> defaultdict[str, list[HFView]]:
    held: defaultdict[str, list[HFView]] = defaultdict(list)
    for view in views:
        held[view.name].append(view)
    return held


def _from_host(copy: Copy | ByteCopy, hosts: Mapping[int, torch.Tensor]) -> Copy | ByteCopy:
    """The copy; what is staged is read from where it is on the host."""
    if isinstance(copy, ByteCopy) or id(copy.source) not in hosts:
        return copy
    return Copy(copy.destination, hosts[id(copy.source)])


def _as_bytes(copy: Copy | ByteCopy) -> Copy | ByteCopy:
    """The copy by addresses, if it is one of bytes in host memory."""
    if isinstance(copy, ByteCopy):
        return copy
    both = copy.destination, copy.source
    if copy.destination.dtype != copy.source.dtype or not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in both):
        return copy
    return ByteCopy(copy.destination.data_ptr(), copy.source.data_ptr(), copy.source.nbytes)


def in_slot(slot: torch.Tensor, entry: Entry, region: Region, meta: TensorMeta) -> torch.Tensor:
    """A part of an entry in its slot, with the part's shape."""
    flat = slot[entry.bucket_start : entry.bucket_start + entry.num_bytes]
    whole = flat.view(meta.dtype).view([stop - start for start, stop in entry.region])
    return whole[tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(region, entry.region, strict=True))]


def copies_from(views: Sequence[HFView], region: Region, destination: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> list[Copy]:
    """Copies of a region from the view that holds it to `destination`, which has the region's shape."""
    (first, last), *inner = region
    for view in views:
        if all(start <= a and b <= stop for (start, stop), (a, b) in zip(view.region, region, strict=True)):
            (start, _), *rest = view.region
            columns = [slice(a - begin, b - begin) for (a, b), (begin, _) in zip(inner, rest, strict=True)]
            parts = [(a, b, part[(..., *columns)]) for a, b, part in view.rows(first - start, last - start)]
            targets = [destination[a - first + start : b - first + start].view(part.shape) for a, b, part in parts]
            if view.name not in scales:
                return [Copy(target, part) for target, (_, _, part) in zip(targets, parts, strict=True)]
            of, column = scales[view.name], inner[0][0]
            return [Copy(target, part, of, start + a, column) for target, (a, _, part) in zip(targets, parts, strict=True)]
    raise ValueError(f"no parameter holds {region}; their layout has changed since the plan was made")
