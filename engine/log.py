"""What a run writes and shows: metrics, TensorBoard, samples, the trace of its phases, and progress.

metrics.jsonl                        one JSON object per line: step, time (Unix seconds), then the metrics
tensorboard/                         the same numbers
rollouts/step_00012_rank_0.parquet   the responses of one iteration and one leader
trace/rank_N.json, trace.json.gz     phases of every rank; merged when the run ends
"""

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.engine.config import LogConfig
from tandem.engine.progress import open_display
from tandem.engine.trace import TraceWriter, merge_trace

METRICS_FILE = "metrics.jsonl"
TRACE_FILE = "trace.json.gz"


class RunLog:
    """One per rank; every rank makes the same calls, and each writes its part. Not for use by several threads at once.

    Args:
        run_dir: the run folder; made if missing.
        rank, num_ranks: of the whole run.
        num_steps: iterations of the run, for the time left.
        on_progress: called with the open phase ("" between phases) whenever a phase begins, gets further, or ends in order.
    Raises: RuntimeError when wandb_project is set and wandb is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        num_ranks: int,
        config: LogConfig,
        num_steps: int,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._rank = rank
        self._num_ranks = num_ranks
        self._config = config
        self._num_steps = num_steps
        self._on_progress = on_progress
        self._trace = TraceWriter(run_dir / "trace", rank)
        self._phases: list[str] = []  # open phases, the innermost last
        self._phase_ns: dict[str, int] = {}  # nanoseconds of this step that are booked on each phase
        self._step_start_ns = self._booked_until_ns = time.perf_counter_ns()
        self._num_warm_start_lines = 0
        self._purge_step: int | None = None
        self._tensorboard: Any = None
        self._metrics_file: Any = None
        self._wandb = self._open_wandb() if rank == 0 and config.wandb_project is not None else None
        self._display = open_display(rank, num_steps, config.progress)

    @contextlib.contextmanager
    def phase(self, name: str, **args: Any) -> Iterator[dict[str, Any]]:
        """Time a phase of the run. Phases nest; what the block adds to the yielded dictionary is shown in the trace.

        The metric `phase_s/NAME` counts a nested phase once, under its own name, so that the phases of a step add up to its time. A phase
        that is open at a call of `metrics` is divided between the two steps; the trace shows it whole.
        """
        start_ns = self._book()
        self._phases.append(name)
        self._display.phase(name)
        self._progressed()
        try:
            yield args
        finally:
            end_ns = self._book()
            self._phases.pop()
            self._trace.complete(name, start_ns, end_ns, args)
            self._display.phase(self._phases[-1] if self._phases else "")
        self._progressed()

    def event(self, name: str, **args: Any) -> None:
        """Mark this moment in the trace."""
        self._trace.instant(name, args)

    def counter(self, name: str, **values: float) -> None:
        """Draw values over time in the trace, for example `counter("swap", bytes_moved=…)`."""
        self._trace.counter(name, values)

    def progress(self, phase: str, completed: float, total: float) -> None:
        """Show how far a phase is: groups finished, updates done. Cheap enough for every one of them."""
        self._display.progress(phase, completed, total)
        self._progressed()

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the bars."""
        self._display.say(text)

    def phase_seconds(self) -> dict[str, float]:
        """Seconds in each phase, open ones included, since the last `metrics` or `begin_steps`; nested phases are not counted twice."""
        self._book()
        return {name: nanoseconds / 1e9 for name, nanoseconds in self._phase_ns.items()}

    def step_seconds(self) -> float:
        """Seconds since the last `metrics` or `begin_steps`."""
        return (time.perf_counter_ns() - self._step_start_ns) / 1e9

    def begin_steps(self) -> None:
        """Before the first iteration: forget the time spent so far, so that its metrics hold no start-up. The trace keeps everything."""
        self._step_start_ns = self._book()
        self._phase_ns.clear()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """End a step: rank 0 writes `values`, the seconds since the last call (`step_s`) and those of each phase (`phase_s/NAME`).

        Args:
            step: the iteration; -1 for updates of the supervised warm start, of which there are many.
            values: numbers (also 0-dim tensors), strings or None. NaN and infinities are written as null.
        """
        now_ns = self._book()
        step_s, self._step_start_ns = (now_ns - self._step_start_ns) / 1e9, now_ns
        line = {name: _plain(value) for name, value in values.items()}
        line |= {"step_s": round(step_s, 6)} | {f"phase_s/{name}": round(seconds, 6) for name, seconds in self.phase_seconds().items()}
        self._phase_ns.clear()
        self._trace.flush()
        if self._rank == 0:
            self._write_metrics(step, line)
        self._display.step_done(step, line, step_s)

    def wants_rollouts(self, step: int) -> bool:
        """Whether `rollouts` would write this step: every `rollouts_every` iterations, the first and the last."""
        every = self._config.rollouts_every
        return every > 0 and (step % every == 0 or step == self._num_steps - 1)

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write this leader's responses, one row each, to rollouts/step_00012_rank_0.parquet. A step that is not wanted is skipped.

        Rows need not name a step; all have the same keys.
        """
        if not self.wants_rollouts(step) or not rows:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        # typed where values may be missing: every file of a run has one schema
        types = {
            "step": pa.int64(),
            "prompt_id": pa.string(),
            "level": pa.int64(),
            "domain": pa.string(),
            "prompt": pa.string(),
            "response": pa.string(),
            "answer": pa.string(),
            "extracted": pa.string(),
            "reason": pa.string(),
            "correct": pa.bool_(),
            "reward": pa.float64(),
            "advantage": pa.float64(),
            "num_tokens": pa.int64(),
            "stop": pa.string(),
            "num_segments": pa.int64(),
            "policy_versions": pa.list_(pa.int64()),
        }
        folder = self._run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        with_step = [{"step": step} | dict(row) for row in rows]
        columns = {name: pa.array([row[name] for row in with_step], type=types.get(name)) for name in with_step[0]}
        path = folder / f"step_{step:05d}_rank_{self._rank}.parquet"
        unfinished = path.with_suffix(".tmp")
        pq.write_table(pa.table(columns), unfinished, compression="zstd")
        unfinished.replace(path)

    def rewind(self, step: int) -> None:
        """On resume, before the first `metrics`: forget metrics and rollouts of `step` and later, which will be done again."""
        if self._rank != 0:
            return
        assert self._metrics_file is None, "rewind after metrics were written"
        self._purge_step = step
        path = self._run_dir / METRICS_FILE
        if path.exists():
            kept = [json.dumps(line) + "\n" for line in read_metrics(self._run_dir) if line["step"] < step]
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text("".join(kept), encoding="utf-8")
            unfinished.replace(path)
        for rollout in (self._run_dir / "rollouts").glob("step_*_rank_*.parquet"):
            if int(rollout.stem.split("_")[1]) >= step:
                rollout.unlink()

    def flush(self) -> None:
        """Write what this rank has collected. Ranks meet between this and rank 0's `close`, which merges all of it."""
        self._trace.flush()

    def close(self) -> None:
        """Write and close everything; rank 0 merges the traces of all ranks into trace.json.gz."""
        self.flush()
        self._display.close()
        if self._metrics_file is not None:
            self._metrics_file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._rank == 0:
            merge_trace(self._run_dir / "trace", self._run_dir / TRACE_FILE)

    def _progressed(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._phases[-1] if self._phases else "")

    def _book(self) -> int:
        """Count the time since the last call as the innermost open phase's, and return time.perf_counter_ns()."""
        now_ns = time.perf_counter_ns()
        if self._phases:
            name = self._phases[-1]
            self._phase_ns[name] = self._phase_ns.get(name, 0) + now_ns - self._booked_until_ns
        self._booked_until_ns = now_ns
        return now_ns

    def _write_metrics(self, step: int, line: dict[str, Any]) -> None:
        if self._metrics_file is None:
            self._metrics_file = _open_to_append(self._run_dir / METRICS_FILE)
        self._metrics_file.write(json.dumps({"step": step, "time": time.time()} | line) + "\n")
        self._metrics_file.flush()
        if step < 0:
            self._num_warm_start_lines += 1
        x = step if step >= 0 else self._num_warm_start_lines - 1
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        if step < 0:
            del numbers["step_s"]  # its curve is that of the iterations
        if self._config.tensorboard:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter  # takes a second to import

                self._tensorboard = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=self._purge_step)
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, x)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step} | numbers)

    def _open_wandb(self) -> Any:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise RuntimeError(
                f"log.wandb_project is {self._config.wandb_project!r}, but wandb is not installed; pip install 'tandem-rl[wandb]'"
            ) from error
        id_path = self._run_dir / "wandb_id"
        if not id_path.exists():
            id_path.write_text(uuid.uuid4().hex[:12])
        return wandb.init(
            project=self._config.wandb_project, name=self._run_dir.name, id=id_path.read_text(), dir=str(self._run_dir), resume="allow"
        )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl. The last may be half-written by a run that was killed, and is then left out.

    Raises: ValueError naming the line when any other is not a JSON object with a step.
    """
    path = run_dir / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    parsed = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            parsed.append({"step": line["step"]} | line)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is not a metrics line (a JSON object with a step): {text[:80]!r}") from error
    return parsed


def _open_to_append(path: Path) -> Any:
    """Open for appending, behind the last whole line."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def _plain(value: Any) -> float | int | str | None:
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
