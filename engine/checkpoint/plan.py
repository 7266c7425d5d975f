"""The transfer plan: what lies where in the buckets, and which rank writes which bytes. Pure; no rank is asked anything.

Every node that has an engine keeps one set of buckets, read by all engines of that node. All nodes share one bucket
layout. Within a node every byte is written exactly once, by a rank of that node: one that holds it where there is one,
otherwise one that receives it from another node.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tandem.engine.types import TensorMeta

Region = tuple[tuple[int, int], ...]  # (start, stop) of every dimension of a tensor

ALIGNMENT = 256  # bytes; what a GPU copies fastest from, and enough for every dtype
MAX_ENTRY_BYTES = 512 << 10  # half of the level-2 cache of a core


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows [start, stop) of a tensor, lying whole in a bucket."""

    name: str
    start: int
    stop: int
    row_bytes: int
    bucket_start: int

    @property
    def num_bytes(self) -> int:
        return (self.stop - self.start) * self.row_bytes

    @property
    def tensor_start(self) -> int:
        return self.start * self.row_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of an entry that one rank of a node writes. `region` is in coordinates of the whole tensor.

    `source` holds the values; where it is not the writer it sends them to it.
    """

    node: str
    bucket: int
    entry: int
    region: Region
    source: int
    writer: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Bucket layout and the work of every rank.

    `checksum_ranks[node][bucket][entry]` is the rank that computes an entry's checksum: its only writer, or, where
    several ranks write columns of the same rows, one of them once all have written.
    """

    bucket_bytes: int  # of the largest bucket
    buckets: tuple[tuple[Entry, ...], ...]
    pieces: tuple[Piece, ...]  # ordered by bucket, then node
    checksum_ranks: Mapping[str, tuple[tuple[int, ...], ...]]

    @property
    def num_bytes(self) -> int:
        """Bytes of one copy of the model."""
        return sum(entry.num_bytes for bucket in self.buckets for entry in bucket)


