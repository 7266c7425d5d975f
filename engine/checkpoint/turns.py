"""Whose turn it is on the devices that trainer and rollout engines share, and what each side leaves there for the other.

    begin   trainer: gradients dropped, optimizer's state leaves      engines: memory for the weights comes back
    swap    the weights move; the optimizer's state goes on leaving meanwhile
    serve   trainer: parameters leave too                             engines: memory for the cache comes back
    end     engines release cache and weights                         trainer: everything comes back

All ranks take each step together: an engine may lie on the devices of several. After every sleep the bytes that the sleeping side still
has are measured and held against a budget. Where nothing is shared (a CPU, by default) only the measuring is left.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from tandem.engine.checkpoint.engine_side import EngineSide, Resident
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.log import RunLog
from tandem.engine.types import DeviceMemoryError

# What is measured when: the trainer awake; weights on both sides; the engines' turn; between two turns, where both sides sleep.
TRAIN, SWAP, SERVE, BETWEEN = "train", "swap", "serve", "between"


class SleepingTrainer(Protocol):
    """The trainer's side: `TrainerMemory`."""

    def begin_sleep(self) -> None: ...
    def sleep_optimizer(self) -> None: ...
    def end_sleep(self) -> None: ...
    def wake(self) -> None: ...


class Turns:
    """Wraps a run's `WeightSwap`. Every rank has one, and enters `serving` at the same points.

    Args:
        engine: of the engine that this rank leads, if it can release memory.
        sleeps: whether the trainer leaves its device while engines serve; the same on all ranks.
        budget_bytes: what the sleeping trainer may keep of its device.
        measure: what is in use now.
        gather: every rank's value, in rank order, on every rank.
    """

    def __init__(
        self,
        swap: WeightSwap,
        trainer: SleepingTrainer,
        engine: EngineSide | None,
        *,
        sleeps: bool,
        budget_bytes: int,
        measure: Callable[[], Resident],
        gather: Callable[[str], list[str]],
        log: RunLog,
    ) -> None:
        self._swap, self._trainer, self._engine = swap, trainer, engine
        self._sleeps, self._budget_bytes = sleeps, budget_bytes
        self._measure, self._gather, self._log = measure, gather, log
        self._is_serving = False
        self._phases: dict[str, Resident] = {}

    @contextlib.contextmanager
    def serving(self, policy_version: int) -> Iterator[None]:
        """`WeightSwap.serving`; the devices are the engines' in this block, and the trainer's again after it. Blocks nest: an inner one
        moves nothing, unless an engine was replaced.

        Raises: as `WeightSwap.serving`; DeviceMemoryError on every rank, naming rank, side and bytes. The trainer's state is then whole.
        """
        if self._is_serving:
            with self._swap.serving(policy_version):
                if self._sleeps:  # a swap for an engine that was replaced has brought the parameters back
                    self._together("sleep", self._end_sleep)
                yield
            return
        self._is_serving = True
        try:
            self._note(TRAIN)
            if self._sleeps:
                self._together("sleep", self._trainer.begin_sleep)
                self._together("engine wakes", self._resume_for_weights)
            with self._swap.serving(policy_version):
                if self._sleeps:
                    self._note(SWAP)
                    self._together("sleep", self._end_sleep)
                    self._together("engine wakes", self._resume_cache)
                self._note(SERVE)
                yield
            if self._sleeps:
                self._together("engine sleeps", self._release_engine)
                self._together("wake", self._trainer.wake)
        except Exception as error:
            self._recover(error)
            raise
        finally:
            self._is_serving = False

    def take_memory(self) -> dict[str, Resident]:
        """What was measured since the last call, by phase."""
        found, self._phases = self._phases, {}
        return found

    def _end_sleep(self) -> None:
        self._trainer.end_sleep()
        found = self._measure()
        left = found.trainer_bytes if found.device_bytes is None else max(found.trainer_bytes, found.process_bytes)
        if left > self._budget_bytes:
            raise DeviceMemoryError(
                f"phase {SERVE!r}: the trainer sleeps and still has {left:,} bytes of its device ({found.trainer_bytes:,} of them its own "
                f"tensors), and swap.sleep_budget_bytes allows {self._budget_bytes:,}; raise it, and lower rollout.sglang.memory_fraction "
                "by as much, or use fewer process groups (mesh)"
            )

    def _resume_for_weights(self) -> None:
        if self._engine is not None:
            self._engine.resume_for_weights(self._trainer.sleep_optimizer)

    def _resume_cache(self) -> None:
        if self._engine is not None:
            self._engine.resume_cache(self._trainer.end_sleep)

    def _release_engine(self) -> None:
        if self._engine is not None:
            self._engine.release()
        self._note(BETWEEN)

    def _together(self, phase: str, step: Callable[[], None]) -> None:
        """Take a step on all ranks, or raise on all of them what went wrong on any."""
        problem, cause = "", None
        with self._log.phase(phase):
            try:
                step()
            except Exception as error:  # whatever it is, the other ranks must not wait for this one
                problem, cause = str(error) or type(error).__name__, error
            found = [f"rank {rank}: {text}" for rank, text in enumerate(self._gather(problem)) if text]
        if found:
            raise DeviceMemoryError("; ".join(found)) from cause

    def _recover(self, error: Exception) -> None:
        """After an error the trainer is awake if there is room for it. If not, its state is whole on the host, and it says so."""
        if not self._sleeps:
            return
        if self._engine is not None:
            with contextlib.suppress(Exception):
                self._engine.release()
        try:
            self._trainer.wake()
        except Exception as second:
            error.add_note(f"The trainer could not be woken after that: {second}")

    def _note(self, phase: str) -> None:
        found = self._phases[phase] = self._measure()
        values = {name: value for name in Resident.__slots__ if (value := getattr(found, name)) is not None}
        self._log.counter("memory", **values)
        self._log.event("memory", phase=phase, **values)
