"""The transfer plan: what lies where in the buckets, and which rank writes which bytes. Pure; no rank is asked anything.

A *place* keeps one set of buckets for those that read there: a node's host memory for all its engines, or the memory of one GPU for one
process of an engine. It takes only what they want, so places differ in what lies in their buckets. Within a place every wanted byte is
written exactly once, by a rank of the place: one that holds it where there is one, otherwise one to which another rank sends it.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tandem.engine.buckets import Region
from tandem.engine.types import TensorMeta

ALIGNMENT = 256  # bytes; what a GPU copies fastest from, and enough for every dtype
MAX_ENTRY_BYTES = 512 << 10  # half of the level-2 cache of a core

Wanted = tuple[tuple[str, Region], ...]
Holdings = Sequence[Sequence[tuple[str, Region]]]  # per rank


@dataclass(frozen=True, slots=True)
class Place:
    """Who writes its buckets, and what its readers want together: tensors' regions, which may overlap; None: everything."""

    name: str  # as messages and tables show it
    ranks: tuple[int, ...]
    wanted: Wanted | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A region of a tensor, lying whole in a bucket, its elements side by side. Cut by rows out of what is wanted."""

    name: str
    region: Region
    num_bytes: int
    tensor_start: int  # byte of the tensor where the region begins
    bucket_start: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of an entry that one rank of the place writes. `region` is in coordinates of the whole tensor.

    `source` holds the values; where it is not the writer it sends them to it.
    """

    bucket: int
    entry: int
    region: Region
    source: int
    writer: int


@dataclass(frozen=True, slots=True)
class PlacePlan:
    """One place's buckets, and the work of its ranks.

    `checksum_ranks[bucket][entry]` is the rank that computes an entry's checksum: its only writer, or, where several ranks write parts of
    the same rows, one of them once all have written.
    """

    place: Place
    buckets: tuple[tuple[Entry, ...], ...]
    pieces: tuple[Piece, ...]  # ordered by bucket
    checksum_ranks: tuple[tuple[int, ...], ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for bucket in self.buckets for entry in bucket)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Values on their way to ranks that do not hold them, before those write their buckets of this number."""

    bucket: int
    name: str
    region: Region
    source: int
    writers: tuple[int, ...]  # more than one: a broadcast


@dataclass(frozen=True, slots=True)
class Plan:
    """All places; every rank goes through bucket 0 of all of them, then bucket 1, ….

    Raises nothing and asks nobody: deterministic, so that every rank has the same.
    """

    places: tuple[PlacePlan, ...]
    transfers: tuple[Transfer, ...]  # ordered by bucket

    @property
    def num_steps(self) -> int:
        return max(len(place.buckets) for place in self.places)

    @property
    def bucket_bytes(self) -> int:
        """Of the largest bucket."""
        ends = (_align(entry.bucket_start + entry.num_bytes) for place in self.places for bucket in place.buckets for entry in bucket)
        return max(ends, default=ALIGNMENT)


def make_plan(
    tensors: Sequence[TensorMeta],
    holdings: Holdings,
    nodes: Sequence[str],
    places: Sequence[Place],
    bucket_bytes: int,
    *,
    max_entry_bytes: int = MAX_ENTRY_BYTES,
    broadcasts: bool = False,
) -> Plan:
    """Plan a swap.

    Args:
        tensors: all tensors of the model, with the dtype that engines receive them in.
        holdings: per rank, the regions of the tensors that it holds. Regions of a tensor are equal or disjoint.
        nodes: per rank, the node that it runs on.
        places: no rank may belong to two of them.
        bucket_bytes: wanted size of a bucket; a longer row makes the buckets longer.
        max_entry_bytes: of what has one checksum.
        broadcasts: let one rank send a region to all places that lack it; otherwise each place gets it from a rank near by.
    Raises: ValueError naming the tensor if ranks hold overlapping or unknown regions or leave a part of it out, or if a place wants what
        is not in it.
    """
    regions = distinct_regions(tensors, holdings)
    taken = [rank for place in places for rank in place.ranks]
    if len(set(taken)) != len(taken):
        raise ValueError(f"places {', '.join(place.name for place in places)} share ranks: {sorted(taken)}")
    # small enough that the ranks of a place can share a bucket evenly
    entry_bytes = min(max_entry_bytes, bucket_bytes // max((len(place.ranks) for place in places), default=1))
    layouts: dict[Wanted | None, _Layout] = {}
    load = _Load(defaultdict(int), defaultdict(int))
    planned, transfers = [], {}
    for place in places:
        if place.wanted not in layouts:
            layouts[place.wanted] = _lay_out(tensors, regions, place, bucket_bytes, entry_bytes, number=len(layouts))
        layout = layouts[place.wanted]
        pieces: list[Piece] = []
        checksum_ranks = []
        for index, bucket in enumerate(layout.buckets):
            assigned = [_assigned(place, index, part, nodes, load, layout.sources if broadcasts else None) for part in layout.parts[index]]
            assigned.sort(key=lambda piece: (piece.entry, piece.region))
            for piece in assigned:
                if piece.source != piece.writer:
                    key = (index, layout.number, piece.entry, piece.region, piece.source, None if broadcasts else piece.writer)
                    transfers.setdefault(key, (bucket[piece.entry].name, []))[1].append(piece.writer)
            pieces += assigned
            checksum_ranks.append(_checksum_ranks(bucket, assigned))
            load.in_bucket.clear()
        planned.append(PlacePlan(place, layout.buckets, tuple(pieces), tuple(checksum_ranks)))
    ordered = sorted(transfers.items(), key=lambda item: item[0][0])
    return Plan(
        tuple(planned),
        tuple(Transfer(key[0], name, key[3], key[4], tuple(writers)) for key, (name, writers) in ordered),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of an entry that the same ranks hold."""

    entry: int
    region: Region
    owners: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """What places with the same wishes have in common."""

    number: int
    buckets: tuple[tuple[Entry, ...], ...]
    parts: tuple[tuple[_Part, ...], ...]  # of each bucket, the largest first
    sources: dict[tuple[int, ...], int]  # of a broadcast, by the ranks that hold the same


