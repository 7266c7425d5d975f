"""Runs inside SGLang's processes: takes over weights as the embedded engine does, and gives them to SGLang's model at the commit.

SGLang calls `serve` as a custom weight loader (`--custom-weight-loader`, its own extension point), once for each command of the client
(sglang_weights.py). A command is a pickled pair in memory that the client shares, and the answer is written to the same memory: SGLang
itself tells its callers nothing of what a loader found. Buckets never pass through HTTP.

Versions are received into memory of their own and verified there, so the old weights serve until the commit. SGLang's parameters are
then overwritten in place, and with the old version again if it does not take the new one.
"""

import mmap
import os
import pickle
import struct
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.rollout.receive import WeightStore
from tandem.engine.types import WeightTransferError

LENGTH = struct.Struct("<q")  # bytes that follow


def serve(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Carry out one command. The tensor's name is the path of the shared memory; the tensor is empty."""
    ((path, _),) = named_tensors
    descriptor = os.open(path, os.O_RDWR)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(f"{path} is another user's; only this server's own client may send weights")
        with mmap.mmap(descriptor, 0) as memory:
            (length,) = LENGTH.unpack_from(memory)
            command, arguments = pickle.loads(memory[LENGTH.size : LENGTH.size + length])
            answer = pickle.dumps(_answer(model, command, arguments))
            memory[: LENGTH.size + len(answer)] = LENGTH.pack(len(answer)) + answer
    finally:
        os.close(descriptor)


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
    """One process's weights: those of SGLang's model, and the versions on their way to it (receive.py)."""

    def __init__(self, model: torch.nn.Module, architecture: Architecture, dtype: torch.dtype) -> None:
        self._model = model
        self._store = WeightStore(architecture, dtype)
        self._committed = 0  # number of the commit that serves
        self._knows_model = False  # whether every parameter of SGLang's is known to be among the tensors

    def run(self, command: str, arguments: Sequence[Any]) -> Any:
        """Any of `WeightSink`'s commands, or `receive`, `revert` and `digest`."""
        commands = {
            "prepare": self._store.prepare,
            "load": self._store.load,
            "receive": self._store.receive,
            "commit": self._commit,
            "revert": self._revert,
            "rollback": self._store.rollback,
            "digest": self._digest,
        }
        return commands[command](*arguments)

    def _commit(self, number: int) -> None:
        """Give the received version to SGLang. Raises: WeightTransferError if it is incomplete, or SGLang does not take it."""
        self._store.commit()
        try:
            self._give_to_model()
        except Exception as error:
            self._take_back()
            raise WeightTransferError(f"SGLang's model does not take the weights ({error}); it has the old ones again") from error
        self._committed = number

    def _revert(self, number: int) -> None:
        """Undo commit `number`, if this process got so far: the version before it serves again, if there was one."""
        if self._committed == number:
            self._take_back()
            self._committed = 0

    def _take_back(self) -> None:
        self._store.take_back()
        if self._store.serving is not None:
            self._give_to_model()

    def _digest(self) -> str | None:
        return None if self._store.serving is None else self._store.serving.digest()

    @torch.no_grad()
    def _give_to_model(self) -> None:
        serving = self._store.serving
        assert serving is not None
        if not self._knows_model:
            for parameter in self._model.parameters():
                parameter.fill_(torch.nan)
        # SGLang fuses and shards the tensors as it does those of a checkpoint on disk.
        self._model.load_weights(serving.named.items())  # pyright: ignore[reportCallIssue]
        if not self._knows_model:
            missing = [name for name, parameter in self._model.named_parameters() if parameter.isnan().any()]
            if missing and not any(tensor.isnan().any() for tensor in serving.named.values()):
                raise WeightTransferError(f"no tensor fills SGLang's parameter {missing[0]}")
            self._knows_model = True
