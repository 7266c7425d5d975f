"""The newest whole iteration of a run, phase by phase and rank by rank, out of its trace; `report` and the README's picture draw it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.plots import PHASE_COLOURS, Figure
from tandem.engine.trace import part_path, read_part

MAX_RANKS = 8
LAST_PHASE = "log"  # every iteration ends with it, on every rank
LAST_BYTES = 4 << 20  # of each part: some 30,000 events
SMALLEST = 1 / 4000  # of the iteration; what is shorter cannot be seen, and grading alone has hundreds


@dataclass(frozen=True, kw_only=True)
class Span:
    """A phase, in seconds from the iteration's begin."""

    phase: str
    start_s: float
    duration_s: float


def newest_iteration(run_dir: Path) -> dict[int, list[Span]]:
    """Spans by rank, those that contain others first, of the first ranks; {} where two iterations have not ended yet.

    The iteration lasts from the end of rank 0's `log` phase before it to the end of its own; what other ranks did in that time is theirs.
    """
    events = {
        rank: list(read_part(path, last_bytes=LAST_BYTES))
        for rank in range(MAX_RANKS)
        if (path := part_path(run_dir / "trace", rank)).is_file()
    }
    phases = {rank: [event for event in found if event["ph"] == "X"] for rank, found in events.items()}
    ends = [event["ts"] + event["dur"] for event in phases.get(0, ()) if event["name"] == LAST_PHASE]
    if len(ends) < 2:
        return {}
    begin, end = ends[-2:]
    return {rank: _between(found, begin, end) for rank, found in phases.items()}


def _between(events: Sequence[Mapping[str, Any]], begin: float, end: float) -> list[Span]:
    """What lies in the interval (microseconds), cut to it."""
    spans = []
    for event in events:
        start, stop = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
        if stop - start >= SMALLEST * (end - begin):
            spans.append(Span(phase=event["name"], start_s=(start - begin) / 1e6, duration_s=(stop - start) / 1e6))
    return sorted(spans, key=lambda span: -span.duration_s)


def colour_of_phases(ranks: Mapping[int, Sequence[Span]]) -> dict[str, str]:
    """A colour for every phase, the phases in the order in which they begin."""
    first: dict[str, float] = {}
    for span in (span for spans in ranks.values() for span in spans):
        first[span.phase] = min(span.start_s, first.get(span.phase, span.start_s))
    return {phase: PHASE_COLOURS[i % len(PHASE_COLOURS)] for i, phase in enumerate(sorted(first, key=lambda phase: first[phase]))}


def figure(ranks: Mapping[int, Sequence[Span]]) -> Figure | None:
    """One lane for each rank. Bars lie over those that contain them: grading over the rollout that it goes on beside."""
    if not ranks:
        return None
    longest = {span.phase: span.duration_s for spans in ranks.values() for span in reversed(spans)}
    colours = colour_of_phases(ranks)
    data = []
    for phase in sorted(longest, key=lambda phase: -longest[phase]):
        spans = [(rank, span) for rank, found in ranks.items() for span in found if span.phase == phase]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": phase,
                "legendrank": list(colours).index(phase),
                "marker": {"color": colours[phase]},
                "y": [f"rank {rank}" for rank, _ in spans],
                "base": [span.start_s for _, span in spans],
                "x": [span.duration_s for _, span in spans],
                "hovertemplate": "%{x:.4f} s",
            }
        )
    layout = {
        "barmode": "overlay",
        "bargap": 0.3,
        "hovermode": "closest",
        "xaxis": {"title": {"text": "seconds"}},
        "yaxis": {"autorange": "reversed"},
    }
    note = f"The newest whole one, first {len(ranks)} ranks; all of the run is in trace.json.gz (ui.perfetto.dev)."
    return Figure(title="One iteration", note=note, data=data, layout=layout, wide=True)
