"""One generation on an SGLang server: requests in their order, at most so many at a time, and a token budget that is met exactly.

Tokens count when they arrive. What comes after the budget is spent, or after a response was found to repeat itself, is thrown away: at
most `rollout.sglang.stream_interval` tokens per running response, and those of the steps until the server heeds the abort.
"""

import asyncio
import base64
import queue
import time
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tandem.engine.architecture import Architecture
from tandem.engine.config import RolloutConfig
from tandem.engine.rollout.repetition import RepetitionDetector
from tandem.engine.rollout.sglang_client import SGLangClient
from tandem.engine.types import Completion, GenerationRequest, StopState

_ABORT_EVERY_S = 0.1  # an abort that overtakes its request is not heeded: it is sent again while the request runs
_WATCH_S = 1.0


class ServerStalledError(Exception):
    """Nothing has come from the server for too long."""


@dataclass(kw_only=True, eq=False)
class _Row:
    """A request that runs, or waits for its turn."""

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: StopState | None = None  # once no token is taken any more
    is_aborted: bool = False  # by the caller; tokens that are on their way are still taken
    detector: RepetitionDetector | None = None
    routed_experts: np.ndarray | None = None


class Generation:
    """Runs in the client's thread. `ended` gets every completion, and then None or the error that ended the generation."""

    def __init__(
        self,
        client: SGLangClient,
        config: RolloutConfig,
        requests: Sequence[GenerationRequest],
        *,
        stop_token_ids: Collection[int],
        architecture: Architecture,
        token_budget: int | None,
        policy_version: int,
    ) -> None:
        self._client, self._config, self._policy_version = client, config, policy_version
        self._stop_token_ids, self._architecture = frozenset(stop_token_ids), architecture
        self._budget_left = token_budget
        self._rows = {request.request_id: _Row(request=request) for request in requests}
        self._waiting = deque[_Row]()
        self._running: dict[str, _Row] = {}  # by the id under which the server knows it
        self._heard_s = 0.0
        self._has_changed = asyncio.Event()  # something is to be aborted on the server
        self.ended: queue.SimpleQueue[Completion | Exception | None] = queue.SimpleQueue()

    async def run(self) -> None:
        """The whole generation. Its errors go to `ended`."""
        try:
            self._take_recorded()
            if self._budget_left == 0:
                self._spend_out()
            self._heard_s = time.monotonic()
            helpers = [asyncio.create_task(self._abort_cut()), asyncio.create_task(self._watch())]
            workers = [asyncio.create_task(self._work()) for _ in range(min(self._config.max_batch, len(self._waiting)))]
            try:
                await _all_or_first_error([*workers, *helpers], until=workers)
            finally:
                for task in (*workers, *helpers):
                    task.cancel()
                await asyncio.gather(*workers, *helpers, return_exceptions=True)
        except Exception as error:
            self.ended.put(error)
        else:
            self.ended.put(None)

    async def abort(self, request_ids: Collection[str] | None) -> None:
        """End these (None: all) with what they have."""
        rows = self._rows.values() if request_ids is None else [self._rows[name] for name in request_ids if name in self._rows]
        waiting = set(map(id, self._waiting))
        for row in list(rows):
            if row.stop is None:
                row.is_aborted = True
                if id(row) in waiting:
                    self._waiting.remove(row)
                    self._end(row, StopState.ABORTED)
        self._has_changed.set()

    def _take_recorded(self) -> None:
        """Completions that are known take their tokens of the budget first, in the order of the requests."""
        for row in list(self._rows.values()):
            recorded = row.request.recorded
            if row.request.max_new_tokens == 0:
                self._end(row, StopState.LENGTH)
            elif recorded is None:
                self._waiting.append(row)
            else:
                length = len(recorded.token_ids)
                num = length if self._budget_left is None else min(length, self._budget_left)
                row.tokens, row.logprobs = list(recorded.token_ids[:num]), list(recorded.logprobs[:num])
                row.routed_experts = recorded.routed_experts[:num] if recorded.routed_experts is not None else None
                self._budget_left = None if self._budget_left is None else self._budget_left - num
                self._end(row, recorded.stop if num == length else StopState.BUDGET)

    async def _work(self) -> None:
        """One of `max_batch` places: takes the next request when its own has ended."""
        while self._waiting:
            row = self._waiting.popleft()
            name = uuid.uuid4().hex  # never used twice: SGLang aborts a streamed request's id again, two seconds after its end
            self._running[name] = row
            await self._generate(name, row)
            del self._running[name]
            if row.stop is None and not row.is_aborted:
                raise RuntimeError(f"SGLang ended request {row.request.request_id!r} before it was complete")
            self._end(row, row.stop if row.stop is not None else StopState.ABORTED)

    async def _generate(self, name: str, row: _Row) -> None:
        request, config = row.request, self._config
        if config.repetition.max_period or config.repetition.ngram:
            before = request.token_ids[len(request.token_ids) - request.num_prefix_tokens :]
            row.detector = RepetitionDetector(config.repetition, before)
        fields: dict[str, Any] = {"rid": name, "input_ids": request.token_ids, "return_logprob": True}
        fields["sampling_params"] = self._sampling(request)
        if request.images:
            fields["image_data"] = [base64.b64encode(image.read()).decode() for image in request.images]
        if config.record_routing:
            fields |= {"return_routed_experts": True, "routed_experts_start_len": len(request.token_ids) - 1}
        async for event in self._client.stream(**fields):
            self._heard_s = time.monotonic()
            meta = event["meta_info"]
            self._check(request.request_id, meta, row)
            # Streamed parts bring their own tokens; an abort's last part may bring none.
            self._take(row, event["output_ids"], [entry[0] for entry in meta["output_token_logprobs"]])
            if meta.get("routed_experts"):
                row.routed_experts = self._experts(meta["routed_experts"], len(row.tokens))

    def _sampling(self, request: GenerationRequest) -> dict[str, Any]:
        config = self._config
        temperature = config.temperature if request.temperature is None else request.temperature
        sampling: dict[str, Any] = {
            "max_new_tokens": request.max_new_tokens,
            "temperature": temperature,
            "top_p": config.top_p if temperature else 1.0,
            "top_k": config.top_k if config.top_k and temperature else -1,
            "stop_token_ids": sorted(self._stop_token_ids),
            "ignore_eos": not self._stop_token_ids,
            "stream_interval": config.sglang.stream_interval,
        }
        return sampling | ({"sampling_seed": request.seed} if config.sglang.seed_sampling else {})

    def _check(self, request_id: str, meta: Mapping[str, Any], row: _Row) -> None:
        if str(meta["weight_version"]) != str(self._policy_version):
            raise RuntimeError(
                f"SGLang generated for request {request_id!r} with weights {meta['weight_version']!r}; the engine serves "
                f"{self._policy_version}. Somebody else changed them"
            )
        reason = meta.get("finish_reason")
        if reason is not None and reason["type"] == "abort" and row.stop is None and not row.is_aborted:
            raise RuntimeError(f"SGLang gave up request {request_id!r}: {reason.get('message')}")

    def _take(self, row: _Row, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """The tokens that still belong to the response."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if row.stop is not None:
                return
            row.tokens.append(token)
            row.logprobs.append(logprob)
            repeats = row.detector is not None and row.detector.push(token)
            if token in self._stop_token_ids:
                row.stop = StopState.FINISHED
            elif repeats:
                row.stop = StopState.REPETITION
                self._has_changed.set()
            elif len(row.tokens) == row.request.max_new_tokens:
                row.stop = StopState.LENGTH
            if self._budget_left is not None:
                self._budget_left -= 1
                if self._budget_left == 0:
                    self._spend_out()

    def _spend_out(self) -> None:
        """No token is left: what runs ends with what it has, and what waits with nothing."""
        for row in self._running.values():
            row.stop = StopState.BUDGET if row.stop is None else row.stop
        for row in self._waiting:
            self._end(row, StopState.BUDGET)
        self._waiting.clear()
        self._has_changed.set()

    def _end(self, row: _Row, stop: StopState) -> None:
        row.stop = stop
        num = len(row.tokens)
        if self._config.record_routing and num and row.routed_experts is None:
            raise RuntimeError(f"SGLang did not say which experts the tokens of request {row.request.request_id!r} chose")
        completion = Completion(
            request_id=row.request.request_id,
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            stop=stop,
            policy_version=self._policy_version,
            routed_experts=row.routed_experts[:num] if row.routed_experts is not None and num else None,
        )
        del self._rows[row.request.request_id]
        self.ended.put(completion)

    def _experts(self, encoded: str, num_tokens: int) -> np.ndarray:
        """int16 [new tokens, MoE layers, experts per token]; SGLang counts the layers without experts too."""
        sparse, experts = self._architecture.sparse_layers, self._architecture.experts
        assert experts is not None
        rows = np.frombuffer(base64.b64decode(encoded), dtype=np.int32).reshape(-1, len(sparse), experts.num_experts_per_tok)
        return rows[:num_tokens, np.array(sparse)].astype(np.int16)

    async def _abort_cut(self) -> None:
        """Tell the server what need not go on."""
        while True:
            await self._has_changed.wait()
            cut = [name for name, row in self._running.items() if row.is_aborted or _is_cut(row)]
            if cut and len(cut) == len(self._running) and not self._waiting:
                await self._client.call("/abort_request", abort_all=True)
            else:
                for name in cut:
                    await self._client.call("/abort_request", rid=name)
            if cut:
                await asyncio.sleep(_ABORT_EVERY_S)
            else:
                self._has_changed.clear()

    async def _watch(self) -> None:
        timeout_s = self._config.sglang.stall_timeout_s
        while True:
            await asyncio.sleep(min(_WATCH_S, timeout_s))
            if self._running and time.monotonic() > self._heard_s + timeout_s:
                raise ServerStalledError(f"generated nothing for rollout.sglang.stall_timeout_s={timeout_s:g} s and was killed")


def _is_cut(row: _Row) -> bool:
    """Whether the server goes on with what this side has ended."""
    return row.stop in (StopState.BUDGET, StopState.REPETITION)


async def _all_or_first_error(tasks: Iterable[asyncio.Task[None]], *, until: Collection[asyncio.Task[None]]) -> None:
    """Return once all of `until` are done; raise the first error of any."""
    pending = set(tasks)
    while not all(task.done() for task in until):
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
