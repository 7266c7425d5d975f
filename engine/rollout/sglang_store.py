"""One SGLang process's side of a swap: verified bytes go from the buckets straight to the places of a spare of its parameters.

Of every entry of a bucket that this process wants a part of, the checksum is of the whole: it is verified where the entry lies (an entry
that is taken whole: where it arrived), and only then what is wanted is copied. An entry of which nothing is wanted is not read.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

import torch
import xxhash

from tandem.engine.buckets import NUM_SLOTS, BucketSlice, BucketStream, Region
from tandem.engine.rollout.receive import (
    Mappings,
    OpenStream,
    check_tensors,
    difference,
    gaps,
    incomplete,
    note_received,
    source_of,
    unequal,
)
from tandem.engine.rollout.sglang_spare import Parameters
from tandem.engine.rollout.sglang_trace import Trace, TracedCopy
from tandem.engine.rollout.strided import StridedCopy, View, box_of, normal, part_of, read_through, row_major
from tandem.engine.types import BucketEntry, TensorMeta, WeightTransferError
from tandem.kernels.checksum import Checksums

# A bucket: its bytes in host memory (None where it lies on a device, and kernels verify it), and what copies read, on that device.
Memories = tuple[memoryview | None, torch.Tensor]


class ByteCopy(NamedTuple):
    """Neighbours of an entry that become neighbours of a parameter, in bytes.

    Numbers, of which memoryviews are made as they are copied: kept ones would take a KiB for every entry.
    """

    target: int  # index of the parameter
    to_byte: int
    first: int  # in the entry
    num_bytes: int


@dataclass(frozen=True, slots=True)
class EntryLoad:
    """What becomes of one entry."""

    start: int  # in the bucket
    num_bytes: int
    plain: tuple[ByteCopy, ...]
    strided: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (target in one of the two sets of parameters, source)

    def run(self, bucket: memoryview | None, memory_of: Callable[[int], memoryview], checksum: int) -> str:
        """Verify and copy. Returns what is wrong ("" if nothing).

        Args:
            bucket: None where it lies on a device, and has been verified there.
            memory_of: the bytes of the parameter of this index that receives.
        """
        wrong = ""
        if bucket is not None:
            source = bucket[self.start : self.start + self.num_bytes]
            if not self.strided and len(self.plain) == 1 and self.plain[0].num_bytes == self.num_bytes:
                copy = self.plain[0]
                arrived = memory_of(copy.target)[copy.to_byte : copy.to_byte + copy.num_bytes]
                arrived[:] = source  # verified where it arrived, while it is in the cache
                return difference(arrived, checksum)
            wrong = difference(source, checksum)
            for copy in self.plain if not wrong else ():
                memory_of(copy.target)[copy.to_byte : copy.to_byte + copy.num_bytes] = source[copy.first : copy.first + copy.num_bytes]
        for target, tensor in self.strided if not wrong else ():
            target.copy_(tensor)
        return wrong


class ParameterStore:
    """Receives versions in transactions (`WeightSink`'s commands in SGLang's process).

    Args:
        trace: of `model.load_weights` for the tensors `expected`.
        post_load: computes what the model derives from its parameters; None if it derives nothing.
    """

    def __init__(
        self, trace: Trace, parameters: Parameters, expected: Mapping[str, TensorMeta], post_load: Callable[[], None] | None
    ) -> None:
        self._trace, self._parameters, self._expected, self._post_load = trace, parameters, dict(expected), post_load
        self._copies: dict[str, list[TracedCopy]] = {name: [] for name in expected}
        for copy in trace.copies:
            self._copies[copy.name].append(copy)
        self._normal = {copy: copy.copy for copy in trace.copies}
        self._has_version = self._spare_has_version = False
        self._is_open = self._failed = False
        self._received: dict[str, list[tuple[int, int]]] = {}  # name: byte ranges [start, end), neighbours joined
        self._target_bytes: dict[int, memoryview] = {}  # of the parameters of either set, by id
        self._mappings = Mappings()
        self._stream: OpenStream | None = None
        device = parameters.serving[0].device
        self._staging = None if device.type == "cpu" else torch.empty(0, dtype=torch.uint8, device=device)
        self._loads: dict[int, list[list[EntryLoad | None]]] = {}  # of the stream, by the spare that they fill
        self._verifiers: dict[int, Checksums] = {}  # of the stream, by bucket
        self._missing = ""  # what the stream does not bring

    @property
    def is_current(self) -> bool:
        """Whether SGLang's parameters are still those that were traced."""
        return self._parameters.are_in_place

    @property
    def must_settle(self) -> bool:
        """Whether memory is held after a commit that `settle` gives back."""
        return not self._parameters.holding.kept

    def wanted(self) -> list[tuple[str, Region]]:
        """The parts of the tensors that this process takes, in the order of the tensors."""
        return [(name, box_of(copy.source, self._expected[name].shape)) for name, copies in self._copies.items() for copy in copies]

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        """Begin a transaction. Raises: WeightTransferError naming the tensor that is not the model's, or without memory for a spare."""
        check_tensors(self._expected, tensors)
        self._begin()

    def _begin(self) -> None:
        self.rollback()
        self._parameters.allocate()
        self._is_open, self._failed, self._spare_has_version = True, False, False
        self._received = {name: [] for name in self._expected}
        for fill in self._trace.fills:
            torch.as_strided(self._parameters.spare[fill.target], fill.view.shape, fill.view.stride, fill.view.start).fill_(fill.value)

    def receive(self, stream: BucketStream | None, policy_version: int, swap: int, first_ticket: int) -> None:
        """A whole transaction but for its `commit`: see `StreamingWeightSink.receive`. `stream` None: the one before.

        Raises: WeightTransferError naming bucket and tensor; PeerFailed if a rank failed; TimeoutError; PeerLost.
        """
        if stream is not None:
            if self._stream is not None:
                self._stream.close()
                self._stream, self._loads = None, {}
            self._stream = OpenStream(stream)
        assert self._stream is not None, "the first swap brings the stream"
        opened = self._stream
        with opened.telling(swap):
            if stream is not None:
                check_tensors(self._expected, stream.tensors)
            self._begin()
        self._failed = True  # until every checksum held
        opened.take_over(lambda number, checksums: self._load_bucket(opened, number, checksums), swap, first_ticket)
        if self._missing:
            raise WeightTransferError(f"the stream does not bring all that this process wants of tensor {self._missing}")
        self._received = {name: [(0, meta.num_bytes)] for name, meta in self._expected.items()}
        self._failed = False

    def _load_bucket(self, opened: OpenStream, number: int, checksums: list[int]) -> tuple[int, str] | None:
        key = id(self._parameters.spare[0])
        if key not in self._loads:
            self._loads[key] = self._loads_of(opened)
        slot, bucket = opened.shared.slots[number % NUM_SLOTS], None
        if opened.shared.has_kernel_checksums:
            wanted = [index for index, load in enumerate(self._loads[key][number]) if load is not None]
            found = self._checksums(opened, number, wanted).numbers(slot).tolist()
            for index, arrived in zip(wanted, found, strict=True):
                if arrived != checksums[index]:
                    return index, unequal(arrived, checksums[index])
        else:
            bucket = opened.shared.memories[number % NUM_SLOTS]
            self._stage(slot)
        for index, (load, checksum) in enumerate(zip(self._loads[key][number], checksums, strict=True)):
            wrong = load.run(bucket, self._receiving_memory, checksum) if load is not None else ""
            if wrong:
                return index, wrong
        self._synchronise()
        return None

    def _loads_of(self, opened: OpenStream) -> list[list[EntryLoad | None]]:
        """What becomes of every entry of the stream; and which tensor it does not bring whole."""
        if opened.shared.has_kernel_checksums:
            memories: list[Memories] = [(None, slot) for slot in opened.shared.slots]
        else:
            memories = [self._memories(*both) for both in zip(opened.shared.memories, opened.shared.slots, strict=True)]
        self._verifiers = {}
        arriving = dict.fromkeys(self._normal, 0)
        known = next(iter(self._loads.values()), None)  # into the other set: where nothing is strided, the numbers are the same
        loads: list[list[EntryLoad | None]] = []
        for number, bucket in enumerate(opened.stream.buckets):
            loads.append([])
            for index, entry in enumerate(bucket):
                parts = list(self._parts(entry))
                for copy, part in parts:
                    arriving[copy] += part.num_elements
                load = None if known is None else known[number][index]
                if load is None or load.strided:
                    load = self._load_of(entry, [(copy.target, part) for copy, part in parts], memories[number % NUM_SLOTS])
                loads[-1].append(load)
        short = [copy for copy, num_elements in arriving.items() if num_elements != self._normal[copy].num_elements]
        self._missing = "" if not short else short[0].name
        return loads

    def _checksums(self, opened: OpenStream, number: int, wanted: Sequence[int]) -> Checksums:
        """What verifies the wanted entries of a bucket on its device."""
        if number not in self._verifiers:
            parts = opened.stream.buckets[number]
            places = [(parts[index].bucket_start, parts[index].num_bytes) for index in wanted]
            self._verifiers[number] = Checksums(places, opened.shared.slots[0].device)
        return self._verifiers[number]

    def load(self, path: str, entries: Sequence[BucketEntry]) -> None:
        """Take over one bucket."""
        if not self._is_open:
            raise WeightTransferError(f"bucket {path} came outside a transaction; call prepare first")
        self._failed = True
        try:
            bucket = self._mappings.open(path)
        except OSError as error:
            raise WeightTransferError(f"bucket {path} cannot be opened: {error}") from error
        host = _readable(bucket)
        memories = self._memories(bucket, host)
        self._stage(host)
        for entry in entries:
            meta = self._expected.get(entry.name)
            if not source_of(path, bucket, entry, None if meta is None else meta.num_bytes):
                continue
            part = BucketSlice(entry.name, entry.tensor_start, entry.num_bytes, entry.bucket_start)
            load = self._load_of(part, [(copy.target, cut) for copy, cut in self._parts(part)], memories)
            wrong = load.run(bucket, self._receiving_memory, entry.checksum) if load is not None else ""
            end = entry.tensor_start + entry.num_bytes
            if wrong:
                raise WeightTransferError(f"bucket {path}: tensor {entry.name}, bytes {entry.tensor_start}:{end}: {wrong}")
            note_received(self._received[entry.name], entry.tensor_start, end)
        self._synchronise()
        self._failed = False

    # ---- what becomes of an entry

    def _parts(self, entry: BucketSlice) -> Iterator[tuple[TracedCopy, StridedCopy]]:
        """The parts of this process's copies that read the entry; sources count from the entry's first element."""
        meta = self._expected[entry.name]
        if entry.region is not None:
            box = View(sum(a * step for (a, _), step in zip(entry.region, row_major(meta.shape), strict=True)), _extents(entry.region), ())
            packed = View(0, box.shape, tuple(row_major(box.shape)))
            for copy in self._copies[entry.name]:
                for seen, cut in read_through(copy.source, box, meta.shape, packed):
                    yield copy, normal(seen, part_of(copy.destination, cut))
            return
        size = meta.dtype.itemsize
        if entry.tensor_start % size or entry.num_bytes % size:
            where = f"bytes {entry.tensor_start}:{entry.tensor_start + entry.num_bytes}"
            raise WeightTransferError(f"{where} of tensor {entry.name} cut an element of {size} bytes")
        start = entry.tensor_start // size
        for copy in self._copies[entry.name]:
            for part in self._normal[copy].cut(start, start + entry.num_bytes // size):
                yield copy, replace(part, source_start=part.source_start - start)

    def _load_of(self, entry: BucketSlice, parts: Sequence[tuple[int, StridedCopy]], memories: Memories) -> EntryLoad | None:
        if not parts:
            return None
        bytes_in, tensor = memories
        stop = entry.bucket_start + entry.num_bytes
        source = tensor[entry.bucket_start : stop].view(self._expected[entry.name].dtype)
        on_host = self._staging is None and self._parameters.holding.kept
        plain, strided = list[ByteCopy](), list[tuple[torch.Tensor, torch.Tensor]]()
        for index, part in parts:
            target = self._parameters.spare[index]
            if bytes_in is not None and on_host and part.is_plain and target.dtype == source.dtype:
                size = source.element_size()  # copied by libc, in half of torch's time
                plain.append(ByteCopy(index, part.target_start * size, part.source_start * size, part.num_elements * size))
                continue
            to = torch.as_strided(target, part.shape, part.target_stride, target.storage_offset() + part.target_start)
            of = torch.as_strided(source, part.shape, part.source_stride, source.storage_offset() + part.source_start)
            strided.append((to, of))
        return EntryLoad(entry.bucket_start, entry.num_bytes, tuple(plain), tuple(strided))

    def _receiving_memory(self, index: int) -> memoryview:
        """All bytes of a parameter of the spare that stays in host memory."""
        flat = self._parameters.spare[index]
        if id(flat) not in self._target_bytes:
            self._target_bytes[id(flat)] = _bytes_of(flat)
        return self._target_bytes[id(flat)]

    def _memories(self, bucket: memoryview, host: torch.Tensor) -> Memories:
        if self._staging is None:
            return bucket, host
        if self._staging.numel() < host.numel():
            self._staging, self._loads = torch.empty_like(host, device=self._staging.device), {}
        return bucket, self._staging

    def _stage(self, host: torch.Tensor) -> None:
        """Bring a bucket to the parameters' device, where they are not in host memory."""
        if self._staging is not None:
            self._staging[: host.numel()].copy_(host)

    def _synchronise(self) -> None:
        """Copies on a device must be done before the bucket is given back, and before another stream computes."""
        if self._staging is not None and self._staging.is_cuda:  # also where buckets lie on the device
            torch.cuda.current_stream(self._staging.device).synchronize()

    # ---- the end of a transaction

    def commit(self) -> None:
        """Exchange spare and serving. Raises: WeightTransferError naming the first incomplete tensor, or if the model cannot go on with
        what came; it then has the old weights again."""
        if not self._is_open:
            raise WeightTransferError("commit outside a transaction; call prepare first")
        if self._failed:
            raise WeightTransferError("commit after a bucket that failed; roll back")
        for name, copies in self._copies.items():
            meta = self._expected[name]
            size = meta.dtype.itemsize
            for start, stop in gaps(self._received[name], meta.num_bytes):
                if any(True for copy in copies for _ in self._normal[copy].cut(start // size, -(-stop // size))):
                    raise incomplete(name, start, meta.num_bytes)
        self._is_open, self._spare_has_version = False, True
        try:
            self._flip()
        except Exception as error:
            raise WeightTransferError(f"SGLang's model does not take the weights ({error}); it has the old ones again") from error

    def _flip(self) -> None:
        """Let the spare serve, and compute what follows from it. All or nothing."""
        self._parameters.exchange()
        try:
            self._derive()
        except BaseException:
            self._parameters.exchange()
            self._derive()
            raise
        self._has_version, self._spare_has_version = self._spare_has_version, self._has_version

    @torch.no_grad()
    def _derive(self) -> None:
        if self._post_load is not None:
            self._post_load()

    def take_back(self) -> None:
        """Undo the last commit. No transaction may be open since, and `settle` not called."""
        self._flip()
        self._spare_has_version = False

    def settle(self) -> None:
        """The last commit is final: the version before it is forgotten where its memory is needed."""
        self._parameters.release()

    def rollback(self) -> None:
        """Forget the transaction, if there is one."""
        if self._is_open:
            self._is_open = False
            self._parameters.release()

    def digest(self) -> str | None:
        """32 hexadecimal digits: equal ones mean equal weights in this process, however they arrived. None before the first commit.

        Reads the weights once, in the order of the tensors. Where this process takes every tensor whole, the digest is that of
        `ModelWeights.digest`: equal for equal weights in the embedded engine too.
        """
        if not self._has_version:
            return None
        dtype = next(iter(self._expected.values())).dtype
        digest = blake2b(str(dtype).encode(), digest_size=16)
        for name, copies in self._copies.items():
            digest.update(name.encode() + b"\0")
            distinct = {self._normal[copy].source: copy for copy in reversed(copies)}
            if [(view.start, view.num_elements) for view in distinct] != [(0, torch.Size(self._expected[name].shape).numel())]:
                digest.update(repr(sorted(distinct)).encode())  # which part it is
            content = xxhash.xxh3_128()
            for _, copy in sorted(distinct.items()):
                content.update(self._content(copy))
            digest.update(content.digest())
        return digest.hexdigest()

    def _content(self, copy: TracedCopy) -> memoryview:
        """What arrived of a copy, in the order of its source."""
        flat, view = self._parameters.serving[copy.target], self._normal[copy].target
        tensor = torch.as_strided(flat, view.shape, view.stride, flat.storage_offset() + view.start)
        return _bytes_of(tensor.cpu().contiguous())


def _extents(region: Region) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in region)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _readable(bucket: memoryview) -> torch.Tensor:
    """A tensor of a bucket that is mapped to be read; torch knows none that must not be written, and warns."""
    if not len(bucket):
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore"):
        return torch.frombuffer(bucket, dtype=torch.uint8)
