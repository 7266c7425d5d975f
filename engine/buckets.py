"""Buckets in memory that processes of one node share, and the counters by which they take turns.

The checkpoint engine's ranks write them and a rollout engine's processes read them, so this lies beneath both. No message is
sent per bucket: that took longer than copying one.

Counters, and buckets in host memory, are anonymous (memfd): no file system holds a name for them, so they are gone with the last process
that has them open, however that process ends. Other processes of the same user open them as /proc/PID/fd/FD. Buckets may lie in the
memory of a GPU instead (device_buckets.py).
"""

import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import xxhash

from tandem.engine.device_buckets import DeviceHandle, DeviceSlots
from tandem.engine.types import TensorMeta, WeightSink

Region = tuple[tuple[int, int], ...]  # (start, stop) of every dimension of a tensor

NUM_SLOTS = 3  # one is written, one is read, and one is ready, so that neither side waits for the other's every bucket
MAX_PROCESSES = 32  # of one engine
_LINE = 40  # int64 per rank: whole cache lines, so that ranks do not slow each other down
_YIELDS = 20  # turns of a wait that only yield the core; more would keep it from those that are waited for
_SLEEP_S = 20e-6

# Counters of a rank, in its cache lines. LOADED + p is that of process p of the engine which the rank leads.
WRITTEN, CHECKSUMMED, FAILED, LOADED = range(4)


class PeerLost(RuntimeError):
    """A process of this node died."""


class PeerFailed(RuntimeError):
    """Another rank failed; it is the one to say why."""


@dataclass(frozen=True, slots=True)
class SharedMemoryHandle:
    """What another process of the node needs to open the memory.

    With `kernel_checksums`, entries are checksummed by kernels/checksum, and otherwise by xxh3-64.
    """

    pid: int
    control: int
    slots: tuple[int, ...]  # file descriptors in process `pid`; () where the buckets lie in a GPU's memory
    device_slots: tuple[DeviceHandle, ...] = ()
    kernel_checksums: bool = False


class BucketSlice(NamedTuple):
    """Bytes [tensor_start, tensor_start + num_bytes) of a tensor, lying at bucket_start in a bucket.

    Where a stream brings only parts of the tensors, `region` are the elements, in coordinates of the whole tensor. They lie side by side
    in the bucket, and are no run of bytes of the tensor when columns are cut; `tensor_start` is then the first one's byte.
    """

    name: str
    tensor_start: int
    num_bytes: int
    bucket_start: int
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class BucketStream:
    """What a rollout engine is told once, and takes over every swap with: where the buckets are and what lies in them.

    Buckets of a swap have tickets, which rise over all swaps: `first_ticket`, `first_ticket + 1`, …. Bucket n may be read once the
    CHECKSUMMED counter of all `ranks` has reached its ticket, and its slot is given back by the counter LOADED + `process` of `leader`.

    Every process of an engine of several takes over a stream of its own, `of_process`. They may be the same buckets, in which each finds
    what it wants, or those of different GPUs.
    """

    tensors: tuple[TensorMeta, ...]
    buckets: tuple[tuple[BucketSlice, ...], ...]
    ranks: tuple[int, ...]
    pids: Mapping[int, int]
    bucket_bytes: int
    handle: SharedMemoryHandle
    leader: int  # the rank in whose line the engine's counters are
    timeout_s: float  # of every wait for a bucket
    process: int = 0
    following: "tuple[BucketStream, ...]" = ()  # those of the engine's processes 1, 2, …

    def of_process(self, index: int) -> "BucketStream":
        """The stream of one process of the engine."""
        return self.following[index - 1] if index else self

    @property
    def max_entries(self) -> int:
        return max(map(len, self.buckets), default=1)


class PendingTransfer(Protocol):
    """The buckets of one swap, which an engine is taking over."""

    def check(self) -> None:
        """Asked while waiting; costs next to nothing.

        Raises: EngineDiedError if the engine's process is gone; PeerFailed if the engine refused, and `wait` says why.
        """
        ...

    def wait(self) -> None:
        """Return once every checksum held. Raises: WeightTransferError naming bucket and tensor; PeerFailed if a rank failed."""
        ...


@runtime_checkable
class StreamingWeightSink(WeightSink, Protocol):
    """A sink that watches the buckets' counters itself."""

    def receive(self, stream: BucketStream, policy_version: int, *, swap: int, first_ticket: int) -> PendingTransfer:
        """Begin a transaction and take over all its buckets as they are written. `swap` is what FAILED is set to if it fails."""
        ...


@runtime_checkable
class ShardedWeightSink(StreamingWeightSink, Protocol):
    """A sink whose engine has processes that want only parts of the tensors."""

    def wanted_regions(self) -> Sequence[Sequence[tuple[str, Region]] | None]:
        """Of each process of the engine, what it wants, with repetitions or not; None: everything. Asked once, before the first swap."""
        ...


@runtime_checkable
class DeviceWeightSink(StreamingWeightSink, Protocol):
    """A sink whose processes take buckets from the memory of the parameters' device: process p shares that of rank leader + p."""

    opens_device_memory: bool


