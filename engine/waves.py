"""One rollout engine for many callers, which ask at any time.

An engine takes one list of requests at a time. What arrives while it generates therefore waits, and all that waits is the next wave: one
list, decoded together in one continuous batch. A long response holds up those that arrive after its wave began, and only those.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from tandem.engine.types import Completion, GenerationRequest, RolloutEngine

_CLOSE_TIMEOUT_S = 30.0


@dataclass(eq=False, slots=True)
class Job:
    """Requests of one caller. The future holds their completions, in the order of the requests."""

    requests: tuple[GenerationRequest, ...]
    future: "Future[list[Completion]]" = field(default_factory=Future)
    ended: dict[str, Completion] = field(default_factory=dict)


class Waves:
    """Owns the engine. `submit` and `cancel` may be called from any thread."""

    def __init__(self, engine: RolloutEngine, load: Callable[[], None]) -> None:
        """
        Args:
            load: gives the engine its weights; called again after it died.
        """
        self._engine, self._load = engine, load
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._is_closing = False
        load()
        self._thread = threading.Thread(target=self._run, daemon=True, name="waves")
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered, were it after a restart of the engine."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, requests: Sequence[GenerationRequest]) -> Job:
        """Ids must differ from those of all other requests. The future raises what `generate` raises; `close` cancels what waits."""
        job = Job(tuple(requests))
        self._queue.put(job)
        if not self.is_alive:
            job.future.cancel()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for this any more. Once it runs, it ends early with what it has; call again until the future is done."""
        if not job.future.cancel():
            self._engine.abort([request.request_id for request in job.requests])

    def close(self) -> None:
        """End what runs and what waits, and the engine."""
        self._is_closing = True
        self._queue.put(None)
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._engine.abort()  # again and again: a wave may be about to begin
            self._thread.join(0.1)
        self._engine.close()

    def _run(self) -> None:
        while not self._is_closing:
            jobs = [self._queue.get()]
            while not self._queue.empty():
                jobs.append(self._queue.get())
            if self._is_closing:
                _cancel(jobs)
            elif wave := [job for job in jobs if job is not None and job.future.set_running_or_notify_cancel()]:
                self._generate(wave)
        while not self._queue.empty():  # what arrived during the last wave
            _cancel([self._queue.get()])

    def _generate(self, wave: list[Job]) -> None:
        job_of = {request.request_id: job for job in wave for request in job.requests}
        try:
            if not self._engine.is_alive:
                self._engine.restart()
            if self._engine.policy_version < 0:
                self._load()
            for completion in self._engine.generate([request for job in wave for request in job.requests]):
                job = job_of[completion.request_id]
                job.ended[completion.request_id] = completion
                if len(job.ended) == len(job.requests):
                    job.future.set_result([job.ended[request.request_id] for request in job.requests])
        # Whatever it is, it is these requests' end and not the server's: the next wave starts anew.
        except Exception as error:
            _fail(wave, error)


def _cancel(jobs: Sequence[Job | None]) -> None:
    for job in jobs:
        if job is not None:
            job.future.cancel()


def _fail(jobs: Sequence[Job], error: Exception) -> None:
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)
