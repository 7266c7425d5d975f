"""Whole swaps into SGLang's side, in this process: one receiver for each tensor-parallel process, each with its part of the tensors."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tandem.engine import buckets
from tandem.engine.architecture import Architecture
from tandem.engine.buckets import BucketStream, PeerFailed, Region, SharedBuckets
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.config import SwapConfig
from tandem.engine.rollout.sglang_receiver import Receiver
from tandem.engine.types import BucketEntry, TensorMeta, WeightTransferError
from tests.checkpoint.test_names import DENSE, random_hf_state
from tests.checkpoint.test_swap import Source, group
from tests.ranks import run_ranks
from tests.rollout.sharded_model import ShardedModel, loaded

pytestmark = pytest.mark.distributed

CONFIG = DENSE | {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}


class Receivers:
    """Processes of one engine, as threads. Meets `ShardedWeightSink` and `DeviceWeightSink`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], tp: int, *, opens_device_memory: bool) -> None:
        self.models = [ShardedModel(tensors, index, tp) for index in range(tp)]
        architecture = Architecture.from_hf(CONFIG)
        self.receivers = [Receiver(model, architecture, torch.float32, index) for index, model in enumerate(self.models)]
        self.opens_device_memory = opens_device_memory
        self.policy_version = self._prepared = -1
        self._known: BucketStream | None = None
        self._num_commits = 0

    def wanted_regions(self) -> Sequence[Sequence[tuple[str, Region]] | None]:
        return [receiver.run("wanted", ()) for receiver in self.receivers]

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        raise AssertionError("these take over whole streams")

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        raise AssertionError("these take over whole streams")

    def receive(self, stream: BucketStream, policy_version: int, *, swap: int, first_ticket: int) -> "Receivers":
        told = None if stream is self._known else stream
        self._known, self._prepared = stream, policy_version
        self._errors: list[Exception] = []

        def take_over(receiver: Receiver) -> None:
            try:
                receiver.run("receive", (told, policy_version, swap, first_ticket))
            except Exception as error:
                self._errors.append(error)

        self._threads = [threading.Thread(target=take_over, args=(receiver,)) for receiver in self.receivers]
        for thread in self._threads:
            thread.start()
        return self

    def check(self) -> None: ...

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise min(self._errors, key=lambda error: isinstance(error, PeerFailed))

    def commit(self) -> None:
        self._num_commits += 1
        try:
            for receiver in self.receivers:
                receiver.run("commit", (self._num_commits,))
        except WeightTransferError:
            for receiver in self.receivers:
                receiver.run("revert", (self._num_commits,))
            raise
        self._previous, self.policy_version = self.policy_version, self._prepared

    def revert(self) -> None:
        for receiver in self.receivers:
            receiver.run("revert", (self._num_commits,))
        self.policy_version = self._previous

    def settle(self) -> None:
        for receiver in self.receivers:
            receiver.run("settle", ())

    def rollback(self) -> None:
        for receiver in self.receivers:
            receiver.run("rollback", ())

    def serve(self, tensors: dict[str, torch.Tensor]) -> bool:
        tp = len(self.models)
        return all(model.equals(loaded(tensors, index, tp)) for index, model in enumerate(self.models))


def swaps(tp: int, on_device: bool, route: Any) -> None:
    """Versions come and go; then one is damaged on its way, and the next is as it should be again."""
    rank = dist.get_rank()
    versions = [random_hf_state(dict(CONFIG), seed=seed) for seed in range(2)]
    source, sink = Source(CONFIG, (2, 1, 1, 1), rank), None
    if rank == 0:
        sink = Receivers(versions[0], tp, opens_device_memory=on_device)
    config = SwapConfig(bucket_bytes=4096, device_bucket_bytes=4096, timeout_s=60, route=route)
    swap = WeightSwap(source, sink, config, control_group=group())
    for number in range(3):
        source.set_version(number % 2)
        with swap.serving(number):
            assert sink is None or sink.serve(versions[number % 2])
    source.set_version(1)
    publish = SharedBuckets.publish

    def damage(self: SharedBuckets, rank: int, counter: int, value: int) -> None:
        if counter == buckets.CHECKSUMMED:
            for slot in self.slots:
                slot[1] ^= 1
        publish(self, rank, counter, value)

    SharedBuckets.publish = damage if rank == 1 else publish
    with pytest.raises(WeightTransferError, match=r"bucket \d+ of \d+, tensor \S+, bytes \d+:\d+: checksum"), swap.serving(3):
        raise AssertionError("the block must not be entered")
    SharedBuckets.publish = publish
    assert sink is None or sink.serve(versions[0])
    with swap.serving(4):
        assert sink is None or sink.serve(versions[1])
    if sink is not None and tp > 1:
        fail_in_one_process(sink)
    source.set_version(0)
    if tp > 1:
        with pytest.raises(WeightTransferError, match=r"commit"), swap.serving(5):
            raise AssertionError("the block must not be entered")
        assert sink is None or sink.serve(versions[1]), "both processes have the old version again"
    with swap.serving(6):
        assert sink is None or sink.serve(versions[0])
    swap.close()


def fail_in_one_process(sink: Receivers) -> None:
    """The last process cannot commit the next version; the first has done so by then."""
    last = sink.receivers[-1]
    run = last.run

    def failing(command: str, arguments: Sequence[Any]) -> Any:
        if command == "commit":
            last.run = run
            run("rollback", ())
        return run(command, arguments)

    last.run = failing


@pytest.mark.parametrize(("tp", "on_device", "route"), [(1, False, "host_memory"), (2, False, "auto"), (2, True, "shard_to_shard")])
def test_every_process_takes_its_part_and_all_have_one_version(tp: int, on_device: bool, route: str) -> None:
    run_ranks(swaps, 2, tp, on_device, route)