class SharedBuckets:
    """A place's buckets, checksums and counters.

    Args:
        ranks: those that write the buckets or lead an engine that reads them, the same list for each process.
        pids: process ids of ranks whose end is to be noticed, of `ranks` at least.
        bucket_bytes: size of each slot.
        max_entries: most entries of a bucket.
        handle: opened from the process that created it; None creates it.
        device: whose memory the slots are in, and whose kernels make the checksums; None: host memory. Used to create.
    Raises: OSError or RuntimeError if the memory cannot be created or opened.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        pids: Mapping[int, int],
        bucket_bytes: int,
        max_entries: int,
        handle: SharedMemoryHandle | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self._index = {rank: index for index, rank in enumerate(ranks)}
        counter_bytes = len(ranks) * _LINE * 8
        control_bytes = counter_bytes + NUM_SLOTS * max_entries * 8
        self._device_slots: DeviceSlots | None = None
        if handle is None:
            num_files = 1 if device is not None and device.type == "cuda" else 1 + NUM_SLOTS
            self._fds = [os.memfd_create("tandem-swap", os.MFD_CLOEXEC) for _ in range(num_files)]
            for fd, size in zip(self._fds, [control_bytes, *[bucket_bytes] * NUM_SLOTS], strict=False):
                os.ftruncate(fd, size)
            self.has_kernel_checksums = device is not None
            if device is not None and device.type == "cuda":
                self._device_slots = DeviceSlots.create(device, bucket_bytes, NUM_SLOTS)
        else:
            self._fds = [os.open(f"/proc/{handle.pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC) for fd in (handle.control, *handle.slots)]
            self.has_kernel_checksums = handle.kernel_checksums
            if handle.device_slots:
                self._device_slots = DeviceSlots.open(handle.device_slots)
        control = np.frombuffer(mmap.mmap(self._fds[0], control_bytes), dtype=np.int64)
        self._counters = control[: counter_bytes // 8].reshape(len(ranks), _LINE)
        self.checksums = control[counter_bytes // 8 :].view(np.uint64).reshape(NUM_SLOTS, max_entries)
        self.memories: list[memoryview] = []  # of slots in host memory
        if self._device_slots is not None:
            self.slots = self._device_slots.tensors
        else:
            self.slots = [torch.frombuffer(mmap.mmap(fd, bucket_bytes), dtype=torch.uint8) for fd in self._fds[1:]]
            self.memories = [slot.numpy().data for slot in self.slots]
        # A pidfd becomes readable when its process ends, also as a zombie.
        self._peers = {os.pidfd_open(pid): rank for rank, pid in pids.items() if pid != os.getpid()}
        self._poll, self._poll_lock = select.poll(), threading.Lock()
        for pidfd in self._peers:
            self._poll.register(pidfd, select.POLLIN)

    @property
    def handle(self) -> SharedMemoryHandle:
        device_slots = () if self._device_slots is None else self._device_slots.handles
        return SharedMemoryHandle(os.getpid(), self._fds[0], tuple(self._fds[1:]), device_slots, self.has_kernel_checksums)

    def path(self, slot: int) -> str:
        """Where another process of this user opens the slot, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fds[1 + slot]}"

    def checksum(self, slot: int, start: int, num_bytes: int) -> int:
        """xxh3-64 of bytes of a slot."""
        return xxhash.xxh3_64_intdigest(self.memories[slot][start : start + num_bytes])

    def publish(self, rank: int, counter: int, value: int) -> None:
        """Let the others see `value`, and everything that was written to the slots before."""
        _fence()
        self._counters[self._index[rank], counter] = value

    def fail(self, swap: int) -> None:
        """Let all that wait here see that the swap failed. Whoever writes it writes the same, so any line will do."""
        _fence()
        self._counters[0, FAILED] = swap

    def progress(self, rank: int, counter: int) -> int:
        """The value that `rank` published last."""
        return int(self._counters[self._index[rank], counter])

    def wait(
        self,
        ranks: Collection[int],
        counter: int,
        value: int,
        *,
        swap: int,
        timeout_s: float,
        waited_for: str,
        check_also: Callable[[], None] | None = None,
    ) -> None:
        """Wait until the counter of each of `ranks` has reached `value`; `check_also` is called now and then, and may raise.

        Raises: PeerFailed if a rank of the node marked `swap` as failed, PeerLost if one died, TimeoutError after `timeout_s`.
        """
        rows = [self._index[rank] for rank in ranks]
        column, failed = self._counters[:, counter], self._counters[:, FAILED]

        def ready() -> bool:
            return all(column[row] >= value for row in rows)

        def check() -> None:
            if (failed == swap).any():
                raise PeerFailed
            self.check_peers()
            if check_also is not None:
                check_also()

        def expired() -> str:
            late = [rank for rank in ranks if column[self._index[rank]] < value]
            return f"waited {timeout_s:g} s for rank {', '.join(map(str, late))} to {waited_for}"

        _wait(ready, check, expired, timeout_s)
        _fence()

    def check_peers(self) -> None:
        """Raises: PeerLost naming the ranks of this node whose processes ended."""
        with self._poll_lock:
            lost = sorted(self._peers[pidfd] for pidfd, _ in self._poll.poll(0))
        if lost:
            raise PeerLost(f"the process of rank {', '.join(map(str, lost))} ended")

    def close(self) -> None:
        """Close the files; the memory goes with the last mapping."""
        for fd in (*self._fds, *self._peers):
            os.close(fd)
        self._fds, self._peers, self._poll = [], {}, select.poll()


def _wait(ready: Callable[[], bool], check: Callable[[], None], expired: Callable[[], str], timeout_s: float) -> None:
    """Poll: yield the core at first, then sleep; look for failures before every sleep."""
    for _ in range(_YIELDS):
        if ready():
            return
        os.sched_yield()
    deadline = time.monotonic() + timeout_s
    while not ready():
        check()
        if time.monotonic() > deadline:
            raise TimeoutError(expired())
        time.sleep(_SLEEP_S)


_FENCE_LOCK = threading.Lock()


def _fence() -> None:
    """Order memory accesses before and after. One lock cycle lets both sides move into it; of two, neither side passes."""
    with _FENCE_LOCK:
        pass
    with _FENCE_LOCK:
        pass
