"""The engine's side of a swap: versions of the weights arrive in transactions, each byte verified, and are exchanged at `commit`."""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import xxhash

from tandem.engine.architecture import Architecture
from tandem.engine.buckets import (
    CHECKSUMMED,
    LOADED,
    NUM_SLOTS,
    BucketStream,
    PeerFailed,
    SharedBuckets,
)
from tandem.engine.rollout.weights import ModelWeights, tensor_metas
from tandem.engine.types import BucketEntry, TensorMeta, WeightTransferError

_MAX_MAPPINGS = 16  # of buckets; a sender has a few, and a restarted one brings new files


class OpenStream:
    """A stream with its memory mapped."""

    def __init__(self, stream: BucketStream) -> None:
        self.stream = stream
        self.shared = SharedBuckets(stream.ranks, stream.pids, stream.bucket_bytes, stream.max_entries, stream.handle)

    @contextmanager
    def telling(self, swap: int) -> Iterator[None]:
        """A block whose failure the ranks see at once: they wait for buckets to be taken, not for an answer."""
        try:
            yield
        except PeerFailed:
            raise
        except Exception:
            self.shared.fail(swap)
            raise

    def take_over(self, load: Callable[[int, list[int]], tuple[int, str] | None], swap: int, first_ticket: int) -> None:
        """Let `load(number, checksums)` copy and verify every bucket as it comes. Where that fails, the ranks see it at once.

        `load` returns the index of an entry and what is wrong with it, None if nothing.
        Raises: WeightTransferError naming bucket and tensor; PeerFailed if a rank, or another process of the engine, failed.
        """
        with self.telling(swap):
            self._take_over(load, swap, first_ticket)

    def _take_over(self, load: Callable[[int, list[int]], tuple[int, str] | None], swap: int, first_ticket: int) -> None:
        stream, shared, where = self.stream, self.shared, ""
        try:
            for number, bucket in enumerate(stream.buckets):
                where = f"bucket {number} of {len(stream.buckets)}"
                waited_for = f"write bucket {number}"
                ticket, slot = first_ticket + number, number % NUM_SLOTS
                shared.wait(stream.ranks, CHECKSUMMED, ticket, swap=swap, timeout_s=stream.timeout_s, waited_for=waited_for)
                wrong = load(number, shared.checksums[slot, : len(bucket)].tolist())
                if wrong is not None:
                    part = bucket[wrong[0]]
                    where = f"{where}, tensor {part.name}, bytes {part.tensor_start}:{part.tensor_start + part.num_bytes}"
                    raise WeightTransferError(wrong[1])
                shared.publish(stream.leader, LOADED + stream.process, ticket)
        except PeerFailed:
            raise
        except Exception as error:
            raise WeightTransferError(f"{where}: {error}") from error

    def close(self) -> None:
        self.shared.close()


class WeightStore:
    """Receives versions in transactions (the child's side of `WeightSink`).

    `commit` exchanges the serving and the receiving copy: nothing is allocated after the second swap.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self._expected = tensor_metas(architecture, dtype)
        self.serving: ModelWeights | None = None
        self._spare: ModelWeights | None = None
        self._receiving: ModelWeights | None = None
        self._received: dict[str, list[tuple[int, int]]] = {}  # name: byte ranges [start, end), neighbours joined
        self._failed = False
        self._mappings = Mappings()
        self._stream: OpenStream | None = None

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        """Begin a transaction. Raises: WeightTransferError naming the tensor that is not the model's."""
        check_tensors(self._expected, tensors)
        self._begin(policy_version)

    def _begin(self, policy_version: int) -> ModelWeights:
        self.rollback()
        self._receiving = self._spare or ModelWeights(self.architecture, self.dtype, other=self.serving)
        self._spare = None
        self._receiving.policy_version = policy_version
        self._received = {name: [] for name in self._receiving.named}
        self._failed = False
        return self._receiving

    def receive(self, stream: BucketStream | None, policy_version: int, swap: int, first_ticket: int) -> None:
        """A whole transaction but for its `commit`: see `StreamingWeightSink.receive`. `stream` None: the one before.

        Raises: WeightTransferError naming bucket and tensor; PeerFailed if a rank failed; TimeoutError; PeerLost.
        """
        if stream is not None:
            if self._stream is not None:
                self._stream.close()
                self._stream = None
            self._stream = OpenStream(stream)
        assert self._stream is not None, "the first swap brings the stream"
        opened = self._stream
        with opened.telling(swap):
            if stream is not None:
                check_tensors(self._expected, stream.tensors)
            receiving = self._begin(policy_version)
        self._failed = True  # until every checksum held

        def load(number: int, checksums: list[int]) -> tuple[int, str] | None:
            # Slices are made again for every swap: kept ones would take a KiB for every entry and copy of the weights.
            slot = opened.shared.memories[number % NUM_SLOTS]
            for index, (part, checksum) in enumerate(zip(opened.stream.buckets[number], checksums, strict=True)):
                end = part.tensor_start + part.num_bytes
                source = slot[part.bucket_start : part.bucket_start + part.num_bytes]
                wrong = _move(receiving.bytes[part.name][part.tensor_start : end], source, checksum)
                if wrong:
                    return index, wrong
                note_received(self._received[part.name], part.tensor_start, end)
            return None

        opened.take_over(load, swap, first_ticket)
        self._failed = False

    def load(self, path: str, entries: Sequence[BucketEntry]) -> None:
        """Copy one bucket straight into place and verify what arrived, entry by entry while it is in the cache."""
        if self._receiving is None:
            raise WeightTransferError(f"bucket {path} came outside a transaction; call prepare first")
        self._failed = True
        try:
            bucket = self._mappings.open(path)
        except OSError as error:
            raise WeightTransferError(f"bucket {path} cannot be opened: {error}") from error
        for entry in entries:
            self._load_entry(path, bucket, self._receiving, entry)
        self._failed = False

    def _load_entry(self, path: str, bucket: memoryview, receiving: ModelWeights, entry: BucketEntry) -> None:
        tensor = receiving.bytes.get(entry.name)
        source = source_of(path, bucket, entry, None if tensor is None else tensor.nbytes)
        if tensor is None or not source:
            return
        end = entry.tensor_start + entry.num_bytes
        wrong = _move(tensor[entry.tensor_start : end], source, entry.checksum)
        if wrong:
            raise WeightTransferError(f"bucket {path}: tensor {entry.name}, bytes {entry.tensor_start}:{end}: {wrong}")
        note_received(self._received[entry.name], entry.tensor_start, end)

    def commit(self) -> int:
        """Flip. Returns the new policy version. Raises: WeightTransferError naming the first incomplete tensor."""
        if self._receiving is None:
            raise WeightTransferError("commit outside a transaction; call prepare first")
        if self._failed:
            raise WeightTransferError("commit after a bucket that failed; roll back")
        for name, tensor in self._receiving.named.items():
            for start, _ in gaps(self._received[name], tensor.nbytes):
                raise incomplete(name, start, tensor.nbytes)
        self._receiving.finish()
        self._spare, self.serving, self._receiving = self.serving, self._receiving, None
        return self.serving.policy_version

    def take_back(self) -> None:
        """Undo the last commit: what served before it serves again (nothing, before the second). No transaction may be open since."""
        self.serving, self._spare = self._spare, self.serving
        if self.serving is not None:
            self.serving.finish()

    def rollback(self) -> None:
        """Forget the transaction, if there is one."""
        if self._receiving is not None:
            self._spare, self._receiving = self._receiving, None


