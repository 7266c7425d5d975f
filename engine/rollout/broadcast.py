"""Weights over the network: a leader sends its copy (weight_copy.py) to the rollout-only nodes that it has, all at once.

A group of its own for each time, rank 0 the leader, over TCP (gloo): what is sent lies in host memory, on a GPU's machine too, where the
GPU belongs to the rollout engine at this moment. When a node fails, or leaves the group, everybody's broadcast fails within moments.
"""

import contextlib
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from tandem.engine.rollout.weight_copy import WeightCopy, chunks
from tandem.engine.types import BucketEntry, TensorMeta, WeightSink

_POLL_S = 0.005
_ERROR_CHARS = 300


class BroadcastError(Exception):
    """The group is broken: some member of it is gone. Nothing is wrong with the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where a group comes together."""

    host: str  # the leader's, as the nodes reach it
    port: int
    num_ranks: int
    timeout_s: float


class Sender:
    """The leader's side. `meeting` tells the nodes where to come; each is told its own rank, from 1 on."""

    def __init__(self, host: str, num_nodes: int, timeout_s: float) -> None:
        self._store = TCPStore(host, 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)
        self.meeting = Meeting(host=host, port=self._store.port, num_ranks=1 + num_nodes, timeout_s=timeout_s)

    def send(self, copy: WeightCopy, is_hopeless: Callable[[], bool]) -> None:
        """Send everything. Raises: BroadcastError.

        Args:
            is_hopeless: asked while nodes are awaited; True when one of them has said that it will not come.
        """
        deadline = time.monotonic() + self.meeting.timeout_s
        here = [_here(rank) for rank in range(1, self.meeting.num_ranks)]
        while not self._store.check(here):
            if is_hopeless() or time.monotonic() > deadline:
                raise BroadcastError("not all nodes came to the broadcast")
            time.sleep(_POLL_S)
        number = {meta.name: index for index, meta in enumerate(copy.tensors)}
        checksums = np.array([entry.checksum for entry in copy.entries], dtype=np.uint64).view(np.int64)
        rows = [(number[e.name], e.tensor_start, e.num_bytes, e.bucket_start) for e in copy.entries]
        table = torch.from_numpy(np.column_stack([np.array(rows, dtype=np.int64).reshape(-1, 4), checksums]))
        group = _Group(self._store, 0, self.meeting)
        group.broadcast(torch.tensor([len(table)]))
        group.broadcast(table)
        content = copy.content()
        for chunk in chunks(copy.entries):
            group.broadcast(content[chunk.start : chunk.stop])


def receive(sink: WeightSink, meeting: Meeting, rank: int, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
    """A node's side: everything into the engine, verified there, and committed; or nothing.

    Raises: BroadcastError; what the engine raises. The engine has its old weights then.
    """
    descriptor = os.memfd_create("tandem-broadcast", os.MFD_CLOEXEC)
    try:
        with _errors("the leader's store does not answer"):
            store = TCPStore(meeting.host, meeting.port, None, False, timedelta(seconds=meeting.timeout_s), wait_for_workers=False)
            store.set(_here(rank), "here")
        group = _Group(store, rank, meeting)
        sink.prepare(policy_version, tensors)
        count = group.broadcast(torch.zeros(1, dtype=torch.int64))
        table = group.broadcast(torch.zeros(int(count), 5, dtype=torch.int64))
        checksums = table[:, 4].numpy().view(np.uint64).tolist()
        places = [(tensors[t].name, start, num, place) for t, start, num, place, _ in table.tolist()]
        entries = [BucketEntry(*place, checksum=checksum) for place, checksum in zip(places, checksums, strict=True)]
        room = max((chunk.stop - chunk.start for chunk in chunks(entries)), default=0)
        os.ftruncate(descriptor, max(1, room))
        content = torch.from_numpy(np.frombuffer(mmap.mmap(descriptor, max(1, room)), dtype=np.uint8))
        for chunk in chunks(entries):
            group.broadcast(content[: chunk.stop - chunk.start])
            sink.load(f"/proc/{os.getpid()}/fd/{descriptor}", chunk.entries)
        sink.commit()
        sink.settle()
    except Exception:
        sink.rollback()
        raise
    finally:
        os.close(descriptor)


class _Group:
    """A process group of torch.distributed that the default group knows nothing of. Closed with the object."""

    def __init__(self, store: TCPStore, rank: int, meeting: Meeting) -> None:
        options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._timeout = timedelta(seconds=meeting.timeout_s)
        options._devices = [ProcessGroupGloo.create_device(hostname=address_towards(meeting.host))]
        with _errors("the group did not come together"):
            self._group = ProcessGroupGloo(PrefixStore("group", store), rank, meeting.num_ranks, options)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """From rank 0, in place. Raises: BroadcastError."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with _errors("a member of the group is gone, or too slow"):
            self._group.broadcast([tensor], options).wait()  # pyright: ignore[reportAttributeAccessIssue]
        return tensor


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's are
        raise BroadcastError(f"{what}: {str(error).partition('Exception raised')[0].strip()[:_ERROR_CHARS]}") from error


def _here(rank: int) -> str:
    return f"here/{rank}"


def address_towards(host: str) -> str:
    """This machine's address, as `host` sees it; sends nothing. Raises: OSError if there is no way there."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
