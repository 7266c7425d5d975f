"""The client's side of a swap into an SGLang server: commands to the receivers that run in its processes (sglang_receiver.py).

A command lies in anonymous memory that both sides open, and so does its answer; HTTP only says where. The serialised tensor that SGLang's
API asks for is an empty one, so nothing of it is ever shared through files.
"""

import base64
import hashlib
import os
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler  # torch registers how its tensors are sent
from typing import Any

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.buckets import BucketStream, PeerFailed
from tandem.engine.rollout.sglang_client import ServerGoneError, SGLangClient
from tandem.engine.rollout.sglang_receiver import read_message, write_message
from tandem.engine.rollout.sglang_server import RECEIVER
from tandem.engine.rollout.sglang_versions import SGLangVersion
from tandem.engine.rollout_config import Quantization
from tandem.engine.types import WeightTransferError


class UnknownWeightsError(RuntimeError):
    """Nobody knows which weights the server has: it must not serve."""


class WeightCommands:
    """Speaks to the receivers of one server's tensor-parallel processes, all at once."""

    def __init__(
        self,
        client: SGLangClient,
        version: SGLangVersion,
        tp: int,
        architecture: Architecture,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
    ) -> None:
        self._client, self._version, self._tp = client, version, tp
        self._setup = architecture, dtype
        self._quantization: Quantization | None = quantization
        self._is_set_up = self._session_is_open = False
        self._stream: BucketStream | None = None  # that the receivers know
        self.must_settle = False  # whether a receiver holds memory that `settle` gives back
        self._num_commits = 0  # the receivers of a commit that failed may have got its number or not

    async def run(self, command: str, *arguments: Any) -> list[Any]:
        """What each process answers. Raises: what a receiver raised; RuntimeError if SGLang refused; ServerGoneError."""
        if not self._session_is_open and self._version.has_update_sessions:
            await self._begin()
        if not self._is_set_up:
            await self._send("setup", [(*self._setup, index, self._quantization) for index in range(self._tp)])
            self._is_set_up = True
        return await self._send(command, [arguments] * self._tp)

    async def receive(self, stream: BucketStream, policy_version: int, swap: int, first_ticket: int) -> None:
        """Take over a whole version; see `StreamingWeightSink.receive`. A stream is described once, and known from then on."""
        known = stream is self._stream
        self._stream = None
        await self.run("receive", None if known else stream, policy_version, swap, first_ticket)
        self._stream = stream

    async def digest(self) -> str:
        """Of the weights that serve, from all processes: equal ones mean equal weights, among servers of as many processes."""
        digests = await self.run("digest")
        return digests[0] if self._tp == 1 else hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()

    async def commit(self, policy_version: int, previous: int) -> None:
        """Flip every process to the prepared version, or none.

        Raises: as `run`, and every process has the version `previous` again; UnknownWeightsError if that failed too.
        """
        self._num_commits += 1
        try:
            self.must_settle = any(await self.run("commit", self._num_commits))
            await self._end()
            await self._label(policy_version)
        except ServerGoneError:
            raise
        except Exception as error:
            try:
                await self.revert(previous)
            except UnknownWeightsError as second:
                raise UnknownWeightsError(f"{error}; {second}") from error
            raise

    async def revert(self, previous: int) -> None:
        """Undo the last commit in every process that got so far. Raises: ServerGoneError; UnknownWeightsError."""
        try:
            await self.run("revert", self._num_commits)
            await self._end()
            await self._label(previous)
        except ServerGoneError:
            raise
        except Exception as error:
            raise UnknownWeightsError(f"going back to version {previous} failed: {error}") from error

    async def settle(self) -> None:
        """The last commit is final."""
        await self.run("settle")
        await self._end()
        self.must_settle = False

    async def rollback(self) -> None:
        """Forget the transaction. What was computed with the serving weights stays."""
        await self.run("rollback")
        await self._end()

    async def pause(self) -> None:
        """Close SGLang's session, so that it generates; the transaction stays open, and the next command opens another session."""
        await self._end()

    async def _begin(self) -> None:
        try:
            await self._client.call("/begin_weight_update")
        except RuntimeError as error:
            try:  # it is open: the engine before this one left it so, or SGLang failed after it had opened or before it had closed it
                await self._client.call("/end_weight_update")
            except RuntimeError:
                raise error from None
            await self._client.call("/begin_weight_update")
        self._session_is_open = True

    async def _end(self) -> None:
        if self._session_is_open:
            self._session_is_open = False  # if that fails, `_begin` finds out whether it is
            await self._client.call("/end_weight_update")

    async def _label(self, policy_version: int) -> None:
        """What SGLang stamps on its responses."""
        await self._client.call("/update_weight_version", new_version=str(policy_version), abort_all_requests=False)

    async def _send(self, command: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers to a command, whose arguments are each process's own."""
        memories = [os.memfd_create("tandem-sglang", os.MFD_CLOEXEC) for _ in range(self._tp)]
        try:
            for memory, own in zip(memories, arguments, strict=True):
                write_message(memory, (command, own))
            paths = [f"/proc/{os.getpid()}/fd/{memory}" for memory in memories]
            # The prefix cache goes with the weights that filled it. /flush_cache would do more: a collection of all Python objects, 0.4 s.
            fields = {"flush_cache": command in ("commit", "revert"), "torch_empty_cache": False}
            tensors = [_serialised(path) for path in paths]
            await self._client.call("/update_weights_from_tensor", load_format=RECEIVER, serialized_named_tensors=tensors, **fields)
            answers = [read_message(memory) for memory in memories]
        finally:
            for memory in memories:
                os.close(memory)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if errors:  # that another process failed is no reason
            raise min(errors, key=lambda error: isinstance(error, PeerFailed))
        if any(isinstance(answer, tuple) for answer in answers):  # the command still lies there
            raise WeightTransferError(
                "SGLang accepted a command and did not carry it out; is another weight loader of the same name in use?"
            )
        return answers


def _serialised(path: str) -> str:
    """A list of one tensor without elements, whose name is the path, as SGLang's own serialiser writes it."""
    return base64.b64encode(bytes(ForkingPickler.dumps([(path, torch.empty(0))]))).decode()
