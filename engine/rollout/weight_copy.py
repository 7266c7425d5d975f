"""A leader's copy of the weights that its engines serve, in host memory without a name (rollout.elastic.enabled).

An engine that was replaced, or that joins, gets them from here while the others go on. Bytes keep the checksums that the trainer's ranks
gave them; whoever receives them verifies those.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem.engine.types import BucketEntry, TensorMeta, WeightSink

ALIGNMENT = 256  # bytes, of every bucket's start
CHUNK_BYTES = 64 << 20  # that an engine takes at a time


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [start, stop) of the copy. The entries' `bucket_start` counts from `start`."""

    start: int
    stop: int
    entries: tuple[BucketEntry, ...]


def chunks(entries: Sequence[BucketEntry], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Entries in the order of their place, in runs of at most `chunk_bytes`, or of one entry that is longer."""
    first = 0
    while first < len(entries):
        start = stop = entries[first].bucket_start
        last = first
        while last < len(entries) and (last == first or _end(entries[last]) - start <= chunk_bytes):
            stop = _end(entries[last])
            last += 1
        yield Chunk(start, stop, tuple(entry._replace(bucket_start=entry.bucket_start - start) for entry in entries[first:last]))
        first = last


def _end(entry: BucketEntry) -> int:
    return entry.bucket_start + entry.num_bytes


class WeightCopy:
    """One version. Meets `WeightSink`; a transaction overwrites it, so that it is of no use until `commit`."""

    def __init__(self) -> None:
        self.policy_version = -1
        self.tensors: tuple[TensorMeta, ...] = ()
        self.entries: list[BucketEntry] = []  # `bucket_start` counts from the beginning of the copy
        self._prepared = -1
        self._num_bytes = 0
        self._fd = os.memfd_create("tandem-weight-copy", os.MFD_CLOEXEC)

    @property
    def path(self) -> str:
        """Where processes of this user on this machine open it, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        """See `WeightSink.prepare`."""
        self.rollback()
        self._prepared, self.tensors = policy_version, tuple(tensors)

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        """See `WeightSink.load`; the engines verify, and this does not. Raises: OSError without memory for it."""
        base = self._num_bytes = -(-self._num_bytes // ALIGNMENT) * ALIGNMENT
        end = max((_end(entry) for entry in entries), default=0)
        bucket = os.open(shared_memory_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.lseek(self._fd, base, os.SEEK_SET)
            while self._num_bytes < base + end:
                num = os.sendfile(self._fd, bucket, self._num_bytes - base, base + end - self._num_bytes)
                if not num:
                    raise OSError(f"bucket {shared_memory_path} ends after {self._num_bytes - base} of {end} bytes")
                self._num_bytes += num
        finally:
            os.close(bucket)
        self.entries += [entry._replace(bucket_start=base + entry.bucket_start) for entry in entries]

    def commit(self) -> None:
        """See `WeightSink.commit`."""
        self.policy_version, self._prepared = self._prepared, -1

    def revert(self) -> None:
        """See `WeightSink.revert`, but for the version before, which was overwritten."""
        self.rollback()

    def settle(self) -> None:
        """See `WeightSink.settle`."""

    def rollback(self) -> None:
        """Forget everything: what was here is partly overwritten."""
        self.policy_version = self._prepared = -1
        self.entries, self._num_bytes = [], 0

    def give_to(self, sink: WeightSink) -> None:
        """A whole swap. Raises: what the sink raises."""
        sink.prepare(self.policy_version, self.tensors)
        # Counted from the beginning: the engine maps the copy once.
        for chunk in chunks(self.entries):
            sink.load(self.path, [entry._replace(bucket_start=chunk.start + entry.bucket_start) for entry in chunk.entries])
        sink.commit()
        sink.settle()

    def content(self) -> torch.Tensor:
        """The bytes: [n] uint8, shared with the copy."""
        return torch.from_numpy(np.frombuffer(mmap.mmap(self._fd, self._num_bytes), dtype=np.uint8))

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._fd)
