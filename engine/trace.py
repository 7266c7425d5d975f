"""Chrome-format trace events of one rank, appended to a file as the run goes, and their merging into one trace for Perfetto.

A part is a JSON array without its closing bracket, one event per line: Perfetto also loads a part alone, even of a killed run.
"""

import gzip
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPENING = "[\n"


class TraceWriter:
    """Collects events and appends them to trace/rank_N.json at every `flush`. pid is the rank, times are Unix time in microseconds.

    Durations come from the monotonic clock; one reading of the wall clock at the start places them, so that the ranks of a machine line up.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = part_path(folder, rank)
        self._rank = rank
        self._wall_offset_ns = time.time_ns() - time.perf_counter_ns()
        self._events: list[dict[str, Any]] = []
        self._cut_half_line()
        self._add("M", "process_name", {"args": {"name": f"rank {rank}"}})
        self._add("M", "process_sort_index", {"args": {"sort_index": rank}})

    def complete(self, name: str, start_ns: int, end_ns: int, args: dict[str, Any]) -> None:
        """A phase between two readings of time.perf_counter_ns()."""
        self._add("X", name, {"ts": self._wall_us(start_ns), "dur": (end_ns - start_ns) / 1e3, "args": args})

    def instant(self, name: str, args: dict[str, Any]) -> None:
        """Something that happened now."""
        self._add("i", name, {"ts": self._wall_us(time.perf_counter_ns()), "s": "p", "args": args})

    def counter(self, name: str, values: dict[str, float]) -> None:
        """The present values of one counter track."""
        self._add("C", name, {"ts": self._wall_us(time.perf_counter_ns()), "args": values})

    def flush(self) -> None:
        """Append what was collected to the file."""
        if not self._events:
            return
        lines = "".join(json.dumps(event, default=str) + ",\n" for event in self._events)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(lines if file.tell() else OPENING + lines)
        self._events.clear()

    def _add(self, kind: str, name: str, rest: dict[str, Any]) -> None:
        self._events.append({"ph": kind, "name": name, "pid": self._rank, "tid": 0} | rest)

    def _wall_us(self, monotonic_ns: int) -> float:
        return (monotonic_ns + self._wall_offset_ns) / 1e3

    def _cut_half_line(self) -> None:
        """A run that was killed while it wrote may have left half an event; the next one must start on a line of its own."""
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(self._path, content.rfind(b"\n") + 1)


def part_path(folder: Path, rank: int) -> Path:
    """Where a rank's events are."""
    return folder / f"rank_{rank}.json"


def read_part(path: Path, *, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The events of one part; with `last_bytes`, those that lie whole in so many at its end. An unfinished last line is left out."""
    with path.open("rb") as file:
        if last_bytes is not None and last_bytes < path.stat().st_size:
            file.seek(-last_bytes, os.SEEK_END)
            file.readline()
        for line in file:
            if line.endswith(b",\n"):
                yield json.loads(line[:-2])


def merge_trace(folder: Path, to: Path) -> None:
    """Write all parts as one gzipped trace that begins at time 0; loads in https://ui.perfetto.dev and chrome://tracing."""
    parts = sorted(folder.glob("rank_*.json"))
    start_us = min((event["ts"] for part in parts for event in read_part(part) if "ts" in event), default=0.0)
    unfinished = to.with_name(to.name + ".tmp")
    with gzip.open(unfinished, "wt", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "otherData": ' + json.dumps({"start_unix_s": start_us / 1e6}) + ', "traceEvents": [\n')
        separator = ""
        for part in parts:
            for event in read_part(part):
                if "ts" in event:
                    event["ts"] -= start_us
                file.write(separator + json.dumps(event))
                separator = ",\n"
        file.write("\n]}\n")
    unfinished.replace(to)
