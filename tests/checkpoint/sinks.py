"""An honest receiving side for tests of the swap: memory of its own, every checksum verified, in this process or a forked one."""

import mmap
import os
from collections.abc import Callable, Sequence
from multiprocessing import get_context

import torch
import xxhash

from tandem.engine.types import BucketEntry, TensorMeta, WeightTransferError


class MemorySink:
    """Keeps the committed weights and those of the transaction. `on_load(path, entries)` runs before every bucket."""

    def __init__(self, on_load: Callable[[str, Sequence[BucketEntry]], None] | None = None) -> None:
        self.policy_version = -1
        self.weights: dict[str, torch.Tensor] = {}
        self.num_prepared = 0
        self.on_load = on_load
        self.refuses = ""  # why the next transaction is not begun
        self._next: tuple[int, dict[str, torch.Tensor], dict[str, int]] | None = None
        self._before: tuple[int, dict[str, torch.Tensor]] = -1, {}

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        self.num_prepared += 1
        if self.refuses:
            raise WeightTransferError(self.refuses)
        self._next = policy_version, {meta.name: torch.zeros(meta.shape, dtype=meta.dtype) for meta in tensors}, {}

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        assert self._next is not None
        if self.on_load is not None:
            self.on_load(shared_memory_path, entries)
        _, weights, received = self._next
        file = os.open(shared_memory_path, os.O_RDONLY)
        bucket = mmap.mmap(file, 0, prot=mmap.PROT_READ)
        os.close(file)
        for entry in entries:
            assert entry.bucket_start % 256 == 0
            data = bucket[entry.bucket_start : entry.bucket_start + entry.num_bytes]
            if xxhash.xxh3_64_intdigest(data) != entry.checksum:
                raise WeightTransferError(f"tensor {entry.name}: checksum differs")
            flat = weights[entry.name].view(-1).view(torch.uint8)
            flat[entry.tensor_start : entry.tensor_start + entry.num_bytes] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            received[entry.name] = received.get(entry.name, 0) + entry.num_bytes

    def commit(self) -> None:
        assert self._next is not None
        version, weights, received = self._next
        for name, tensor in weights.items():
            if received.get(name) != tensor.nbytes:
                raise WeightTransferError(f"tensor {name}: {received.get(name)} of {tensor.nbytes} bytes arrived")
        self._before = self.policy_version, self.weights
        self.policy_version, self.weights, self._next = version, weights, None

    def revert(self) -> None:
        self.policy_version, self.weights = self._before

    def settle(self) -> None:
        self._before = -1, {}

    def rollback(self) -> None:
        self._next = None


class ForkedSink:
    """A MemorySink in a forked process, as an engine is."""

    def __init__(self) -> None:
        context = get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.policy_version = -1

    def _call(self, method: str, *arguments: object) -> object:
        self._ours.send((method, arguments))
        answer = self._ours.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        self._call("prepare", policy_version, list(tensors))

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        self._call("load", shared_memory_path, list(entries))

    def commit(self) -> None:
        self._call("commit")
        self.policy_version = int(str(self._call("version")))

    def revert(self) -> None:
        self._call("revert")
        self.policy_version = int(str(self._call("version")))

    def settle(self) -> None:
        self._call("settle")

    def rollback(self) -> None:
        self._call("rollback")

    def weights(self) -> dict[str, torch.Tensor]:
        weights = self._call("weights")
        assert isinstance(weights, dict)
        return {name: torch.from_numpy(array) for name, array in weights.items()}

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self.kill()


def _serve(connection) -> None:  # type: ignore[no-untyped-def]
    sink = MemorySink()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if method == "weights":
                connection.send({name: tensor.numpy() for name, tensor in sink.weights.items()})
            elif method == "version":
                connection.send(sink.policy_version)
            else:
                connection.send(getattr(sink, method)(*arguments))
        except Exception as error:
            connection.send(error)
