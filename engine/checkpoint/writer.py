"""What one rank does for each bucket: the copies from its live parameters, prepared once from the plan."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from tandem.engine.buckets import NUM_SLOTS, SharedBuckets
from tandem.engine.checkpoint.names import HFView
from tandem.engine.checkpoint.plan import Entry, Piece, Plan, Region
from tandem.engine.checkpoint.staging import Copy, Staged, stage
from tandem.engine.types import TensorMeta

ByteCopy = tuple[memoryview, memoryview]  # (destination, source), equally long


@dataclass(frozen=True, slots=True)
class EntryWork:
    """This rank's copies into one entry; `computes_checksum` if it is the entry's only writer."""

    name: str
    index: int
    slot: int
    start: int
    num_bytes: int
    byte_copies: tuple[ByteCopy, ...]
    copies: tuple[Copy, ...]  # that convert, gather strided rows or come from a device without kernels
    computes_checksum: bool

    def write(self, shared: SharedBuckets) -> None:
        for target, origin in self.byte_copies:
            target[:] = origin  # libc's copy: half the time of torch's
        for destination, source in self.copies:
            destination.copy_(source)
        if self.computes_checksum:
            self.checksum(shared)

    def checksum(self, shared: SharedBuckets) -> None:
        shared.checksums[self.slot, self.index] = shared.checksum(self.slot, self.start, self.num_bytes)


@dataclass(slots=True)
class BucketWork:
    """This rank's part of one bucket."""

    entries: list[EntryWork] = field(default_factory=list)
    late_checksums: list[EntryWork] = field(default_factory=list)  # of entries that several ranks write
    shared_checksums: bool = False  # whether any rank of the node has late checksums
    sends: list[tuple[int, torch.Tensor, tuple[Copy, ...]]] = field(default_factory=list)  # (to, staging, copies that fill it)
    receives: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # (from, staging)
    staged: Staged | None = None  # what comes from a device

    def exchange(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        """Bring over what lies on a device; send and receive what crosses nodes. A failed copy is raised after that: others wait for it."""
        failed: Exception | None = None
        try:
            if self.staged is not None:
                self.staged.fill()
            for _, _, copies in self.sends:
                for destination, source in copies:
                    destination.copy_(source)
        except Exception as error:
            failed = error
        if self.sends or self.receives:
            operations = [dist.P2POp(dist.irecv, staging, group=group, group_peer=rank) for rank, staging in self.receives]
            operations += [dist.P2POp(dist.isend, staging, group=group, group_peer=rank) for rank, staging, _ in self.sends]
            for request in dist.batch_isend_irecv(operations):
                request.wait(timedelta(seconds=timeout_s))
        if failed is not None:
            raise failed


def make_bucket_work(
    rank: int, node: str, plan: Plan, tensors: Sequence[TensorMeta], views: Sequence[HFView], shared: SharedBuckets | None
) -> list[BucketWork]:
    """Turn the plan into copies between live tensors and the node's slots."""
    metas = {meta.name: meta for meta in tensors}
    held: defaultdict[str, list[HFView]] = defaultdict(list)
    for view in views:
        held[view.name].append(view)
    works = [BucketWork() for _ in plan.buckets]
    writers: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    copies: defaultdict[tuple[int, int], list[Copy]] = defaultdict(list)
    sends: list[list[tuple[int, torch.Tensor, list[Copy]]]] = [[] for _ in plan.buckets]
    live: list[list[Copy]] = [[] for _ in plan.buckets]  # of both, those that read this rank's parameters
    for piece in plan.pieces:
        work, entry = works[piece.bucket], plan.buckets[piece.bucket][piece.entry]
        meta = metas[entry.name]
        if piece.node == node:
            writers[piece.bucket, piece.entry].add(piece.writer)
        if rank not in (piece.source, piece.writer):
            continue
        staging: torch.Tensor | None = None
        if piece.source != piece.writer:
            staging = torch.empty([stop - start for start, stop in piece.region], dtype=meta.dtype)
            # bytes: gloo knows fewer dtypes than torch
            if rank == piece.source:
                filled = _copies_from(held[entry.name], piece.region, staging)
                live[piece.bucket] += filled
                sends[piece.bucket].append((piece.writer, staging, filled))
                continue
            work.receives.append((piece.source, staging.view(-1).view(torch.uint8)))
        assert shared is not None, "only ranks of a node with an engine write"
        destination = _in_slot(shared, piece, entry, meta)
        if staging is None:
            written = _copies_from(held[entry.name], piece.region, destination)
            live[piece.bucket] += written
            copies[piece.bucket, piece.entry] += written
        else:
            copies[piece.bucket, piece.entry].append((destination, staging))
    all_staged, hosts = stage(live)
    for work, staged, to_send in zip(works, all_staged, sends, strict=True):
        work.staged = staged
        work.sends = [(to, staging.view(-1).view(torch.uint8), tuple(_from_host(filled, hosts))) for to, staging, filled in to_send]
    for bucket, checksum_ranks in enumerate(plan.checksum_ranks.get(node, ())):
        work = works[bucket]
        for index, (entry, checksum_rank) in enumerate(zip(plan.buckets[bucket], checksum_ranks, strict=True)):
            alone = len(writers[bucket, index]) == 1
            work.shared_checksums |= not alone
            if rank not in writers[bucket, index]:
                continue
            mine = checksum_rank == rank
            pairs = _from_host(copies[bucket, index], hosts)
            plain = [pair for pair in pairs if _is_plain(*pair)]
            entry_work = EntryWork(
                name=entry.name,
                index=index,
                slot=bucket % NUM_SLOTS,
                start=entry.bucket_start,
                num_bytes=entry.num_bytes,
                byte_copies=tuple((_memory(destination), _memory(source)) for destination, source in plain),
                copies=tuple(pair for pair in pairs if not _is_plain(*pair)),
                computes_checksum=mine and alone,
            )
            work.entries.append(entry_work)
            if mine and not alone:
                work.late_checksums.append(entry_work)
    return works


def _from_host(copies: Sequence[Copy], hosts: Mapping[int, torch.Tensor]) -> list[Copy]:
    """The copies, with what is staged read from where it is on the host."""
    return [(destination, hosts.get(id(source), source)) for destination, source in copies]


def _is_plain(destination: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the copy is one of bytes in host memory."""
    both = (destination, source)
    return destination.dtype == source.dtype and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in both)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, kept alive with it."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _in_slot(shared: SharedBuckets, piece: Piece, entry: Entry, meta: TensorMeta) -> torch.Tensor:
    """The piece's place in its slot, with the piece's shape."""
    flat = shared.slots[piece.bucket % NUM_SLOTS][entry.bucket_start : entry.bucket_start + entry.num_bytes]
    rows = flat.view(meta.dtype).view(entry.stop - entry.start, *meta.shape[1:])
    (start, stop), *inner = piece.region
    return rows[(slice(start - entry.start, stop - entry.start), *(slice(*bounds) for bounds in inner))]


def _copies_from(views: Sequence[HFView], region: Region, destination: torch.Tensor) -> list[Copy]:
    """Copies of a region from the view that holds it to `destination`, which has the region's shape."""
    (first, last), *inner = region
    for view in views:
        (start, stop), *rest = view.region
        if start <= first and last <= stop and rest == inner:
            parts = view.rows(first - start, last - start)
            return [(destination[a - first + start : b - first + start].view(part.shape), part) for a, b, part in parts]
    raise ValueError(f"no parameter holds {region}; their layout has changed since the plan was made")
