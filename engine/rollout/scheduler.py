"""Continuous batching: responses take a row of the batch when one is free and leave it when they end.

Everything is decided by the requests and their order: admission is first come, first served; the rows of a step are
all that are active; what ends in the same step ends in the order of the requests. Rows are kept dense, and re-sorted by length when
their attention would be mostly padding.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch

from tandem.engine.config import RolloutConfig
from tandem.engine.rollout.inference import ATTENTION_ROWS, InferenceModel
from tandem.engine.rollout.kv_cache import KVCache
from tandem.engine.rollout.recorded import Ended, RecordedRows
from tandem.engine.rollout.repetition import rule_of
from tandem.engine.rollout.sampling import sample, uniforms
from tandem.engine.rollout.weights import ModelWeights
from tandem.engine.types import GenerationRequest, StopState
from tandem.kernels.repetition import BatchedDetector

# Sorting moves the whole cache once; a step reads it once. Sorting at most every so many steps keeps its cost in the noise.
_STEPS_BETWEEN_SORTS = 16
_PADDING_BEFORE_SORT = 1.15  # padded over true keys

Poll = Callable[[], Collection[str]]


class Scheduler:
    """Runs one list of requests to its end on one version of the weights."""

    def __init__(
        self,
        model: InferenceModel,
        weights: ModelWeights,
        config: RolloutConfig,
        requests: Sequence[GenerationRequest],
        *,
        stop_token_ids: Collection[int],
        token_budget: int | None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._config = config
        self._requests = requests
        self._stop_token_ids = np.array(sorted(stop_token_ids), dtype=np.int64)
        self._budget_left = token_budget
        self._queue = deque(range(len(requests)))
        num_rows = max(1, min(config.max_batch, len(requests)))
        length = max((len(r.token_ids) + r.max_new_tokens for r in requests), default=1)
        longest_new = max((r.max_new_tokens for r in requests), default=1)
        self._cache = KVCache(model.architecture, model.dtype, num_rows, length)
        self._repetition = BatchedDetector(rule_of(config.repetition), num_rows)
        self._recorded = RecordedRows(requests)
        self._num_active = 0  # rows that compute
        self._steps_since_sort = 0
        # Row state: rows 0 … num_active-1 are in use.
        self._index = np.zeros(num_rows, dtype=np.int64)  # which request
        self._position = np.zeros(num_rows, dtype=np.int64)  # tokens in the cache
        self._token = np.zeros(num_rows, dtype=np.int64)  # the newest token, not in the cache yet
        self._num_new = np.zeros(num_rows, dtype=np.int64)
        self._max_new = np.zeros(num_rows, dtype=np.int64)
        self._seed = np.zeros(num_rows, dtype=np.uint64)
        self._temperature = np.zeros(num_rows, dtype=np.float64)
        self._new_tokens = np.zeros((num_rows, longest_new), dtype=np.int32)
        self._new_logprobs = np.zeros((num_rows, longest_new), dtype=np.float32)
        self._new_experts = np.empty(num_rows, dtype=object)  # lists of int16 [X, K], one for each new token
        self._state = (
            self._index,
            self._position,
            self._token,
            self._num_new,
            self._max_new,
            self._seed,
            self._temperature,
            self._new_tokens,
            self._new_logprobs,
            self._new_experts,
        )

    def run(self, poll_aborted: Poll) -> Iterator[list[Ended]]:
        """Yield what ended after each step that ended something. `poll_aborted` is asked between steps for ids to abort."""
        while self._queue or self._num_active or self._recorded:
            ended = self._abort(poll_aborted())
            if self._budget_left == 0:
                ended += self._end_all(StopState.BUDGET)
            else:
                ended += self._admit()
                ended += self._step()
            if ended:
                yield sorted(ended, key=lambda end: end.index)

    def _admit(self) -> list[Ended]:
        """Fill free rows in request order. What a row needs in its cache is copied from a row with the same prompt, if any."""
        ended: list[Ended] = []
        holders: dict[tuple[int, ...], int] | None = None
        copies: list[tuple[int, int, int]] = []
        prompts: list[np.ndarray] = []
        rows: list[int] = []
        while self._queue and self._num_active + len(self._recorded) < len(self._index):
            index = self._queue.popleft()
            request = self._requests[index]
            if request.max_new_tokens == 0:
                ended.append(_nothing(index, StopState.LENGTH))
                continue
            if request.recorded is not None:
                self._recorded.admit(index)
                continue
            if holders is None:
                active = self._index[: self._num_active].tolist()
                holders = {self._requests[i].token_ids: row for row, i in enumerate(active)}
            row = self._num_active
            self._num_active += 1
            # The last prompt token is decoded like any other, so the prefill leaves it out.
            num_cached = len(request.token_ids) - 1
            holder = holders.setdefault(request.token_ids, row)
            if holder != row:
                copies.append((holder, row, num_cached))
            elif num_cached:
                prompts.append(np.array(request.token_ids[:-1], dtype=np.int64))
                rows.append(row)
            self._index[row] = index
            self._position[row] = num_cached
            self._token[row] = request.token_ids[-1]
            self._num_new[row] = 0
            self._new_experts[row] = []
            self._max_new[row] = request.max_new_tokens
            self._seed[row] = request.seed
            self._temperature[row] = self._config.temperature if request.temperature is None else request.temperature
            self._repetition.reset(row, request.token_ids[len(request.token_ids) - request.num_prefix_tokens :])
        self._model.prefill(self._weights, self._cache, prompts, rows)
        for source, target, num_tokens in copies:
            self._cache.copy_row(source, target, num_tokens)
        return ended

    def _step(self) -> list[Ended]:
        """One token for every active request that the budget still covers: the earliest requests get the last ones."""
        indices = self._recorded.indices
        active = [*self._index[: self._num_active].tolist(), *indices]
        chosen: set[int] | None = None
        if self._budget_left is not None:
            if self._budget_left < len(active):
                chosen = set(sorted(active)[: self._budget_left])
            self._budget_left -= len(active) if chosen is None else len(chosen)
        ended = self._recorded.step(indices if chosen is None else [index for index in indices if index in chosen])
        return ended + self._decode(chosen) if self._num_active else ended

    def _decode(self, chosen: set[int] | None) -> list[Ended]:
        """Decode one token in every row that computes; only the requests in `chosen` keep it (None: all)."""
        self._sort_rows()
        n = self._num_active
        logits, experts = self._model.decode(self._weights, self._cache, torch.from_numpy(self._token[:n]), self._position[:n])
        random = uniforms(self._seed[:n], self._num_new[:n])
        tokens, logprobs = sample(logits, random, self._temperature[:n], top_k=self._config.top_k, top_p=self._config.top_p)
        rows = np.arange(n) if chosen is None else np.flatnonzero([index in chosen for index in self._index[:n].tolist()])
        self._new_tokens[rows, self._num_new[rows]] = tokens[rows]
        self._new_logprobs[rows, self._num_new[rows]] = logprobs[rows]
        if self._config.record_routing:
            experts_BXK = torch.stack(experts, dim=1).to(torch.int16).numpy()
            for row in rows.tolist():
                self._new_experts[row].append(experts_BXK[row])
        self._num_new[rows] += 1
        self._token[rows] = tokens[rows]
        self._position[rows] += 1
        # Rows beyond the budget's end are pushed a token they do not keep; they end with BUDGET before the next step.
        repeats = self._repetition.push(tokens)
        stopped = np.isin(tokens, self._stop_token_ids)
        full = self._num_new[:n] >= self._max_new[:n]
        ended = []
        for row in rows[(stopped | full | repeats)[rows]].tolist():
            state = StopState.FINISHED if stopped[row] else StopState.REPETITION if repeats[row] else StopState.LENGTH
            ended.append((row, state))
        return self._leave(ended)

    def _abort(self, request_ids: Collection[str]) -> list[Ended]:
        if not request_ids:
            return []
        rows = [(row, StopState.ABORTED) for row in range(self._num_active) if self._requests[self._index[row]].request_id in request_ids]
        ended = self._leave(rows)
        recorded = [index for index in self._recorded.indices if self._requests[index].request_id in request_ids]
        ended += self._recorded.leave(recorded, StopState.ABORTED)
        waiting = [i for i in self._queue if self._requests[i].request_id in request_ids]
        self._queue = deque(i for i in self._queue if i not in set(waiting))
        return ended + [_nothing(i, StopState.ABORTED) for i in waiting]

    def _end_all(self, stop: StopState) -> list[Ended]:
        ended = self._leave([(row, stop) for row in range(self._num_active)])
        ended += self._recorded.leave(self._recorded.indices, stop)
        ended += [_nothing(i, StopState.LENGTH if self._requests[i].max_new_tokens == 0 else stop) for i in self._queue]
        self._queue.clear()
        return ended

    def _leave(self, rows: list[tuple[int, StopState]]) -> list[Ended]:
        """Take rows (ascending) out of the batch; the last rows move into the holes."""
        ended = []
        for row, stop in rows:
            num_new = self._num_new[row]
            tokens, logprobs = self._new_tokens[row, :num_new].copy(), self._new_logprobs[row, :num_new].copy()
            experts = self._new_experts[row]
            ended.append(Ended(int(self._index[row]), tokens, logprobs, stop, np.stack(experts) if experts else None))
        for row, _ in reversed(rows):
            self._num_active -= 1
            last = self._num_active
            if row != last:
                self._cache.copy_row(last, row, int(self._position[last]))
                for array in self._state:
                    array[row] = array[last]
                self._repetition.move(last, row)
        return ended

    def _sort_rows(self) -> None:
        """Put rows of similar length side by side when that saves enough attention."""
        self._steps_since_sort += 1
        n = self._num_active
        if n <= ATTENTION_ROWS or self._steps_since_sort < _STEPS_BETWEEN_SORTS:
            return
        lengths = self._position[:n] + 1
        if _num_padded(lengths) <= _PADDING_BEFORE_SORT * _num_padded(np.sort(lengths)[::-1]):
            return
        self._steps_since_sort = 0
        order = np.argsort(-lengths, kind="stable")
        self._cache.permute(torch.from_numpy(order), int(lengths.max()))
        for array in self._state:
            array[:n] = array[order]
        self._repetition.permute(order)


def _num_padded(lengths: np.ndarray) -> int:
    """Keys that attention touches when rows are cut into chunks in this order."""
    chunks = (lengths[i : i + ATTENTION_ROWS] for i in range(0, len(lengths), ATTENTION_ROWS))
    return sum(int(chunk.max()) * len(chunk) for chunk in chunks)


def _nothing(index: int, stop: StopState) -> Ended:
    return Ended(index, np.zeros(0, np.int32), np.zeros(0, np.float32), stop)