def _move(target: memoryview, source: memoryview, checksum: int) -> str:
    """Copy, and verify what arrived."""
    target[:] = source  # libc's copy: half the time of torch's and of preadv
    return difference(target, checksum)


def difference(memory: memoryview, checksum: int) -> str:
    """What is wrong with what arrived ("" if nothing)."""
    arrived = xxhash.xxh3_64_intdigest(memory)
    return "" if arrived == checksum else unequal(arrived, checksum)


def unequal(arrived: int, sent: int) -> str:
    return f"checksum {arrived:016x} arrived, {sent:016x} was sent"


def source_of(path: str, bucket: memoryview, entry: BucketEntry, tensor_bytes: int | None) -> memoryview:
    """The bytes of an entry. Raises: WeightTransferError if it does not lie in the bucket, or not in its tensor (None: there is none)."""
    end = entry.tensor_start + entry.num_bytes
    if tensor_bytes is None:
        raise WeightTransferError(f"bucket {path}: tensor {entry.name} is not one of the model")
    if entry.tensor_start < 0 or end > tensor_bytes:
        raise WeightTransferError(f"bucket {path}: bytes {entry.tensor_start}:{end} of tensor {entry.name}, which has {tensor_bytes}")
    source = bucket[entry.bucket_start : entry.bucket_start + entry.num_bytes]
    if len(source) < entry.num_bytes:
        raise WeightTransferError(f"bucket {path} ends within tensor {entry.name}: {len(source)} of {entry.num_bytes} bytes")
    return source


def note_received(received: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a byte range; one that follows the last is joined to it."""
    if received and received[-1][1] == start:
        start = received.pop()[0]
    received.append((start, end))


def gaps(received: Sequence[tuple[int, int]], num_bytes: int) -> Iterator[tuple[int, int]]:
    """The byte ranges of [0, num_bytes) that no received one covers."""
    covered = 0
    for start, end in sorted(received):
        if start > covered:
            yield covered, start
        covered = max(covered, end)
    if covered < num_bytes:
        yield covered, num_bytes


def incomplete(name: str, byte: int, num_bytes: int) -> WeightTransferError:
    return WeightTransferError(f"tensor {name} is incomplete: byte {byte} of {num_bytes} never came")


class Mappings:
    """Buckets stay mapped between loads: filling page tables takes longer than copying."""

    def __init__(self) -> None:
        self._mapped: dict[str, tuple[tuple[int, ...], memoryview]] = {}

    def open(self, path: str) -> memoryview:
        """The file's present content. Raises: OSError if it cannot be opened."""
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino, status.st_size)
        known, memory = self._mapped.get(path, (None, memoryview(b"")))
        if known != identity:
            memory = self._map(path)
            self._mapped.pop(path, None)
            if len(self._mapped) == _MAX_MAPPINGS:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[path] = identity, memory
        return memory

    def _map(self, path: str) -> memoryview:
        file = os.open(path, os.O_RDONLY)
        try:
            if not (size := os.fstat(file).st_size):
                return memoryview(b"")
            return memoryview(mmap.mmap(file, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ))
        finally:
            os.close(file)


def check_tensors(expected: dict[str, TensorMeta], tensors: Sequence[TensorMeta]) -> None:
    got = {tensor.name for tensor in tensors}
    missing = [name for name in expected if name not in got]
    if missing:
        raise WeightTransferError(f"{len(missing)} tensors of the model are missing, the first is {missing[0]}")
    for tensor in tensors:
        wanted = expected.get(tensor.name)
        if wanted is None:
            raise WeightTransferError(f"tensor {tensor.name} is not one of the model")
        if tuple(tensor.shape) != wanted.shape:
            raise WeightTransferError(f"tensor {tensor.name} has shape {list(tensor.shape)}; the model has {list(wanted.shape)}")
        if tensor.dtype != wanted.dtype:
            raise WeightTransferError(f"tensor {tensor.name} is {tensor.dtype}; the model is {wanted.dtype}")
