"""One generation on SGLang servers: requests in their order, at most so many at a time, and a token budget that is met exactly.

Tokens count when they arrive. What comes after the budget is spent, or after a response was found to repeat itself, is thrown away: at
most `rollout.sglang.stream_interval` tokens per running response, and those of the steps until the server heeds the abort.

There may be several servers (fleet.py), which come and go. Each request is handed to the one that is least loaded. What a lost server
was generating goes to the others with the tokens that it has, as if it had been cut there: its seed and the position decide each token.
"""

import asyncio
import base64
import bisect
import functools
import queue
import time
import uuid
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tandem.engine.architecture import Architecture
from tandem.engine.config import RolloutConfig
from tandem.engine.rollout.repetition import RepetitionDetector
from tandem.engine.rollout.sglang_client import ServerGoneError, SGLangClient
from tandem.engine.rollout.sglang_members import GivenUpError, Keeper, Member, Row, ServerStalledError
from tandem.engine.types import Completion, GenerationRequest, StopState

_ABORT_EVERY_S = 0.1  # an abort that overtakes its request is not heeded: it is sent again while the request runs
_WATCH_S = 1.0
_MAX_MOVES = 100  # of one request between servers; more mean that it is the request's fault


class Generation:
    """Runs in the client's thread. `ended` gets every completion, and then None or the error that ended the generation.

    Args:
        members: the servers; without a `keeper` exactly one, whose loss ends the generation.
    """

    def __init__(
        self,
        config: RolloutConfig,
        requests: Sequence[GenerationRequest],
        members: Sequence[Member],
        *,
        stop_token_ids: Collection[int],
        architecture: Architecture,
        token_budget: int | None,
        policy_version: int,
        keeper: Keeper | None = None,
    ) -> None:
        self._config, self._policy_version, self._keeper = config, policy_version, keeper
        self._stop_token_ids, self._architecture = frozenset(stop_token_ids), architecture
        self._budget_left = token_budget
        self._rows = {request.request_id: Row(index=index, request=request) for index, request in enumerate(requests)}
        self._waiting = deque[Row]()
        self.members = list(members)
        self._error: BaseException | None = None
        self._last_loss: Exception | None = None
        self._has_changed = asyncio.Event()  # something is to be aborted on a server
        self._wake = asyncio.Event()  # a request has ended, or the servers are others
        self.ended: queue.SimpleQueue[Completion | Exception | None] = queue.SimpleQueue()

    async def run(self) -> None:
        """The whole generation. Its errors go to `ended`."""
        try:
            self._take_recorded()
            if self._budget_left == 0:
                self._spend_out()
            for member in self.members:
                member.heard_s = time.monotonic()
            helpers = [asyncio.create_task(self._abort_cut()), asyncio.create_task(self._watch())]
            for task in helpers:
                task.add_done_callback(self._note_end)
            try:
                while self._rows and self._error is None:
                    self._hand_out()
                    await self._wake.wait()
                    self._wake.clear()
            finally:
                tasks = [*helpers, *(task for member in self.members for task in member.tasks.values())]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            if self._error is not None:
                raise self._error
        except asyncio.CancelledError:
            self.ended.put(RuntimeError("the SGLang client was closed"))
            raise
        except Exception as error:
            self.ended.put(error)
        else:
            self.ended.put(None)

    def completions(self, client: SGLangClient) -> Iterator[Completion]:
        """Run in the client's thread. Closing the iterator aborts what is left. Raises: what ended the generation."""
        client.submit(self.run())
        is_over = False
        try:
            while isinstance(ended := self.ended.get(), Completion):
                yield ended
            is_over = True
            if ended is not None:
                raise ended
        finally:
            if not is_over:
                client.submit(self.abort(None))
                while isinstance(self.ended.get(), Completion):
                    continue

    def add(self, member: Member) -> None:
        """Another server. In the client's thread, as `lose` and `wake`."""
        member.heard_s = time.monotonic()
        self.members.append(member)
        self._wake.set()

    def lose(self, member: Member, error: Exception) -> None:
        """The server is gone, or of no use: what it was generating goes to the others. Raises `error` without a keeper."""
        if self._keeper is None:
            raise error
        if member.is_lost:
            return
        member.is_open, member.is_lost, self._last_loss = False, True, error
        self._keeper.lost(member, error)
        for task in member.tasks.values():
            if task is not asyncio.current_task():
                task.cancel()
        self.wake()

    def wake(self) -> None:
        """Look again who takes requests."""
        self._wake.set()

    def _hand_out(self) -> None:
        """Let the servers that have room take what waits."""
        while self._waiting:
            free = [member for member in self.members if member.is_open and len(member.running) < member.capacity]
            if not free:
                break
            member, row = min(free, key=lambda m: len(m.running) / m.capacity), self._waiting.popleft()
            name = uuid.uuid4().hex  # never used twice: SGLang aborts a streamed request's id again, two seconds after its end
            member.running[name] = row
            task = asyncio.create_task(self._work(member, name, row))
            member.tasks[name] = task
            task.add_done_callback(functools.partial(self._settle, member, name, row))
        is_stuck = self._waiting and not any(member.is_open or member.running for member in self.members)
        if is_stuck and not (self._keeper is not None and self._keeper.expects_member):
            raise self._last_loss if self._last_loss is not None else ServerGoneError("there is no server")

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and self._error is None:
            self._error = task.exception()
        self._wake.set()

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
        self._wake.set()

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

    async def _work(self, member: Member, name: str, row: Row) -> None:
        """One request on one server, to its end or the server's."""
        try:
            await self._generate(member, name, row)
        except ServerGoneError as error:
            self.lose(member, error)
            self._take_back(row)
        except GivenUpError:
            if self._keeper is None or row.num_moves >= _MAX_MOVES:
                raise
            self._take_back(row)
        except RuntimeError as error:
            if member.is_own:
                raise
            self.lose(member, error)
            self._take_back(row)
        else:
            if row.stop is None and not row.is_aborted:
                raise RuntimeError(f"SGLang ended request {row.request.request_id!r} before it was complete")
            self._end(row, row.stop if row.stop is not None else StopState.ABORTED)

    def _settle(self, member: Member, name: str, row: Row, task: asyncio.Task[None]) -> None:
        """Not part of `_work`: a task that is cancelled before its first step never begins."""
        del member.running[name], member.tasks[name]
        if task.cancelled() and member.is_lost:
            self._take_back(row)
        self._note_end(task)

    def _take_back(self, row: Row) -> None:
        """A server did not end this request: it waits for another with what it has, unless nothing more is wanted of it."""
        row.num_moves += 1
        if self._config.record_routing and row.routed_experts is None and (row.stop is not None or row.is_aborted):
            self._budget_left = None if self._budget_left is None else self._budget_left + len(row.tokens)
            row.tokens, row.logprobs, row.stop, row.detector = [], [], None, None  # nobody says which experts they chose
        if row.stop is not None or row.is_aborted:
            self._end(row, row.stop if row.stop is not None else StopState.ABORTED)
        else:
            row.routed_experts = None  # the next server computes all positions, and tells of all
            bisect.insort(self._waiting, row, key=lambda other: other.index)

    async def _generate(self, member: Member, name: str, row: Row) -> None:
        request, config = row.request, self._config
        if row.detector is None and (config.repetition.max_period or config.repetition.ngram):
            before = request.token_ids[len(request.token_ids) - request.num_prefix_tokens :]
            row.detector = RepetitionDetector(config.repetition, before)
        fields: dict[str, Any] = {"rid": name, "input_ids": [*request.token_ids, *row.tokens], "return_logprob": True}
        fields["sampling_params"] = self._sampling(request, request.max_new_tokens - len(row.tokens))
        if request.images:
            fields["image_data"] = [base64.b64encode(image.read()).decode() for image in request.images]
        if config.record_routing:
            fields |= {"return_routed_experts": True, "routed_experts_start_len": len(request.token_ids) - 1}
        async for event in member.client.stream(**fields):
            member.heard_s = time.monotonic()
            meta = event["meta_info"]
            self._check(request.request_id, meta, row)
            # Streamed parts bring their own tokens; an abort's last part may bring none.
            member.num_tokens += len(event["output_ids"])
            self._take(row, event["output_ids"], [entry[0] for entry in meta["output_token_logprobs"]])
            if meta.get("routed_experts"):
                row.routed_experts = self._experts(meta["routed_experts"], len(row.tokens))

    def _sampling(self, request: GenerationRequest, max_new_tokens: int) -> dict[str, Any]:
        config = self._config
        temperature = config.temperature if request.temperature is None else request.temperature
        sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": config.top_p if temperature else 1.0,
            "top_k": config.top_k if config.top_k and temperature else -1,
            "stop_token_ids": sorted(self._stop_token_ids),
            "ignore_eos": not self._stop_token_ids,
            "stream_interval": config.sglang.stream_interval,
        }
        return sampling | ({"sampling_seed": request.seed} if config.sglang.seed_sampling else {})

    def _check(self, request_id: str, meta: Mapping[str, Any], row: Row) -> None:
        if str(meta["weight_version"]) != str(self._policy_version):
            raise RuntimeError(
                f"SGLang generated for request {request_id!r} with weights {meta['weight_version']!r}; the engine serves "
                f"{self._policy_version}. Somebody else changed them"
            )
        reason = meta.get("finish_reason")
        if reason is not None and reason["type"] == "abort" and row.stop is None and not row.is_aborted:
            raise GivenUpError(f"SGLang gave up request {request_id!r}: {reason.get('message')}")

    def _take(self, row: Row, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
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
        for row in (row for member in self.members for row in member.running.values()):
            row.stop = StopState.BUDGET if row.stop is None else row.stop
        for row in self._waiting:
            self._end(row, StopState.BUDGET)
        self._waiting.clear()
        self._has_changed.set()

    def _end(self, row: Row, stop: StopState) -> None:
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
        """Tell the servers what need not go on."""
        while True:
            await self._has_changed.wait()
            is_cut = False
            for member in list(self.members):
                cut = [name for name, row in member.running.items() if row.is_aborted or _is_cut(row)]
                is_cut |= bool(cut)
                try:
                    await self._abort_on(member, cut)
                except ServerGoneError as error:
                    self.lose(member, error)
            if is_cut:
                await asyncio.sleep(_ABORT_EVERY_S)
            else:
                self._has_changed.clear()

    async def _abort_on(self, member: Member, names: Sequence[str]) -> None:
        # Where there is a keeper, other leaders may have requests on the same server.
        if names and self._keeper is None and len(names) == len(member.running) and not self._waiting:
            await member.client.call("/abort_request", abort_all=True)
        else:
            for name in names:
                await member.client.call("/abort_request", rid=name)

    async def _watch(self) -> None:
        timeout_s = self._config.sglang.stall_timeout_s
        while True:
            await asyncio.sleep(min(_WATCH_S, timeout_s))
            for member in self.members:
                if member.running and not member.is_lost and time.monotonic() > member.heard_s + timeout_s:
                    self.lose(member, ServerStalledError(f"generated nothing for rollout.sglang.stall_timeout_s={timeout_s:g} s"))


def _is_cut(row: Row) -> bool:
    """Whether the server goes on with what this side has ended."""
    return row.stop in (StopState.BUDGET, StopState.REPETITION)