class _Load:
    """Bytes by which the work is spread."""

    def __init__(self, written: defaultdict[int, int], sent: defaultdict[int, int]) -> None:
        self.written, self.sent = written, sent  # over the whole swap
        self.in_bucket: defaultdict[int, int] = defaultdict(int)


def _assigned(
    place: Place, bucket: int, part: _Part, nodes: Sequence[str], load: _Load, broadcast_sources: dict[tuple[int, ...], int] | None
) -> Piece:
    """Who writes a part of a place's bucket, and where it comes from."""
    local = [rank for rank in place.ranks if rank in part.owners]
    writer = min(local or place.ranks, key=lambda rank: (load.in_bucket[rank], load.written[rank], rank))
    load.in_bucket[writer] += part.num_bytes
    load.written[writer] += part.num_bytes
    if local:
        return Piece(bucket, part.entry, part.region, writer, writer)
    if broadcast_sources is not None:  # always the same for the same owners: every other choice is one more group of ranks
        if part.owners not in broadcast_sources:
            broadcast_sources[part.owners] = min(part.owners, key=lambda rank: (load.sent[rank], rank))
        source = broadcast_sources[part.owners]
    else:
        near = [rank for rank in part.owners if nodes[rank] == nodes[writer]]
        source = min(near or part.owners, key=lambda rank: (load.sent[rank], rank))
    load.sent[source] += part.num_bytes
    return Piece(bucket, part.entry, part.region, source, writer)


def distinct_regions(tensors: Sequence[TensorMeta], holdings: Holdings) -> dict[str, dict[Region, tuple[int, ...]]]:
    """Per tensor its distinct regions in order, each with the ranks that hold it; together they cover the tensor once.

    Raises: ValueError naming the tensor otherwise.
    """
    found: dict[str, dict[Region, list[int]]] = {meta.name: {} for meta in tensors}
    for rank, held in enumerate(holdings):
        for name, region in held:
            if name not in found:
                raise ValueError(f"rank {rank} holds {name}, which is no tensor of the model")
            owners = found[name].setdefault(region, [])
            if not owners or owners[-1] != rank:
                owners.append(rank)
    regions = {}
    for meta in tensors:
        parts = sorted(found[meta.name])
        for region in parts:
            _check_inside(meta, region)
        for first, second in itertools.combinations(parts, 2):
            if intersection(first, second) is not None:
                raise ValueError(f"{meta.name}: regions {first} and {second} overlap without being equal")
        covered = sum(volume(region) for region in parts)
        if covered != prod(meta.shape):
            raise ValueError(f"{meta.name}: the ranks hold {covered} of {prod(meta.shape)} elements")
        regions[meta.name] = {region: tuple(found[meta.name][region]) for region in parts}
    return regions


