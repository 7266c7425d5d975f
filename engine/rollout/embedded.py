"""The project's own rollout engine, for CPUs and debugging: the parent's side of a child process (embedded_worker.py).

Meets `RolloutEngine` and `WeightSink`. The child dies with this process; a child that died is noticed at the next call,
or at once by one that waits for it, and `restart` replaces it by one that has no weights yet.
"""

import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Collection, Generator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tandem.engine.architecture import Architecture
from tandem.engine.buckets import BucketStream, PeerFailed
from tandem.engine.config import RolloutConfig
from tandem.engine.rollout.requests import check_requests
from tandem.engine.rollout.setup import WorkerSetup
from tandem.engine.rollout.weights import DTYPES
from tandem.engine.types import BucketEntry, Completion, EngineDiedError, GenerationRequest, TensorMeta

_LOG_TAIL_BYTES = 3000
_CLOSE_TIMEOUT_S = 5.0

Message = tuple[str, Any]


class PendingReceive:
    """See `PendingTransfer`."""

    def __init__(self, engine: "EmbeddedEngine", number: int) -> None:
        self._engine = engine
        self._number = number

    def check(self) -> None:
        """Raises: EngineDiedError if the child is gone; PeerFailed if it has refused, which `wait` tells more of."""
        if not self._engine.is_alive:
            raise self._engine._died()
        if self._engine._has_refused(self._number):
            raise PeerFailed

    def wait(self) -> None:
        """Raises: WeightTransferError naming bucket and tensor; PeerFailed if a rank failed."""
        try:
            self._engine._reply(self._number, "receive")
        except Exception:
            self._engine._stream = None  # the child may not have taken it
            raise


