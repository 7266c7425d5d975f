"""Callers that share one engine: what becomes of their requests while it generates, fails, dies and is closed."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import pytest

from tandem.engine.types import Completion, EngineDiedError, GenerationRequest, StopState
from tandem.engine.waves import Waves

PATIENCE_S = 60.0


class Held:
    """A rollout engine whose waves begin when the test says so, and end at `abort` or by themselves."""

    def __init__(self) -> None:
        self.policy_version, self.is_alive, self.num_loads, self.num_restarts = -1, True, 0, 0
        self.may_go_on, self.has_begun = threading.Event(), threading.Event()
        self.waves = list[list[str]]()
        self.fault: Exception | None = None
        self.is_closed = False

    def load(self) -> None:
        self.num_loads, self.policy_version = self.num_loads + 1, 0

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Iterator[Completion]:
        self.waves.append([request.request_id for request in requests])
        self.has_begun.set()
        assert self.may_go_on.wait(PATIENCE_S)
        for request in requests:
            if self.fault is not None:
                fault, self.fault = self.fault, None
                raise fault
            yield Completion(request_id=request.request_id, token_ids=(), logprobs=(), stop=StopState.LENGTH, policy_version=0)

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        self.may_go_on.set()

    def restart(self) -> None:
        self.num_restarts, self.is_alive, self.policy_version = self.num_restarts + 1, True, -1

    def close(self) -> None:
        self.is_closed = True


def requests(*names: str) -> list[GenerationRequest]:
    return [GenerationRequest(request_id=name, token_ids=(1,), num_prefix_tokens=0, max_new_tokens=1, seed=0) for name in names]


@pytest.fixture
def engine() -> Held:
    return Held()


@pytest.fixture
def waves(engine: Held) -> Iterator[Waves]:
    waves = Waves(engine, engine.load)  # pyright: ignore[reportArgumentType]
    yield waves
    waves.close()


def test_what_arrives_while_a_wave_is_generated_is_the_next_one_and_each_caller_gets_its_own(engine: Held, waves: Waves) -> None:
    first = waves.submit(requests("a", "b"))
    assert engine.has_begun.wait(PATIENCE_S)
    later = [waves.submit(requests("c")), waves.submit(requests("d", "e"))]
    engine.may_go_on.set()
    got = [[completion.request_id for completion in job.future.result(PATIENCE_S)] for job in (first, *later)]
    assert got == [["a", "b"], ["c"], ["d", "e"]]
    assert engine.waves == [["a", "b"], ["c", "d", "e"]]


def test_a_caller_that_waits_may_go_away_unseen(engine: Held, waves: Waves) -> None:
    first = waves.submit(requests("a"))
    assert engine.has_begun.wait(PATIENCE_S)
    waves.cancel(waves.submit(requests("b")))
    last = waves.submit(requests("c"))
    engine.may_go_on.set()
    assert first.future.result(PATIENCE_S)
    assert last.future.result(PATIENCE_S)
    assert engine.waves == [["a"], ["c"]]


def test_an_engine_that_died_costs_its_wave_and_has_its_weights_for_the_next(engine: Held, waves: Waves) -> None:
    engine.may_go_on.set()
    engine.fault, engine.is_alive = EngineDiedError("killed"), True
    with pytest.raises(EngineDiedError, match="killed"):
        waves.submit(requests("a", "b")).future.result(PATIENCE_S)
    engine.is_alive = False
    assert waves.submit(requests("c")).future.result(PATIENCE_S)
    assert (engine.num_restarts, engine.num_loads) == (1, 2)


def test_closing_ends_what_runs_and_what_waits(engine: Held, waves: Waves) -> None:
    """Held in the middle of a wave, so that what was submitted after it began is certain to wait."""
    running = waves.submit(requests("a"))
    assert engine.has_begun.wait(PATIENCE_S)
    waiting = waves.submit(requests("b"))
    waves.close()
    assert running.future.result(PATIENCE_S)
    with pytest.raises(CancelledError):
        waiting.future.result(PATIENCE_S)
    with pytest.raises(CancelledError):
        waves.submit(requests("c")).future.result(PATIENCE_S)
    assert (engine.waves, engine.is_closed, waves.is_alive) == ([["a"]], True, False)
