"""A copy of the weights, and its way over the network to several nodes, one of which may fail anywhere."""

import multiprocessing
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import xxhash

from tandem.engine.rollout.broadcast import BroadcastError, Meeting, Sender, address_towards, receive
from tandem.engine.rollout.weight_copy import WeightCopy, chunks
from tandem.engine.types import BucketEntry, TensorMeta, WeightTransferError
from tests.rollout.models import buckets, metas


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"t{i}": torch.randn(1 + 37 * i, 11, generator=generator) for i in range(12)}


class Memory:
    """A `WeightSink` that keeps bytes, verifies checksums, and fails where it is told to."""

    def __init__(self, fails_in: str = "") -> None:
        self.fails_in, self.policy_version, self.prepared = fails_in, -1, -1
        self.received: dict[str, bytearray] = {}
        self.serving: dict[str, bytes] = {}
        self.num_rollbacks = 0

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        self.step("prepare")
        self.prepared, self.received = policy_version, {meta.name: bytearray(meta.num_bytes) for meta in tensors}

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        self.step("load")
        content = Path(shared_memory_path).read_bytes()
        for entry in entries:
            part = content[entry.bucket_start : entry.bucket_start + entry.num_bytes]
            if xxhash.xxh3_64_intdigest(part) != entry.checksum:
                raise WeightTransferError(f"tensor {entry.name}: checksum")
            self.received[entry.name][entry.tensor_start : entry.tensor_start + entry.num_bytes] = part

    def commit(self) -> None:
        self.step("commit")
        self.serving, self.policy_version = {name: bytes(data) for name, data in self.received.items()}, self.prepared

    def revert(self) -> None:
        raise AssertionError("a node is not part of the trainer's transaction")

    def settle(self) -> None:
        self.step("settle")

    def rollback(self) -> None:
        self.num_rollbacks += 1

    def step(self, name: str) -> None:
        if name == self.fails_in:
            raise WeightTransferError(f"no memory to {name}")


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return some_tensors()


@pytest.fixture
def copy(tensors: dict[str, torch.Tensor], tmp_path: Path) -> WeightCopy:
    copy = WeightCopy()
    fill(copy, tensors, 3, tmp_path)
    return copy


def fill(copy: WeightCopy, tensors: dict[str, torch.Tensor], version: int, folder: Path) -> None:
    copy.prepare(version, metas(tensors))
    for data, entries in buckets(tensors, 4096):
        (folder / "bucket").write_bytes(data + b"what follows in the slot")
        copy.load(str(folder / "bucket"), entries)
    copy.commit()


@pytest.mark.parametrize("seed", range(20))
def test_chunks_cover_every_entry_once_in_order_and_are_no_longer_than_asked(seed: int) -> None:
    generator, place = random.Random(seed), 0
    entries = list[BucketEntry]()
    for i in range(generator.randrange(30)):
        place += 256 * generator.randrange(1, 4)
        entries.append(BucketEntry(f"t{i}", 0, generator.randrange(0, 900), place, i))
        place += entries[-1].num_bytes
    limit = generator.choice([1, 500, 2000, 10**6])
    found = [(chunk, entry) for chunk in chunks(entries, limit) for entry in chunk.entries]
    assert [entry._replace(bucket_start=chunk.start + entry.bucket_start) for chunk, entry in found] == entries
    for chunk in chunks(entries, limit):
        assert chunk.stop - chunk.start <= limit or len(chunk.entries) == 1
        assert all(0 <= entry.bucket_start <= chunk.stop - chunk.start - entry.num_bytes for entry in chunk.entries)


def test_an_engine_filled_from_the_copy_has_what_was_sent(copy: WeightCopy, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    sink = Memory()
    copy.give_to(sink)
    assert (sink.serving, sink.policy_version) == (bytes_of(tensors), 3)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    fill(copy, changed, 4, tmp_path)
    copy.give_to(sink)
    assert (sink.serving, sink.policy_version) == (bytes_of(changed), 4)
    copy.prepare(5, metas(tensors))
    copy.rollback()
    assert copy.policy_version == -1
    copy.close()


def node(meeting: Meeting, rank: int, fails_in: str, answers: "multiprocessing.Queue[tuple[int, object, int]]") -> None:
    """A node in a process of its own. fails_in "killed": it ends as by kill -9 when the first bytes are there."""
    sink = Memory(fails_in)
    if fails_in == "killed":
        sink.load = lambda shared_memory_path, entries: os._exit(9)
    try:
        receive(sink, meeting, rank, 3, metas(some_tensors()))
        answers.put((rank, sink.serving == bytes_of(some_tensors()) and sink.policy_version == 3, sink.num_rollbacks))
    except (BroadcastError, WeightTransferError) as error:
        answers.put((rank, type(error).__name__, sink.num_rollbacks))
    answers.close()
    answers.join_thread()
    os._exit(0)


def broadcast(copy: WeightCopy, fails_in: dict[int, str], num_nodes: int = 3) -> tuple[dict[int, object], str]:
    """What each node says, and the leader."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    sender = Sender("127.0.0.1", num_nodes, timeout_s=60.0)
    nodes = [
        context.Process(target=node, args=(sender.meeting, rank, fails_in.get(rank, ""), answers), daemon=True)
        for rank in range(1, num_nodes + 1)
    ]
    for process in nodes:
        process.start()
    problem = ""
    try:
        sender.send(copy, lambda: False)
    except BroadcastError as error:
        problem = str(error)
    del sender
    expected = num_nodes - sum(how == "killed" for how in fails_in.values())
    said = {}
    for _ in range(expected):
        rank, answer, num_rollbacks = answers.get(timeout=90)
        said[rank] = answer
        assert num_rollbacks == (answer is not True)
    for process in nodes:
        process.join(60)
    return said, problem


def test_every_node_gets_every_byte(copy: WeightCopy) -> None:
    assert broadcast(copy, {}) == ({1: True, 2: True, 3: True}, "")


@pytest.mark.parametrize("step", ["prepare", "load", "killed"])
def test_a_node_that_fails_is_told_from_those_that_it_takes_along(copy: WeightCopy, step: str) -> None:
    said, problem = broadcast(copy, {2: step})
    blamed = {} if step == "killed" else {2: "WeightTransferError"}
    assert said == {1: said[1], 3: said[3], **blamed}
    # A small model may have been sent whole before the others see that one is gone.
    assert {said[1], said[3]} <= {True, "BroadcastError"}
    assert problem or {said[1], said[3]} == {True}
    left, problem = broadcast(copy, {}, num_nodes=2)
    assert (left, problem) == ({1: True, 2: True}, "")


def test_a_byte_that_changed_on_the_way_is_noticed_by_the_receiver(copy: WeightCopy) -> None:
    copy.content()[copy.entries[5].bucket_start] ^= 1
    said, _ = broadcast(copy, {}, num_nodes=1)
    assert said == {1: "WeightTransferError"}


def test_a_node_that_does_not_come_is_given_up_when_it_says_so_or_the_deadline_passes(copy: WeightCopy) -> None:
    sender = Sender("127.0.0.1", 1, timeout_s=60.0)
    with pytest.raises(BroadcastError, match="not all nodes came"):
        sender.send(copy, lambda: True)
    sender = Sender("127.0.0.1", 1, timeout_s=0.3)
    with pytest.raises(BroadcastError, match="not all nodes came"):
        sender.send(copy, lambda: False)


def test_the_address_towards_a_host_is_this_machine_s() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
