"""What a rank does to itself at a counted moment of its run, so that a test finds it there however fast the machine is.

Each function is called in the rank before it trains (`prepare` of tests/launched.py).
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.data.journal import SegmentJournal, SegmentKey
from tandem.engine.log import RunLog
from tandem.engine.types import Completion

Act = Callable[[], None]
AT_ITS_END = sys.maxsize  # more function calls than anything makes


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Until somebody sends SIGCONT; `Launched.wait_until_stopped` waits for it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def in_phase(wanted: str, act: Act, *, num_passed: int = 0, num_calls: int = 0) -> None:
    """Act within a phase of the run (`RunLog.phase`), once the main thread has called `num_calls` functions in it, or at its end.

    `num_passed` phases of that name are let pass.
    """
    phase, num_begun = RunLog.phase, 0

    @contextlib.contextmanager
    def watched(self: RunLog, name: str, **args: Any) -> Iterator[dict[str, Any]]:
        nonlocal num_begun
        num_begun += name == wanted
        is_the_one = name == wanted and num_begun == num_passed + 1
        with phase(self, name, **args) as yielded, _acting(act, num_calls) if is_the_one else contextlib.nullcontext():
            yield yielded

    RunLog.phase = watched


def in_save(act: Act, *, num_passed: int = 0, num_calls: int = 0) -> None:
    """As `in_phase`, in the thread that writes a checkpoint while the run goes on."""
    work, num_begun = CheckpointSaver._work, 0

    def watched(self: CheckpointSaver, job: Any) -> None:
        nonlocal num_begun
        num_begun += 1
        with _acting(act, num_calls) if num_begun == num_passed + 1 else contextlib.nullcontext():
            work(self, job)

    CheckpointSaver._work = watched


def after_segment(act: Act, *, num_segments: int, iteration: int = 0) -> None:
    """Act once this leader has recorded so many segments of an iteration in its journal: its engine goes on generating."""
    record, num_recorded = SegmentJournal.record, 0

    def watched(self: SegmentJournal, key: SegmentKey, digest: bytes, completion: Completion) -> None:
        nonlocal num_recorded
        record(self, key, digest, completion)
        num_recorded += key.iteration == iteration
        if key.iteration == iteration and num_recorded == num_segments:
            act()

    SegmentJournal.record = watched


@contextlib.contextmanager
def _acting(act: Act, num_calls: int) -> Iterator[None]:
    """Act once, when this thread has called so many functions in the block, at the latest at its end; not if it ends in an error."""
    left = num_calls

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        if event in ("call", "c_call"):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                act()

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
    if left >= 0:
        act()