class EmbeddedEngine:
    """Generates on the CPU in a child process.

    Log-probs are those of `Completion`: natural logarithms under softmax(logits / temperature) over the whole vocabulary, in
    float32, not renormalised for top-p and top-k; of greedy requests at temperature 1. In float32 a completion's tokens and
    log-probs are a function of the weights and its request, to the last bit: the other requests, their order, `max_batch` and what is
    recorded change nothing. (tests/rollout/test_invariance.py says whether the machine's libraries keep this, also in bfloat16.)

    Commands are sent by one thread at a time; `abort` may be called from any.
    """

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        config: RolloutConfig,
        *,
        dtype: str,
        context_length: int,
        stop_token_ids: tuple[int, ...],
        num_threads: int,
        log_path: Path | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        """Start the child; does not wait for it.

        Args:
            hf_config: the model's config.json, of a family that `Architecture` knows.
            dtype: "float32" or "bfloat16", of weights and activations; logits and log-probs are float32.
            context_length: most tokens of prompt plus response.
            log_path: where the child's stderr is appended; None: a temporary file, shown in errors only.
            timeout_s: deadline of every answer to a weight command, in seconds.
        Raises: ValueError if the model or the dtype is not supported, or an option does not suit it.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; the embedded rollout engine has {' and '.join(DTYPES)}")
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
        architecture = Architecture.from_hf(hf_config)
        if config.record_routing and architecture.experts is None:
            raise ValueError(f"rollout.record_routing is True, but {architecture.model_type} has no experts; set it to False")
        self._setup = WorkerSetup(
            architecture=architecture,
            config=config,
            dtype=DTYPES[dtype],
            context_length=context_length,
            stop_token_ids=tuple(stop_token_ids),
            num_threads=num_threads,
        )
        self._log_path = log_path
        self._timeout_s = timeout_s
        self._start()

    def _start(self) -> None:
        self._policy_version = self._previous = -1
        self._digest: str | None = None  # of the committed weights, once somebody asked
        self._stream: BucketStream | None = None
        self._generating = False
        self._num_sent = 0
        self._num_answered = 0
        self._answers: dict[int, Any] = {}
        self._log: IO[bytes] = tempfile.TemporaryFile() if self._log_path is None else self._log_path.open("a+b")  # noqa: SIM115
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tandem.engine.rollout.embedded_worker", str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
            )
        self._connection = Connection(ours.detach())
        self._send_lock = threading.Lock()
        # A thread of its own empties the socket, so that the child never waits while its parent grades.
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=_read, args=(self._connection, self._messages), daemon=True, name="embedded-engine")
        self._reader.start()
        self._finalizer = weakref.finalize(self, _stop, self._process, self._connection, self._reader, os.getpid())
        self._send("setup", self._setup)

    @property
    def policy_version(self) -> int:
        """The version whose weights are committed; -1 before the first and after a restart."""
        return self._policy_version

    @property
    def weights_digest(self) -> str | None:
        """See `RolloutEngine.weights_digest`. Computed when asked for the first time after a commit: the child then reads all the weights
        once.

        Raises: RuntimeError when it is not known yet and a generation runs, or when the child died.
        """
        if self._digest is None and self._policy_version >= 0:
            self._digest = self._command("digest")
        return self._digest if self._policy_version >= 0 else None

    @property
    def is_alive(self) -> bool:
        """Whether the child runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Generator[Completion, None, None]:
        """See `RolloutEngine.generate`. Requests are admitted in their order; when the budget runs out within a step, the
        earliest requests get the last tokens. `max_new_tokens` of 0 ends with StopState.LENGTH.

        Raises: ValueError naming the request that does not fit the context or is malformed; RuntimeError when no weights are
            committed, when a generation runs already, or when the child died.
        """
        check_requests(
            requests,
            token_budget,
            context_length=self._setup.context_length,
            vocab_size=self._setup.architecture.vocab_size,
            policy_version=self._policy_version,
        )
        self._check_idle("generate")
        if self._policy_version < 0:
            raise RuntimeError(f"{self._name()} has no weights; commit a version first")
        return self._generate(tuple(requests), token_budget)

    def _generate(self, requests: tuple[GenerationRequest, ...], token_budget: int | None) -> Generator[Completion, None, None]:
        if not requests:
            return
        self._check_idle("generate")
        self._send("generate", requests, token_budget)
        self._generating = True
        try:
            while True:
                kind, payload = self._receive()
                if kind == "generated":
                    self._generating = False
                    if payload is not None:
                        raise RuntimeError(f"{self._name()} failed to generate: {payload!r}\n{self._log_tail()}") from payload
                    return
                for end in payload:
                    yield Completion(
                        request_id=requests[end.index].request_id,
                        token_ids=tuple(end.tokens.tolist()),
                        logprobs=tuple(end.logprobs.tolist()),
                        stop=end.stop,
                        policy_version=self._policy_version,
                        routed_experts=end.routed_experts,
                    )
        finally:
            if self._generating:
                self.abort()
                while self._generating:
                    message = self._messages.get()
                    self._generating = message is not None and message[0] != "generated"
                    if message is None:
                        self._messages.put(None)

    def abort(self, request_ids: Collection[str] | None = None) -> None:
        """See `RolloutEngine.abort`. Nothing happens when no generation runs; ids that are not running are ignored."""
        if self._generating:
            try:
                self._send("abort", None if request_ids is None else frozenset(request_ids))
            except RuntimeError:
                return  # the child died: whoever iterates over the generation is told

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        """See `WeightSink.prepare`. A transaction that was open is rolled back.

        Raises: WeightTransferError naming the tensor that is missing, unknown, or of another shape or dtype.
        """
        self._command("prepare", policy_version, [(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors])

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        """See `WeightSink.load`."""
        self._command("load", shared_memory_path, tuple(entries))

    def receive(self, stream: BucketStream, policy_version: int, *, swap: int, first_ticket: int) -> PendingReceive:
        """See `StreamingWeightSink.receive`. `commit` fails if anything of it failed."""
        fresh = None if stream is self._stream else stream
        self._stream = None  # until the child is known to have it
        number = self._submit("receive", fresh, policy_version, swap, first_ticket)
        self._stream = stream
        return PendingReceive(self, number)

    def commit(self) -> None:
        """See `WeightSink.commit`. Nothing computed with the old weights is kept."""
        committed = self._command("commit")
        self._previous, self._policy_version, self._digest = self._policy_version, committed, None

    def revert(self) -> None:
        """See `WeightSink.revert`."""
        self._command("take_back")
        self._policy_version, self._digest = self._previous, None

    def settle(self) -> None:
        """See `WeightSink.settle`. Nothing: the child keeps both copies."""

    def rollback(self) -> None:
        """See `WeightSink.rollback`."""
        self._command("rollback")
        self._answers.clear()  # of loads that nobody waited for

    def wait_until_ready(self) -> None:
        """See `RolloutEngine.wait_until_ready`. The child takes commands from the first moment."""

    def restart(self) -> None:
        """Replace the child, dead or alive, by one without weights (policy_version -1)."""
        self.close()
        self._start()

    def close(self) -> None:
        """Stop the child. May be called twice."""
        self._finalizer()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _command(self, command: str, *arguments: Any) -> Any:
        return self._reply(self._submit(command, *arguments), command)

    def _submit(self, command: str, *arguments: Any) -> int:
        self._check_idle(command)
        self._send(command, *arguments)
        self._num_sent += 1
        return self._num_sent

    def _reply(self, number: int, command: str) -> Any:
        """The answer to a command; answers come in the order of the commands."""
        while number > self._num_answered:
            self._take_answer(command)
        answer = self._answers.pop(number)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _has_refused(self, number: int) -> bool:
        """Whether the answer to a command is there, and an error."""
        while number > self._num_answered and not self._messages.empty():
            self._take_answer("receive")
        return isinstance(self._answers.get(number), Exception)

    def _take_answer(self, command: str) -> None:
        kind, payload = self._receive(self._timeout_s, command)
        assert kind == "reply", kind
        self._num_answered += 1
        self._answers[self._num_answered] = payload

    def _check_idle(self, command: str) -> None:
        if self._generating:
            raise RuntimeError(f"{command} while {self._name()} generates; finish or close the generation first")

    def _send(self, command: str, *arguments: Any) -> None:
        if not self._finalizer.alive:
            raise RuntimeError(f"{self._name()} is closed")
        try:
            with self._send_lock:
                self._connection.send((command, arguments))
        except OSError as error:
            raise self._died() from error

    def _receive(self, timeout_s: float | None = None, command: str = "") -> Message:
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            self._process.kill()  # a late answer would be taken for the next command's
            message = f"{self._name()} did not answer {command!r} within {timeout_s:g} s and was killed"
            raise RuntimeError(f"{message}\n{self._log_tail()}") from None
        if message is None:
            self._messages.put(None)
            raise self._died()
        return message

    def _died(self) -> EngineDiedError:
        self._generating = False
        self._policy_version = -1
        try:
            status = f"exit status {self._process.wait(_CLOSE_TIMEOUT_S)}"
        except subprocess.TimeoutExpired:
            status = "its socket closed"
        return EngineDiedError(f"{self._name()} died ({status}); call restart() and send the weights again\n{self._log_tail()}")

    def _name(self) -> str:
        return f"embedded rollout engine (process {self._process.pid})"

    def _log_tail(self) -> str:
        if self._log.closed:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_TAIL_BYTES))
        text = self._log.read().decode(errors="replace").strip()
        where = "its log" if self._log_path is None else str(self._log_path)
        return f"the end of {where}:\n{text}" if text else f"{where} is empty"


def _read(connection: Connection, messages: "queue.SimpleQueue[Message | None]") -> None:
    """Move messages to the queue until the socket closes; None is the last."""
    while True:
        try:
            messages.put(connection.recv())
        except (EOFError, OSError):
            messages.put(None)
            return


def _stop(process: subprocess.Popen[bytes], connection: Connection, reader: threading.Thread, owner_pid: int) -> None:
    """Runs at `close`, when the engine is garbage, and at the interpreter's exit; in forked children it does nothing."""
    if os.getpid() != owner_pid:
        return
    # The child holds nothing worth saving, and it may be in the middle of a long step.
    process.kill()
    process.wait()
    reader.join(_CLOSE_TIMEOUT_S)  # sees the end of the socket
    connection.close()
