"""SGLang as the rollout engine: a real server in a process and an environment of its own.

Meets `RolloutEngine` and `WeightSink`. The server starts with weights of no meaning; whoever needs it first waits until it is healthy. It
dies with this process, however that ends; `restart` replaces one that died.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Collection, Coroutine, Generator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tandem.engine.architecture import Architecture
from tandem.engine.buckets import BucketStream, PeerFailed, Region
from tandem.engine.config import RolloutConfig
from tandem.engine.rollout.requests import check_requests
from tandem.engine.rollout.sglang_client import ServerGoneError, SGLangClient
from tandem.engine.rollout.sglang_generation import Generation
from tandem.engine.rollout.sglang_health import watch
from tandem.engine.rollout.sglang_members import Member, ServerStalledError
from tandem.engine.rollout.sglang_memory import WEIGHTS, ServerMemory, parts_of
from tandem.engine.rollout.sglang_server import SGLangServer
from tandem.engine.rollout.sglang_weights import UnknownWeightsError, WeightCommands
from tandem.engine.rollout.weights import DTYPES
from tandem.engine.types import BucketEntry, Completion, EngineDiedError, GenerationRequest, TensorMeta

T = TypeVar("T")


class PendingReceive:
    """See `PendingTransfer`."""

    def __init__(self, engine: "SGLangEngine", answer: "concurrent.futures.Future[Any]") -> None:
        self._engine = engine
        self._answer = answer

    def check(self) -> None:
        """Raises: EngineDiedError if the server is gone; PeerFailed if it has refused, which `wait` tells more of."""
        if not self._engine.is_alive:
            raise self._engine.server.died()
        if self._answer.done() and (self._answer.cancelled() or self._answer.exception() is not None):
            raise PeerFailed

    def wait(self) -> None:
        """Raises: WeightTransferError naming bucket and tensor; PeerFailed if a rank failed."""
        self._engine._result(self._answer, "receive")


class SGLangEngine:
    """Generates with the weights of one policy version, on the server that it is given and owns from then on.

    Log-probs are those of `Completion`: of the whole vocabulary after temperature, not renormalised for top-p and top-k; of greedy requests
    at temperature 1. With `seed_sampling` a request's tokens are a function of its seed and of the logits; those differ by rounding with
    what else is in the batch, so that a phase is repeated up to near ties. Where a budget ends depends on what arrived first.

    Commands are sent by one thread at a time; `abort` may be called from any.
    """

    def __init__(
        self,
        server: SGLangServer,
        config: RolloutConfig,
        *,
        stop_token_ids: tuple[int, ...],
        timeout_s: float = 300.0,
    ) -> None:
        """Does not wait for the server.

        Args:
            config: `max_batch`, `tp`, `record_routing` and `sglang` must be the server's, or (max_batch) less.
            timeout_s: deadline of every answer to a weight command, in seconds.
        Raises: ValueError if the model is not supported, or an option does not suit it.
        """
        self._architecture = Architecture.from_hf(server.setup.hf_config)
        if config.record_routing and self._architecture.experts is None:
            raise ValueError(f"rollout.record_routing is True, but {self._architecture.model_type} has no experts; set it to False")
        self.server, self._config, self._stop_token_ids, self._timeout_s = server, config, stop_token_ids, timeout_s
        self.opens_device_memory = server.setup.on_gpu  # see `DeviceWeightSink`
        self._connect()

    def _connect(self) -> None:
        server = self.server
        self._client = SGLangClient(server.url)
        self._weights = WeightCommands(
            self._client, server.version, server.setup.tp, self._architecture, DTYPES[server.setup.dtype], server.setup.quantization
        )
        self._memory = ServerMemory(self._client, self._weights, timeout_s=self._timeout_s)
        self._policy_version = self._prepared = self._previous = -1
        self._digest: str | None = None  # of the committed weights, once somebody asked
        self._generation: Generation | None = None
        self._abort_lock = threading.Lock()
        self._is_watched = False

    @property
    def policy_version(self) -> int:
        """The version whose weights are committed; -1 before the first and after a restart."""
        return self._policy_version

    @property
    def weights_digest(self) -> str | None:
        """See `RolloutEngine.weights_digest`. Computed when asked for the first time after a commit.

        Raises: RuntimeError when it is not known yet and a generation runs; EngineDiedError.
        """
        if self._digest is None and self._policy_version >= 0:
            self._digest = self._command("digest", self._weights.digest())
        return self._digest if self._policy_version >= 0 else None

    @property
    def is_alive(self) -> bool:
        """Whether the server runs."""
        return self.server.is_alive

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Generator[Completion, None, None]:
        """See `RolloutEngine.generate`. Requests are admitted in their order. `max_new_tokens` of 0 ends with StopState.LENGTH.

        Raises: ValueError naming the request that does not fit the context or is malformed; RuntimeError when no weights are
            committed, or when a generation runs already; EngineDiedError.
        """
        check_requests(
            requests,
            token_budget,
            context_length=self.server.setup.context_length,
            vocab_size=self._architecture.vocab_size,
            policy_version=self._policy_version,
            sees_images=True,
        )
        self._check_idle("generate")
        if self._policy_version < 0:
            raise RuntimeError(f"{self.server.name} has no weights; commit a version first")
        return self._generate(tuple(requests), token_budget)

    def _generate(self, requests: tuple[GenerationRequest, ...], token_budget: int | None) -> Generator[Completion, None, None]:
        if not requests:
            return
        self.admit()
        generation = Generation(
            self._config,
            requests,
            [Member(name=self.server.name, client=self._client, capacity=self._config.max_batch)],
            stop_token_ids=self._stop_token_ids,
            architecture=self._architecture,
            token_budget=token_budget,
            policy_version=self._policy_version,
        )
        self._generation = generation
        try:
            yield from generation.completions(self._client)
        except Exception as error:
            raise self._reason(error) from error
        finally:
            self._generation = None

    def admit(self) -> None:
        """Let the server take requests that this engine does not send itself (fleet.py): close what a transaction left open.

        Raises: EngineDiedError.
        """
        self._command("generate", self._weights.pause())

    def _reason(self, error: Exception) -> Exception:
        """What a failed generation is to its caller."""
        if isinstance(error, ServerStalledError):
            self.server.kill(f"{error} and was killed")
            return self._died()
        if isinstance(error, ServerGoneError):
            return self._died()
        return RuntimeError(f"{self.server.name} failed to generate: {error}\n{self.server.log_tail()}")

    def abort(self, request_ids: Collection[str] | None = None) -> None:
        """See `RolloutEngine.abort`. Nothing happens when no generation runs; ids that are not running are ignored."""
        generation = self._generation
        if generation is not None:
            ids = None if request_ids is None else frozenset(request_ids)
            with self._abort_lock, contextlib.suppress(RuntimeError, concurrent.futures.TimeoutError):
                self._client.submit(generation.abort(ids)).result(self._timeout_s)

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        """See `WeightSink.prepare`. A transaction that was open is rolled back.

        Raises: WeightTransferError naming the tensor that is missing, unknown, or of another shape or dtype; EngineDiedError.
        """
        metas = [TensorMeta(name=tensor.name, shape=tuple(tensor.shape), dtype=tensor.dtype) for tensor in tensors]
        self._command("prepare", self._weights.run("prepare", policy_version, metas))
        self._prepared = policy_version

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        """See `WeightSink.load`."""
        self._command("load", self._weights.run("load", shared_memory_path, tuple(entries)))

    def wanted_regions(self) -> Sequence[Sequence[tuple[str, Region]] | None]:
        """See `ShardedWeightSink.wanted_regions`. Waits for the server.

        Raises: WeightTransferError if SGLang's model does not take the tensors; EngineDiedError.
        """
        return self._command("wanted", self._weights.run("wanted"))

    def receive(self, stream: BucketStream, policy_version: int, *, swap: int, first_ticket: int) -> PendingReceive:
        """See `StreamingWeightSink.receive`. `commit` fails if anything of it failed."""
        self._check_idle("receive")
        self._wait_until_healthy()
        self._prepared = policy_version
        return PendingReceive(self, self._client.submit(self._weights.receive(stream, policy_version, swap, first_ticket)))

    def commit(self) -> None:
        """See `WeightSink.commit`. Nothing computed with the old weights is kept. If it fails, the old ones serve, or the engine died."""
        self._command("commit", self._weights.commit(self._prepared, self._policy_version))
        self._previous, self._policy_version, self._digest = self._policy_version, self._prepared, None

    def revert(self) -> None:
        """See `WeightSink.revert`."""
        self._command("revert", self._weights.revert(self._previous))
        self._policy_version, self._digest = self._previous, None

    def settle(self) -> None:
        """See `WeightSink.settle`. Nothing is sent where no memory is held for `revert`."""
        if self._weights.must_settle:
            self._command("settle", self._weights.settle())

    def rollback(self) -> None:
        """See `WeightSink.rollback`."""
        self._command("rollback", self._weights.rollback())

    @property
    def parts(self) -> tuple[str, ...]:
        """What of its memory it releases between two turns, in this order (sglang_memory.py)."""
        return parts_of(self._config.sglang.release, on_gpu=self.server.setup.on_gpu)

    @property
    def released(self) -> frozenset[str]:
        """Parts that the server has released and not resumed."""
        return frozenset(self._memory.released)

    def release(self, part: str) -> None:
        """Give up a part of the server's memory. Without its weights it has no policy version. Raises: EngineDiedError."""
        if part == WEIGHTS:
            self._policy_version, self._digest = -1, None
        self._command("release", self._memory.release(part))

    def resume(self, part: str) -> None:
        """Take a part back. Weights come back without meaning. Raises: EngineDiedError."""
        self._command("resume", self._memory.resume(part))

    def wait_until_ready(self) -> None:
        """See `RolloutEngine.wait_until_ready`."""
        self._wait_until_healthy()

    def restart(self) -> None:
        """Replace the server, dead or alive, by one without weights (policy_version -1)."""
        self.disconnect()
        self.server.restart()
        self._connect()

    def disconnect(self) -> None:
        """Leave the server to another engine. This one is of no use any more."""
        self._client.close()

    def close(self) -> None:
        """Stop the server. May be called twice."""
        self.disconnect()
        self.server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _wait_until_healthy(self) -> None:
        self.server.wait_until_healthy()
        if not self._is_watched:
            self._is_watched = True
            self._client.submit(self._watch())

    async def _watch(self) -> None:
        why = await watch(self._client, self._config.sglang)
        if why:  # in a thread of its own: connections that close meanwhile are noticed here
            await asyncio.to_thread(self.server.kill, f"{why} and was killed")

    def _command(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        try:
            self._check_idle(name)
            if self.server.is_closed:
                raise RuntimeError(f"{self.server.name} is closed")
            self._wait_until_healthy()
        except BaseException as error:
            work.close()
            if isinstance(error, EngineDiedError):
                self._policy_version = -1
            raise
        return self._result(self._client.submit(work), name)

    def _result(self, answer: "concurrent.futures.Future[T]", command: str) -> T:
        try:
            return answer.result(self._timeout_s)
        except concurrent.futures.TimeoutError as error:
            answer.cancel()
            # A late answer would be taken for the next command's.
            self.server.kill(f"did not answer {command!r} within {self._timeout_s:g} s and was killed")
            raise self._died() from error
        except ServerGoneError as error:
            raise self._died() from error
        except UnknownWeightsError as error:
            self.server.kill()
            raise self._died(f"was killed, for nobody knows its weights: {error}") from error

    def _died(self, how: str = "") -> EngineDiedError:
        self._policy_version = -1
        self.server.kill()  # whatever is left of it
        return self.server.died(how)

    def _check_idle(self, command: str) -> None:
        if self._generation is not None:
            raise RuntimeError(f"{command} while {self.server.name} generates; finish or close the generation first")
