"""Runs inside SGLang's processes: takes over weights, and lets SGLang's model compute with them from the commit on.

SGLang calls `serve` as a custom weight loader (`--custom-weight-loader`, its own extension point), once for each command of the client
(sglang_weights.py). A command is a pickled pair in memory that the client shares, and the answer is written to the same memory: SGLang
itself tells its callers nothing of what a loader found. Buckets never pass through HTTP.

How SGLang's model loads is learned once (sglang_trace.py). Versions are then received into a spare of its parameters and verified there,
so the old weights serve until the commit, which exchanges the two (sglang_store.py, sglang_spare.py).
"""

import os
import pickle
import struct
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.buckets import BucketStream
from tandem.engine.quantised import quantised
from tandem.engine.rollout.sglang_fp8 import check_copies, check_layers
from tandem.engine.rollout.sglang_spare import Holding, Parameters
from tandem.engine.rollout.sglang_store import ParameterStore
from tandem.engine.rollout.sglang_trace import trace_load
from tandem.engine.rollout.sglang_whole import WholeTensors
from tandem.engine.rollout.weights import tensor_metas
from tandem.engine.rollout_config import Quantization
from tandem.engine.types import WeightTransferError

_LENGTH = struct.Struct("<q")  # bytes that follow


def serve(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Carry out one command. The tensor's name is the path of the shared memory; the tensor is empty."""
    ((path, _),) = named_tensors
    descriptor = os.open(path, os.O_RDWR)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(f"{path} is another user's; only this server's own client may send weights")
        command, arguments = read_message(descriptor)
        write_message(descriptor, _answer(model, command, arguments))
    finally:
        os.close(descriptor)


def write_message(descriptor: int, content: Any) -> None:
    """Leave a message in memory, in place of what lies there."""
    message = pickle.dumps(content)
    os.pwrite(descriptor, _LENGTH.pack(len(message)) + message, 0)


def read_message(descriptor: int) -> Any:
    """What was left there."""
    (length,) = _LENGTH.unpack(os.pread(descriptor, _LENGTH.size, 0))
    return pickle.loads(os.pread(descriptor, length, _LENGTH.size))


def _answer(model: torch.nn.Module, command: str, arguments: Sequence[Any]) -> Any:
    """The command's result, or the exception that it raised (the client raises it again)."""
    try:
        if command == "setup":
            model.__dict__["tandem_receiver"] = Receiver(model, *arguments)  # as long as the model lives, and none of its modules
            return None
        return model.__dict__["tandem_receiver"].run(command, arguments)
    except Exception as error:  # whatever it is, the client must know, and SGLang must go on
        traceback.print_exc()
        return error if _survives_pickling(error) else WeightTransferError(f"{type(error).__name__}: {error}")


def _survives_pickling(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


class Receiver:
    """One process's weights. Process `index` of the server's tensor-parallel ones takes what its parameters need."""

    def __init__(
        self, model: torch.nn.Module, architecture: Architecture, dtype: torch.dtype, index: int, quantization: Quantization | None = None
    ) -> None:
        self._model, self._architecture, self._dtype, self._index = model, architecture, dtype, index
        self._quantization: Quantization | None = quantization
        self._committed = 0  # number of the commit that serves
        self._store = self._make_store()

    def run(self, command: str, arguments: Sequence[Any]) -> Any:
        """Any of `WeightSink`'s commands, or `receive`, `wanted`, `revert`, `settle` and `digest`."""
        if command in ("prepare", "receive") and not self._store.is_current:
            self._store = self._make_store()
        commands = {
            "wanted": self._store.wanted,
            "prepare": self._store.prepare,
            "load": self._store.load,
            "receive": self._receive,
            "commit": self._commit,
            "revert": self._revert,
            "settle": self._store.settle,
            "rollback": self._store.rollback,
            "digest": self._store.digest,
        }
        return commands[command](*arguments)

    def _make_store(self) -> ParameterStore | WholeTensors:
        """Learn how the model loads. Raises: WeightTransferError naming a parameter that no tensor fills, or that keeps no blocks."""
        tensors = tensor_metas(self._architecture, self._dtype)
        if self._quantization is not None:
            check_layers(self._model)
            tensors = {meta.name: meta for meta in quantised(tensors.values())}
        try:
            trace = trace_load(self._model, tensors.values())
            check_copies(trace, tensors)
        except WeightTransferError:
            raise
        except Exception as error:  # whatever load_weights does with tensors that have no memory
            if self._quantization is not None:
                reason = f"{type(self._model).__name__} computes with what it loads ({error}), and quantised weights are only copied"
                raise WeightTransferError(f"{reason}; set rollout.quantization to None") from error
            self._say(f"loads whole tensors at every commit, from two more copies of the model: {type(error).__name__}: {error}")
            return WholeTensors(self._model, self._architecture, self._dtype)
        holding = Holding.of(self._model, trace.targets)
        parameters = Parameters(self._model, trace.targets, holding)
        post_load = self._model.post_load_weights if trace.computes_more else None
        taken = {copy.name for copy in trace.copies}
        ignored = [name for name in tensors if name not in taken]
        self._say(
            f"{len(trace.copies)} copies fill {len(trace.targets)} parameters, {parameters.num_bytes / 2**20:.1f} MiB; the spare is "
            f"{'kept' if holding.kept else 'there during a swap only'} and exchanged by {'pointer' if holding.by_pointer else 'content'}"
            f"{', then post_load_weights runs' if post_load is not None else ''}; {len(ignored)} of {len(tensors)} tensors are not "
            f"this process's{f', the first is {ignored[0]}' if ignored else ''}"
        )
        return ParameterStore(trace, parameters, tensors, post_load)  # pyright: ignore[reportArgumentType]

    def _say(self, text: str) -> None:
        print(f"Weights of {type(self._model).__name__}, process {self._index}: {text}", flush=True)  # to the server's log

    def _receive(self, stream: BucketStream | None, policy_version: int, swap: int, first_ticket: int) -> None:
        self._store.receive(stream if stream is None else stream.of_process(self._index), policy_version, swap, first_ticket)

    def _commit(self, number: int) -> bool:
        """Let the received version serve. Returns: whether memory is held that `settle` gives back.

        Raises: WeightTransferError if it is incomplete, or SGLang does not take it.
        """
        self._store.commit()
        self._committed = number
        return self._store.must_settle

    def _revert(self, number: int) -> None:
        """Undo commit `number`, if this process got so far: the version before it serves again, if there was one."""
        if self._committed == number:
            self._store.take_back()
            self._committed = 0
