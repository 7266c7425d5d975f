"""An honest engine of several processes for tests of the swap: threads here, each with counters and memory of its own."""

import threading
from collections.abc import Callable, Sequence

import torch
import xxhash

from tandem.engine.buckets import CHECKSUMMED, LOADED, NUM_SLOTS, BucketStream, PeerFailed, Region, SharedBuckets
from tandem.engine.types import BucketEntry, TensorMeta, WeightTransferError
from tandem.kernels.checksum import Checksums

Parts = dict[tuple[str, Region], torch.Tensor]


class ShardedSink:
    """Keeps of every tensor what its processes want. Meets `ShardedWeightSink` and `DeviceWeightSink`.

    Args:
        wanted: of each process; None: everything.
        opens_device_memory: take buckets from the parameters' device, which is the CPU in tests.
    """

    def __init__(self, wanted: Sequence[Sequence[tuple[str, Region]] | None], *, opens_device_memory: bool = False) -> None:
        self._wanted = wanted
        self.opens_device_memory = opens_device_memory
        self.policy_version = -1
        self.parts: list[Parts] = []  # of each process, committed
        self.num_bytes = 0  # that the last transaction brought
        self.fault: Callable[[str, torch.Tensor | None], None] = lambda step, slot: None  # called at each step, and may raise
        self._open: dict[int, tuple[BucketStream, SharedBuckets]] = {}
        self._next: tuple[int, list[Parts]] | None = None
        self._before: tuple[int, list[Parts]] = -1, []

    def wanted_regions(self) -> Sequence[Sequence[tuple[str, Region]] | None]:
        return self._wanted

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        raise AssertionError("this sink takes over whole streams")

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        raise AssertionError("this sink takes over whole streams")

    def receive(self, stream: BucketStream, policy_version: int, *, swap: int, first_ticket: int) -> "Receiving":
        self.fault("receive", None)
        self._next = policy_version, [{} for _ in self._wanted]
        self.num_bytes = 0
        return Receiving(self, stream, swap, first_ticket)

    def take_over(self, stream: BucketStream, swap: int, first_ticket: int) -> None:
        """All buckets of one process."""
        known, shared = self._open.get(stream.process, (None, None))
        if known is not stream or shared is None:
            shared = SharedBuckets(stream.ranks, stream.pids, stream.bucket_bytes, stream.max_entries, stream.handle)
            self._open[stream.process] = stream, shared
        assert self._next is not None
        targets = self._targets(stream)
        self._next[1][stream.process] = targets
        filled = {key: torch.zeros(tensor.shape, dtype=torch.int) for key, tensor in targets.items()}
        metas = {meta.name: meta for meta in stream.tensors}
        try:
            for number, bucket in enumerate(stream.buckets):
                ticket = first_ticket + number
                shared.wait(stream.ranks, CHECKSUMMED, ticket, swap=swap, timeout_s=stream.timeout_s, waited_for=f"write bucket {number}")
                slot = shared.slots[number % NUM_SLOTS]
                self.fault("load", slot)
                sent = shared.checksums[number % NUM_SLOTS, : len(bucket)].tolist()
                if shared.has_kernel_checksums:
                    found = Checksums([(part.bucket_start, part.num_bytes) for part in bucket], slot.device).numbers(slot).tolist()
                else:
                    memory = shared.memories[number % NUM_SLOTS]
                    found = [xxhash.xxh3_64_intdigest(memory[part.bucket_start : part.bucket_start + part.num_bytes]) for part in bucket]
                for part, expected, arrived in zip(bucket, sent, found, strict=True):
                    if expected != arrived:
                        raise WeightTransferError(f"bucket {number}, tensor {part.name}: checksum differs")
                    self.num_bytes += part.num_bytes
                    meta = metas[part.name]
                    data = slot[part.bucket_start : part.bucket_start + part.num_bytes].clone().view(meta.dtype)
                    region = part.region or _rows(meta, part.tensor_start, part.num_bytes)
                    values = data.view([stop - start for start, stop in region])
                    for (name, wanted), target in targets.items():
                        if name == part.name:
                            _copy_common(values, region, target, filled[name, wanted], wanted)
                shared.publish(stream.leader, LOADED + stream.process, ticket)
            for (name, wanted), count in filled.items():
                if not (count == 1).all():
                    raise WeightTransferError(f"tensor {name}, {wanted}: elements came {count.min()} to {count.max()} times")
        except PeerFailed:
            raise
        except Exception:
            shared.fail(swap)
            raise

    def _targets(self, stream: BucketStream) -> Parts:
        wanted = self._wanted[stream.process]
        everything = [(meta.name, tuple((0, extent) for extent in meta.shape)) for meta in stream.tensors]
        dtypes = {meta.name: meta.dtype for meta in stream.tensors}
        return {
            (name, region): torch.zeros([stop - start for start, stop in region], dtype=dtypes[name])
            for name, region in (everything if wanted is None else wanted)
        }

    def commit(self) -> None:
        self.fault("commit", None)
        assert self._next is not None
        self._before = self.policy_version, self.parts
        self.policy_version, self.parts = self._next
        self._next = None

    def revert(self) -> None:
        self.policy_version, self.parts = self._before

    def settle(self) -> None:
        self._before = -1, []

    def rollback(self) -> None:
        self._next = None


class Receiving:
    """Meets `PendingTransfer`."""

    def __init__(self, sink: ShardedSink, stream: BucketStream, swap: int, first_ticket: int) -> None:
        self._errors: list[Exception] = []
        streams = [stream.of_process(process) for process in range(1 + len(stream.following))]
        self._threads = [threading.Thread(target=self._run, args=(sink, each, swap, first_ticket), daemon=True) for each in streams]
        for thread in self._threads:
            thread.start()

    def _run(self, sink: ShardedSink, stream: BucketStream, swap: int, first_ticket: int) -> None:
        try:
            sink.take_over(stream, swap, first_ticket)
        except Exception as error:
            self._errors.append(error)

    def check(self) -> None: ...

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()
        for error in sorted(self._errors, key=lambda error: isinstance(error, PeerFailed)):
            raise error


def _rows(meta: TensorMeta, start: int, num_bytes: int) -> Region:
    """The rows that a run of bytes of a whole tensor is."""
    row_bytes = meta.num_bytes // meta.shape[0]
    return ((start // row_bytes, (start + num_bytes) // row_bytes), *((0, extent) for extent in meta.shape[1:]))


def _copy_common(values: torch.Tensor, region: Region, target: torch.Tensor, count: torch.Tensor, wanted: Region) -> None:
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, wanted, strict=True)]
    if any(start >= stop for start, stop in common):
        return
    there = tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(common, wanted, strict=True))
    here = tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(common, region, strict=True))
    target[there] = values[here]
    count[there] += 1
