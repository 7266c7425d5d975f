"""Generating what groups lack with this leader's engine: through the journal, past engines that die, and until SIGTERM."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from tandem.engine.checkpoint.turns import Turns
from tandem.engine.data.journal import SegmentJournal, SegmentKey, segment_digest, settings_digest
from tandem.engine.elastic import Roster
from tandem.engine.errors import RunEnded
from tandem.engine.rollout.budget import generate_groups, sample_seed
from tandem.engine.run import Run
from tandem.engine.types import Completion, EngineDiedError, Group, RolloutEngine

# A rollout engine that dies this often in a row, without a finished phase between, ends the run.
MAX_ENGINE_DEATHS = 3
# What follows a rollout is thought to take so many times what it took in the iteration before.
SAFETY = 1.25


class Generation:
    """One per rank. The engine and its journal are the leader's; the others take part in what all ranks do together.

    Args:
        stop_token_ids: of the engine.
        leave: saves what the iteration started from and leaves the run, on all ranks together; called after SIGTERM.
        roster: tells the engine who else generates, where the run is elastic.
    """

    def __init__(
        self,
        run: Run,
        engine: RolloutEngine | None,
        journal: SegmentJournal,
        weights: Turns,
        *,
        stop_token_ids: Sequence[int],
        leave: Callable[[int], None],
        roster: Roster | None = None,
    ) -> None:
        self._run, self._engine, self._journal, self._weights, self._leave = run, engine, journal, weights, leave
        self._roster = roster
        self._settings = settings_digest(self._what_tokens_depend_on(stop_token_ids))
        self._num_deaths = 0  # of engines in a row
        self._has_died = self._was_cut = False
        self.num_tokens = 0  # that rollouts got since `begin_iteration`, by this leader
        self.num_reused = 0  # those of them that the journal had
        self._ended_s = math.nan  # when the newest phase did
        self.reserve_s = math.inf  # what all takes that follows a rollout, until the next checkpoint is written; unknown at first

    def begin_iteration(self, save_s: float) -> None:
        """Count anew, and replace an engine that died while it was idle. `save_s`: what the newest checkpoint took, NaN if unknown."""
        self.num_tokens = self.num_reused = 0
        rest_s = SAFETY * (time.monotonic() - self._ended_s + save_s)
        self.reserve_s = math.inf if math.isnan(rest_s) else rest_s
        if not self.replace_dead_engine("between two phases"):
            self._wait_for_engine()
        if self._roster is not None:
            self._roster.meet()

    def replace_dead_engine(self, when: str) -> bool:
        """Replace this leader's engine if it died, outside of a generation. Returns whether it had."""
        if self._engine is None or self._engine.is_alive:
            return False
        try:
            self._engine.wait_until_ready()  # of one that is dead: tells why
            error = EngineDiedError("its process ended")
        except EngineDiedError as died:
            error = died
        self._replace_engine(EngineDiedError(f"the rollout engine died {when}: {error}"))
        return True

    def generate(
        self, groups: Sequence[Group], step: int, *, token_budget: int | None = None, temperature: float | None = None
    ) -> Iterator[Group]:
        """Continue the responses of this leader's groups, of which other ranks have none; see `generate_groups`.

        A collective within `serving`: all ranks exhaust it. An engine that dies is replaced and gets the weights; what it had ended comes
        from the journal and the rest is generated again, so that the phase is what it would have been. With a temperature (evaluation)
        nothing is journalled. After SIGTERM the generation is cut and all ranks leave.
        """
        before = {group.serial: _num_tokens(group) for group in groups}
        yielded = set[int]()
        is_rollout = temperature is None
        num_reused_before, again = self.num_reused, True
        self._run.watchdog.call_when_stopping(self._cut, self.reserve_s)
        with contextlib.ExitStack() as stack:
            while again:
                self.num_reused = num_reused_before
                for group in self._attempt(groups, step, token_budget, temperature):
                    if group.serial in yielded or (self._has_died and not group.is_finished):
                        continue
                    yielded.add(group.serial)
                    if is_rollout:
                        self.num_tokens += _num_tokens(group) - before[group.serial]
                    self._run.log.progress("rollout" if is_rollout else "evaluate", len(yielded), len(groups))
                    yield group
                again, is_cut = self._run.any(self._has_died, self._was_cut)
                if is_cut:
                    self._leave(step)
                if again:
                    stack.enter_context(self._weights.serving(policy_version=step))
        self._num_deaths, self._ended_s = 0, time.monotonic()
        if is_rollout and self._engine is not None:
            self._run.log.event("rollout", step=step, tokens=self.num_tokens, reused_tokens=self.num_reused)
            if self.num_reused:
                print(f"rank {self._run.rank}: {self.num_reused} of {self.num_tokens} tokens had been generated before", flush=True)

    def _attempt(self, groups: Sequence[Group], step: int, token_budget: int | None, temperature: float | None) -> Iterator[Group]:
        self._has_died = False
        if self._engine is None or self._was_cut:
            return
        config = self._run.config
        try:
            weights_digest = self._engine.weights_digest
        except EngineDiedError as error:
            self._replace_engine(error)
            return
        recorded = on_completion = None
        if temperature is None and weights_digest is not None:
            recorded = functools.partial(self._recorded, step, weights_digest)
            on_completion = functools.partial(self._record, step, weights_digest)
        yield from generate_groups(
            self._engine,
            groups,
            config=config.rollout,
            context_length=config.model.context_length,
            seed_of=lambda group, sample, segment: sample_seed(config.seed, step, group, sample, segment),
            token_budget=token_budget,
            temperature=temperature,
            on_death=self._replace_engine,
            recorded=recorded,
            on_completion=on_completion,
        )

    def _recorded(self, step: int, weights_digest: str, group: Group, sample: int, segment: int) -> Completion | None:
        key = SegmentKey(step, group.serial, sample, segment)
        found = self._journal.find(key, segment_digest(self._settings, weights_digest, group, sample))
        self.num_reused += len(found.token_ids) if found is not None else 0
        return found

    def _record(self, step: int, weights_digest: str, group: Group, sample: int, segment: int, completion: Completion) -> None:
        key = SegmentKey(step, group.serial, sample, segment)
        self._journal.record(key, segment_digest(self._settings, weights_digest, group, sample), completion)
        self._run.watchdog.note("rollout")

    def _replace_engine(self, error: EngineDiedError) -> None:
        """Start another engine, which the next swap fills. Raises: RunEnded when one after the other dies."""
        self._num_deaths += 1
        if self._engine is None or self._num_deaths > MAX_ENGINE_DEATHS:
            times = f"died {self._num_deaths} times in a row, without a finished phase between, and is given up"
            raise RunEnded(f"rank {self._run.rank}: the rollout engine {times}. The last time: {error}") from error
        self._has_died = True
        self._run.log.event("engine died", rank=self._run.rank, error=str(error))
        print(f"rank {self._run.rank}: {error}\nIt is replaced, and what it was generating is generated again.", flush=True)
        self._engine.restart()
        self._wait_for_engine()

    def _wait_for_engine(self) -> None:
        """No swap waits for an engine to start: its deadlines are for moving weights."""
        if self._engine is not None:
            try:
                self._engine.wait_until_ready()
            except EngineDiedError as error:
                self._replace_engine(error)

    def _cut(self) -> None:
        """From the watchdog's thread: end what is running, for the grace period allows no more."""
        self._was_cut = True
        if self._engine is not None:
            self._engine.abort()

    def _what_tokens_depend_on(self, stop_token_ids: Sequence[int]) -> dict[str, object]:
        """Everything but weights, prompt and seed's variables; also what decides which responses the budget cuts."""
        run, config = self._run, self._run.config
        return {
            "rollout": dataclasses.asdict(config.rollout),
            "sampling": dataclasses.asdict(config.sampling),
            "context_length": config.model.context_length,
            "dtype": config.trainer.dtype,
            "seed": config.seed,
            "stop_token_ids": list(stop_token_ids),
            "leaders": list(run.leaders),
            "num_threads": run.num_threads,
            "torch": torch.__version__,
        }


def _num_tokens(group: Group) -> int:
    return sum(response.num_tokens for response in group.responses)