def make_plan(
    tensors: Sequence[TensorMeta],
    holdings: Sequence[Sequence[tuple[str, Region]]],
    nodes: Sequence[str],
    leaders: Sequence[int],
    bucket_bytes: int,
) -> Plan:
    """Plan a swap. Deterministic: every rank computes the same plan from the same input.

    Args:
        tensors: all tensors that an engine receives, with the dtype that it receives them in.
        holdings: per rank, the regions of the tensors that it holds. Regions of a tensor are equal or disjoint.
        nodes: per rank, the node that it runs on.
        leaders: the ranks that lead an engine.
        bucket_bytes: wanted size of a bucket; a longer row makes the buckets longer.
    Raises: ValueError naming the tensor if ranks hold overlapping or unknown regions or leave a part of it out.
    """
    regions = distinct_regions(tensors, holdings)
    engine_nodes = sorted({nodes[rank] for rank in leaders})
    ranks_of = {node: [rank for rank, where in enumerate(nodes) if where == node] for node in engine_nodes}
    # small enough that the ranks of a node can share a bucket evenly, and to be in a core's cache when it is checksummed
    entry_bytes = min(MAX_ENTRY_BYTES, bucket_bytes // max((len(ranks) for ranks in ranks_of.values()), default=1))
    buckets = _lay_out(tensors, regions, bucket_bytes, entry_bytes)

    itemsize = {meta.name: meta.dtype.itemsize for meta in tensors}
    pieces: list[Piece] = []
    checksum_ranks: dict[str, list[tuple[int, ...]]] = {node: [] for node in engine_nodes}
    written: defaultdict[int, int] = defaultdict(int)  # bytes per rank over the whole swap
    sent: defaultdict[int, int] = defaultdict(int)
    for index, bucket in enumerate(buckets):
        for node in engine_nodes:
            in_bucket = dict.fromkeys(ranks_of[node], 0)
            parts = [
                (entry_index, part, owners, _volume(part) * itemsize[entry.name])
                for entry_index, entry in enumerate(bucket)
                for region, owners in regions[entry.name].items()
                if (part := _rows(region, entry.start, entry.stop))
            ]
            assigned: list[Piece] = []
            for entry_index, part, owners, num_bytes in sorted(parts, key=lambda item: -item[3]):
                local = [rank for rank in owners if nodes[rank] == node]
                writer = min(local or ranks_of[node], key=lambda rank: (in_bucket[rank], written[rank], rank))
                source = writer if local else min(owners, key=lambda rank: (sent[rank], rank))
                in_bucket[writer] += num_bytes
                written[writer] += num_bytes
                if source != writer:
                    sent[source] += num_bytes
                assigned.append(Piece(node, index, entry_index, part, source, writer))
            assigned.sort(key=lambda piece: (piece.entry, piece.region))
            pieces += assigned
            checksum_ranks[node].append(_checksum_ranks(bucket, assigned))
    size = max((_align(entry.bucket_start + entry.num_bytes) for bucket in buckets for entry in bucket), default=ALIGNMENT)
    return Plan(size, buckets, tuple(pieces), {node: tuple(ranks) for node, ranks in checksum_ranks.items()})


def distinct_regions(tensors: Sequence[TensorMeta], holdings: Sequence[Sequence[tuple[str, Region]]]) -> dict[str, dict[Region, list[int]]]:
    """Per tensor its distinct regions in order, each with the ranks that hold it; together they cover the tensor once.

    Raises: ValueError naming the tensor otherwise.
    """
    regions: dict[str, dict[Region, list[int]]] = {meta.name: {} for meta in tensors}
    for rank, held in enumerate(holdings):
        for name, region in held:
            if name not in regions:
                raise ValueError(f"rank {rank} holds {name}, which is no tensor of the model")
            owners = regions[name].setdefault(region, [])
            if not owners or owners[-1] != rank:
                owners.append(rank)
    for meta in tensors:
        parts = sorted(regions[meta.name])
        for region in parts:
            if len(region) != len(meta.shape) or any(not 0 <= a < b <= extent for (a, b), extent in zip(region, meta.shape, strict=False)):
                raise ValueError(f"{meta.name}: region {region} does not lie in shape {meta.shape}")
        for i, first in enumerate(parts):
            for second in parts[i + 1 :]:
                if all(a < d and c < b for (a, b), (c, d) in zip(first, second, strict=True)):
                    raise ValueError(f"{meta.name}: regions {first} and {second} overlap without being equal")
        covered = sum(_volume(region) for region in parts)
        if covered != prod(meta.shape):
            raise ValueError(f"{meta.name}: the ranks hold {covered} of {prod(meta.shape)} elements")
        regions[meta.name] = {region: regions[meta.name][region] for region in parts}
    return regions


def _lay_out(
    tensors: Sequence[TensorMeta], regions: Mapping[str, Mapping[Region, object]], bucket_bytes: int, entry_bytes: int
) -> tuple[tuple[Entry, ...], ...]:
    """Cut the tensors into entries and fill the buckets in order."""
    buckets: list[list[Entry]] = [[]]
    offset = 0
    for meta in tensors:
        row_bytes = meta.num_bytes // meta.shape[0]
        bounds = sorted({bound for region in regions[meta.name] for bound in region[0]})
        for first, last in itertools.pairwise(bounds):
            start = first
            while start < last:
                left, space = (last - start) * row_bytes, bucket_bytes - offset
                fits = min(space, max(entry_bytes, row_bytes)) // row_bytes
                # a band that fits into one entry is not cut to fill the rest of a bucket
                if offset and (fits <= 0 or space < left <= entry_bytes):
                    buckets.append([])
                    offset = 0
                    continue
                stop = min(last, start + max(1, fits))
                entry = Entry(meta.name, start, stop, row_bytes, offset)
                buckets[-1].append(entry)
                offset = _align(offset + entry.num_bytes)
                start = stop
    return tuple(tuple(bucket) for bucket in buckets if bucket)


def _checksum_ranks(bucket: Sequence[Entry], pieces: Sequence[Piece]) -> tuple[int, ...]:
    """Per entry, the writer with the fewest bytes to checksum so far."""
    writers: list[list[int]] = [[] for _ in bucket]
    for piece in pieces:
        writers[piece.entry].append(piece.writer)
    load: defaultdict[int, int] = defaultdict(int)
    chosen = []
    for entry, ranks in zip(bucket, writers, strict=True):
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        load[rank] += entry.num_bytes
        chosen.append(rank)
    return tuple(chosen)


def _rows(region: Region, start: int, stop: int) -> Region | None:
    """The region's part in rows [start, stop), None when there is none."""
    first, last = max(region[0][0], start), min(region[0][1], stop)
    return ((first, last), *region[1:]) if first < last else None


def _volume(region: Region) -> int:
    return prod(stop - start for start, stop in region)


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
