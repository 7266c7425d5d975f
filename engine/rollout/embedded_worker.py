"""The process in which the embedded engine computes: `python -m tandem.engine.rollout.embedded_worker FD PARENT_PID`.

A process of its own because the trainer's process runs Megatron's CPU shim, which patches torch. It talks to its parent
(embedded.py) over one socket: pickled (command, arguments) in, ("reply", …), ("ended", …) and ("generated", …) out.
It ends when the socket closes or its parent dies.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from tandem.engine.rollout.inference import InferenceModel
from tandem.engine.rollout.receive import WeightStore
from tandem.engine.rollout.scheduler import Scheduler
from tandem.engine.rollout.setup import WorkerSetup
from tandem.engine.types import GenerationRequest, TensorMeta


class Worker:
    def __init__(self, connection: Connection, setup: WorkerSetup) -> None:
        self._connection = connection
        self._setup = setup
        self._model = InferenceModel(setup.architecture, setup.dtype, setup.context_length)
        self._store = WeightStore(setup.architecture, setup.dtype)

    def serve(self) -> None:
        """Answer commands until the parent closes the socket."""
        while True:
            try:
                command, arguments = self._connection.recv()
            except (EOFError, ConnectionResetError):
                return
            if command == "generate":
                self._generate(*arguments)
            elif command == "abort":
                continue  # nothing runs: the generation ended before the request to abort it arrived
            else:
                self._connection.send(("reply", self._weights_command(command, arguments)))

    def _weights_command(self, command: str, arguments: tuple[Any, ...]) -> Any:
        """The command's result, or the exception that it raised (the parent raises it again)."""
        commands = {
            "prepare": self._prepare,
            "load": self._store.load,
            "receive": self._store.receive,
            "commit": self._store.commit,
            "take_back": self._store.take_back,
            "rollback": self._store.rollback,
            "digest": self._digest,
        }
        try:
            return commands[command](*arguments)
        except Exception as error:
            traceback.print_exc()
            return error

    def _prepare(self, policy_version: int, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        self._store.prepare(policy_version, [TensorMeta(name=name, shape=shape, dtype=dtype) for name, shape, dtype in tensors])

    def _digest(self) -> str | None:
        return None if self._store.serving is None else self._store.serving.digest()

    def _generate(self, requests: Sequence[GenerationRequest], token_budget: int | None) -> None:
        weights = self._store.serving
        assert weights is not None, "the parent asks for a generation only after a commit"
        try:
            scheduler = Scheduler(
                self._model,
                weights,
                self._setup.config,
                requests,
                stop_token_ids=self._setup.stop_token_ids,
                token_budget=token_budget,
            )
            for ended in scheduler.run(lambda: self._poll_aborted(requests)):
                self._connection.send(("ended", ended))
        except (EOFError, OSError):
            raise
        except Exception as error:
            traceback.print_exc()
            self._connection.send(("generated", error))
        else:
            self._connection.send(("generated", None))

    def _poll_aborted(self, requests: Sequence[GenerationRequest]) -> set[str]:
        ids: set[str] = set()
        while self._connection.poll(0):
            command, arguments = self._connection.recv()
            assert command == "abort", f"{command} during a generation"
            (aborted,) = arguments
            ids |= {request.request_id for request in requests} if aborted is None else aborted
        return ids


def _die_with(parent_pid: int) -> None:
    """Watch the parent: a closed socket alone is no proof, because children that it forked may hold the other end open."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def main() -> None:
    fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):  # those are for the parent, which then stops this process
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent_pid)
    connection = Connection(fd)
    try:
        _, (setup,) = connection.recv()
    except EOFError:
        return
    torch.set_num_threads(setup.num_threads)
    with torch.inference_mode():
        try:
            Worker(connection, setup).serve()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main()