def areas_of(tensors: Sequence[TensorMeta], place: Place) -> Iterator[tuple[TensorMeta, list[Region]]]:
    """Each tensor's wanted part in disjoint regions; those that readers ask for, where these do not overlap.

    Raises: ValueError if a place wants a tensor that there is not, or elements outside of one.
    """
    if place.wanted is None:
        yield from ((meta, [tuple((0, extent) for extent in meta.shape)]) for meta in tensors)
        return
    wanted: defaultdict[str, set[Region]] = defaultdict(set)
    for name, region in place.wanted:
        wanted[name].add(region)
    if unknown := wanted.keys() - {meta.name for meta in tensors}:
        raise ValueError(f"{place.name} wants {min(unknown)}, which is no tensor of the model")
    for meta in tensors:
        asked = sorted(wanted[meta.name])
        for region in asked:
            _check_inside(meta, region)
        if any(intersection(first, second) is not None for first, second in itertools.combinations(asked, 2)):
            bounds = [sorted({bound for region in asked for bound in region[dim]}) for dim in range(len(meta.shape))]
            cells = itertools.product(*map(itertools.pairwise, bounds))
            asked = [cell for cell in cells if any(intersection(cell, region) is not None for region in asked)]
        yield meta, asked


def _check_inside(meta: TensorMeta, region: Region) -> None:
    if len(region) != len(meta.shape) or any(not 0 <= a < b <= extent for (a, b), extent in zip(region, meta.shape, strict=True)):
        raise ValueError(f"{meta.name}: region {region} does not lie in shape {meta.shape}")


def _lay_out(
    tensors: Sequence[TensorMeta],
    regions: Mapping[str, Mapping[Region, tuple[int, ...]]],
    place: Place,
    bucket_bytes: int,
    entry_bytes: int,
    *,
    number: int,
) -> _Layout:
    """Cut what the place wants into entries and fill the buckets in order."""
    buckets: list[list[Entry]] = [[]]
    offset = 0
    for meta, area in ((meta, area) for meta, areas in areas_of(tensors, place) for area in areas):
        inner = area[1:]
        row_bytes = volume(inner) * meta.dtype.itemsize
        bounds = sorted({*area[0], *(bound for region in regions[meta.name] for bound in region[0] if area[0][0] < bound < area[0][1])})
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
                region = ((start, stop), *inner)
                entry = Entry(meta.name, region, (stop - start) * row_bytes, _first_byte(meta, region), offset)
                buckets[-1].append(entry)
                offset = _align(offset + entry.num_bytes)
                start = stop
    filled = tuple(tuple(bucket) for bucket in buckets if bucket)
    itemsize = {meta.name: meta.dtype.itemsize for meta in tensors}
    parts = tuple(tuple(sorted(_parts(bucket, regions, itemsize), key=lambda part: -part.num_bytes)) for bucket in filled)
    return _Layout(number, filled, parts, {})


def _parts(
    bucket: Sequence[Entry], regions: Mapping[str, Mapping[Region, tuple[int, ...]]], itemsize: Mapping[str, int]
) -> Iterator[_Part]:
    for index, entry in enumerate(bucket):
        for region, owners in regions[entry.name].items():
            if (part := intersection(region, entry.region)) is not None:
                yield _Part(index, part, owners, volume(part) * itemsize[entry.name])


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


def intersection(first: Region, second: Region) -> Region | None:
    """What two regions of a tensor have in common, None if nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    if common == second:
        return second  # of many there is one object
    return common if all(start < stop for start, stop in common) else None


def volume(region: Region) -> int:
    """Number of elements."""
    return prod(stop - start for start, stop in region)


def _first_byte(meta: TensorMeta, region: Region) -> int:
    return sum(start * prod(meta.shape[dim + 1 :]) for dim, (start, _) in enumerate(region)) * meta.dtype.itemsize


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
