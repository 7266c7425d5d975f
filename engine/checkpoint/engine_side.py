"""A rollout engine's part of a shared GPU: what it releases, what it asks for when it takes that back, and what it may keep."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.engine.log import RunLog
from tandem.engine.types import DeviceMemoryError, EngineDiedError

CACHE = "kv_cache"  # comes back last: it takes what the trainer's parameters leave


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Bytes that are in use at one moment, as one rank sees them."""

    trainer_bytes: int  # of the trainer's storages on its device
    process_bytes: int  # of the rank: on its GPU; without one, in the machine's memory
    arena_bytes: int  # of host memory that holds the trainer's state while it sleeps
    device_bytes: int | None = None  # of the GPU, by all processes; None without one
    free_bytes: int | None = None  # of the GPU
    others_bytes: int | None = None  # of the GPU, by all processes but this one and what was there before the run


class SleepingEngine(Protocol):
    """An engine that can give up memory."""

    @property
    def parts(self) -> Sequence[str]:
        """What it releases, in this order; nothing where it keeps its memory."""
        ...

    @property
    def released(self) -> Collection[str]:
        """Parts that it has released and not resumed. A server that was replaced has released nothing."""
        ...

    def release(self, part: str) -> None:
        """Raises: EngineDiedError."""
        ...

    def resume(self, part: str) -> None:
        """Raises: EngineDiedError."""
        ...


class EngineSide:
    """Of one leader rank.

    Args:
        budget_bytes: what the engine's processes may keep of the GPU while they sleep.
        measure: what is in use now.
    """

    def __init__(self, engine: SleepingEngine, *, budget_bytes: int, measure: Callable[[], Resident], log: RunLog) -> None:
        self._engine, self._budget_bytes, self._measure, self._log = engine, budget_bytes, measure, log
        self._wanted: dict[str, int] = {}  # bytes that a part gave up when it last did

    def release(self) -> None:
        """Let the engine release what it can. Raises: DeviceMemoryError when more than the budget stays."""
        for part in self._engine.parts:
            if part not in self._engine.released:
                before = self._measure().free_bytes
                self._ask("release", part)
                after = self._measure().free_bytes
                self._wanted[part] = after - before if before is not None and after is not None else 0
        left = self._measure().others_bytes
        if self._engine.parts and left is not None and left > self._budget_bytes:
            raise DeviceMemoryError(
                f"the rollout engine sleeps and still has {left:,} bytes of the GPU (with other processes on it, if there are any), and "
                f"swap.sleep_budget_bytes allows {self._budget_bytes:,}; set rollout.sglang.release=all, or raise the budget"
            )

    def resume_for_weights(self, make_room: Callable[[], None]) -> None:
        """Take back what a swap writes into. See `resume_cache`."""
        for part in reversed(self._engine.parts):
            if part != CACHE:
                self._resume(part, make_room)

    def resume_cache(self, make_room: Callable[[], None]) -> None:
        """Take back the cache.

        Args:
            make_room: called if the GPU has too little memory; waits for what is on its way off it.
        Raises: DeviceMemoryError, before the engine is asked: one that finds too little dies of it.
        """
        self._resume(CACHE, make_room)

    def _resume(self, part: str, make_room: Callable[[], None]) -> None:
        if part not in self._engine.released:
            return
        wanted, free = self._wanted.get(part, 0), self._measure().free_bytes
        if free is not None and wanted > free:
            make_room()
            free = self._measure().free_bytes
        if free is not None and wanted > free:
            raise DeviceMemoryError(
                f"the rollout engine cannot wake: {wanted:,} bytes of its {part} are to return to the GPU, where {free:,} are free; lower "
                "rollout.sglang.memory_fraction, rollout.sglang.kv_tokens or swap.bucket_bytes, or end other processes on this GPU"
            )
        self._ask("resume", part)

    def _ask(self, what: str, part: str) -> None:
        """An engine that is gone holds nothing. The swap, or who generates, finds out and replaces it."""
        try:
            self._engine.release(part) if what == "release" else self._engine.resume(part)
        except EngineDiedError as error:
            self._log.event("engine died", what=f"{what} {part}", error=str(error))
            print(f"The rollout engine died when it was to {what} its {part}: {error}", flush=True)
