"""What rank 0 shows while a run goes on: bars on a terminal, one line per iteration elsewhere."""

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

RECENT_STEPS = 8  # the time left is estimated from the median of so many iterations
REDRAWS_PER_S = 5
WARM_START_INTERVAL_S = 15.0  # a log file gets a line of the warm start no more often than this,
PROGRESS_INTERVAL_S = 60.0  # and one within a phase no more often than this: iterations of seconds have their own lines

# metric, label, format, unit
SHOWN = (
    ("rollout/reward", "reward", "{:.3f}", ""),
    ("eval/pass_at_1", "pass@1", "{:.3f}", ""),
    ("rollout/response_tokens", "length", "{:.1f}", " tokens"),
    ("rollout/tokens_per_s", "rollout", "{:,.0f}", " tokens/s"),
    ("reward_model/loss", "loss", "{:.4f}", " nats"),
    ("reward_model/accuracy", "accuracy", "{:.3f}", ""),
    ("reward_model/held_out_accuracy", "held out", "{:.3f}", ""),
    ("sft/loss", "SFT loss", "{:.4f}", " nats"),
)


class Display(Protocol):
    """Where progress is shown."""

    def phase(self, name: str) -> None:
        """The innermost phase changed; an empty name between phases."""
        ...

    def progress(self, phase: str, completed: float, total: float) -> None:
        """How much of the phase is done, in the phase's own unit. Called for every unit, so it must be cheap."""
        ...

    def step_done(self, step: int, values: Mapping[str, object], seconds: float) -> None:
        """An iteration (or, with step < 0, an update of the warm start) ended after so many seconds."""
        ...

    def say(self, text: str) -> None:
        """Show a line without disturbing the bars."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found."""
        ...


class SilentDisplay:
    """Shows nothing: every rank but the first, or log.progress=False."""

    def phase(self, name: str) -> None: ...

    def progress(self, phase: str, completed: float, total: float) -> None: ...

    def step_done(self, step: int, values: Mapping[str, object], seconds: float) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainDisplay:
    """One line per iteration, for log files and CI; long phases report now and then."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._clock = _TimeLeft(num_steps)
        self._latest: dict[str, object] = {}
        self._last_line_s = time.monotonic()

    def phase(self, name: str) -> None:
        """Phases are in the trace; a log file need not name each."""

    def progress(self, phase: str, completed: float, total: float) -> None:
        if self._is_due(PROGRESS_INTERVAL_S):
            self.say(f"  {phase}: {completed:,.0f} of {total:,.0f} ({completed / total if total else 1.0:.0%})")

    def step_done(self, step: int, values: Mapping[str, object], seconds: float) -> None:
        if step < 0:
            if self._is_due(WARM_START_INTERVAL_S):
                self.say(f"warm start · {numbers_line(values)}")
            return
        if step >= self._num_steps:
            self.say(f"after {self._num_steps} iterations · {numbers_line(values)}")
            return
        self._latest.update(values)
        left = self._clock.after(step, seconds)
        self.say(f"iteration {step + 1}/{self._num_steps} · {numbers_line(self._latest)} · {duration(seconds)} · {left} left")

    def say(self, text: str) -> None:
        self._last_line_s = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None: ...

    def _is_due(self, interval_s: float) -> bool:
        return time.monotonic() - self._last_line_s >= interval_s


class TerminalDisplay:
    """Two bars (the run, the current phase) and a line of numbers, redrawn in place."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._num_steps = num_steps
        self._clock = _TimeLeft(num_steps)
        self._latest: dict[str, object] = {}
        self._numbers = Text("", no_wrap=True, overflow="ellipsis")
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        )
        self._run = self._bars.add_task("starting", total=max(num_steps, 1), note="")
        self._phase = self._bars.add_task("", total=None, note="")
        self._live = Live(Group(self._bars, self._numbers), console=console, refresh_per_second=REDRAWS_PER_S)
        self._progress_of, self._next_progress_s = "", 0.0
        self._done: dict[str, tuple[float, float]] = {}  # of every phase: short ones within it must not lose its bar
        self._live.start()

    def phase(self, name: str) -> None:
        self._show(name)

    def progress(self, phase: str, completed: float, total: float) -> None:
        self._done[phase] = completed, total
        now_s = time.monotonic()
        if phase == self._progress_of and now_s < self._next_progress_s and completed < total:  # nobody would see it
            return
        self._progress_of, self._next_progress_s = phase, now_s + 1 / REDRAWS_PER_S
        self._show(phase)

    def step_done(self, step: int, values: Mapping[str, object], seconds: float) -> None:
        if step < 0:
            self._bars.update(self._run, description="warm start")
            self._numbers.plain = numbers_line(values)
            return
        self._done.clear()
        self._latest.update({name: value for name, value in values.items() if not name.startswith("sft/")})
        self._numbers.plain = numbers_line(self._latest)
        if step >= self._num_steps:
            self._bars.update(self._run, description=f"{self._num_steps} iterations", completed=self._num_steps, note="done")
            return
        note = f"{self._clock.after(step, seconds)} left"
        self._bars.update(self._run, description=f"iteration {step + 1}/{self._num_steps}", completed=step + 1, note=note)

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bars.update(self._phase, visible=False)
        self._live.stop()

    def _show(self, phase: str) -> None:
        completed, total = self._done.get(phase, (0, None))
        note = "" if total is None else f"{completed:,.0f} of {total:,.0f}"
        self._bars.update(self._phase, description=f"  {phase}", total=total, completed=completed, note=note, visible=bool(phase))


def open_display(rank: int, num_steps: int, shown: bool) -> Display:
    """Bars when rank 0's standard output is a terminal, lines when it is not, nothing on the other ranks."""
    if rank != 0 or not shown:
        return SilentDisplay()
    console = Console()
    return TerminalDisplay(console, num_steps) if console.is_terminal else PlainDisplay(console, num_steps)


def numbers_line(values: Mapping[str, object]) -> str:
    """The numbers people follow, with their units: "reward 0.812 · length 35.2 tokens"."""
    parts = []
    for name, label, form, unit in SHOWN:
        value = values.get(name)
        if isinstance(value, int | float):
            parts.append(f"{label} {form.format(value)}{unit}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """ "4.2 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class _TimeLeft:
    """Extrapolates from the latest iterations."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)

    def after(self, step: int, seconds: float) -> str:
        self._recent_s.append(seconds)
        return duration(statistics.median(self._recent_s) * max(0, self._num_steps - step - 1))
