"""Requests whose completion is known from an interrupted run: they take their turns and their tokens of the budget, and no arithmetic.

What the others get does not depend on whether these were computed, so the phase continues as it was, to the last bit and the last
completion's place in the order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.engine.types import Completion, GenerationRequest, StopState


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that ended: its position in the list of requests and what it got; see `Completion`."""

    index: int
    tokens: np.ndarray  # [n] int32
    logprobs: np.ndarray  # [n] float32
    stop: StopState
    routed_experts: np.ndarray | None = None


class RecordedRows:
    """The rows that such requests take at the moment."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._requests = requests
        self._num_taken: dict[int, int] = {}  # by request: tokens so far

    def __len__(self) -> int:
        return len(self._num_taken)

    @property
    def indices(self) -> list[int]:
        """The requests, by position in their list."""
        return list(self._num_taken)

    def admit(self, index: int) -> None:
        """Request `index` takes a row."""
        self._num_taken[index] = 0

    def step(self, chosen: Collection[int]) -> list[Ended]:
        """The chosen requests take one token each. Returns those that end with it.

        One that a budget cut waits for the budget's end; where this phase's goes further, it ends where it was cut.
        """
        ended: list[Ended] = []
        for index in chosen:
            self._num_taken[index] += 1
            completion = self._completion(index)
            num_left = len(completion.token_ids) - self._num_taken[index]
            if num_left < 0 or (num_left == 0 and completion.stop is not StopState.BUDGET):
                ended += self.leave([index], completion.stop)
        return ended

    def leave(self, indices: Collection[int], stop: StopState) -> list[Ended]:
        """These requests end with the tokens that they took so far."""
        return [_cut(index, self._completion(index), self._num_taken.pop(index), stop) for index in indices]

    def _completion(self, index: int) -> Completion:
        completion = self._requests[index].recorded
        assert completion is not None
        return completion


def _cut(index: int, completion: Completion, num_tokens: int, stop: StopState) -> Ended:
    tokens = np.array(completion.token_ids[:num_tokens], dtype=np.int32)
    logprobs = np.array(completion.logprobs[:num_tokens], dtype=np.float32)
    experts = completion.routed_experts
    return Ended(index, tokens, logprobs, stop, None if experts is None else experts[:num_tokens])
