"""`tandem report RUN`: one HTML page about a run that needs nothing but itself."""

import datetime
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from plotly.offline import get_plotlyjs

from tandem.engine.log import METRICS_FILE, read_metrics
from tandem.engine.plots import Figure, figures
from tandem.engine.progress import duration
from tandem.engine.timeline import figure as iteration_figure
from tandem.engine.timeline import newest_iteration

MAX_COMPARED_PROMPTS = 8
GIB = 1 << 30
# Of the metrics memory/TURN/NAME, with their headings.
MEMORY_COLUMNS: Mapping[str, str] = {
    "trainer_bytes": "trainer's tensors on its device",
    "process_bytes": "rank",
    "arena_bytes": "host memory for a sleeping trainer",
    "device_bytes": "GPU in use",
    "others_bytes": "of it, other processes (engine)",
    "free_bytes": "GPU free",
}

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #e3e7ec; --paper: #fff; --ground: #f5f6f8;
  --good: #2f9467; --bad: #c8435b; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1340px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 27px; margin: 0; letter-spacing: -.01em; } h2 { font-size: 19px; margin: 40px 0 14px; }
.sub { color: var(--soft); margin: 2px 0 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 10px; }
.tile, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 12px 14px; } .tile .value { font-size: 20px; white-space: nowrap; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile .unit { font-size: 12px; font-weight: 400; color: var(--soft); } .tile .label, .tile .before { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 14px; }
.card { padding: 14px 16px 6px; min-width: 0; } 
.card h3 { margin: 0; font-size: 15px; } .card .note { margin: 0; color: var(--soft); font-size: 13px; }
.plot { height: 250px; }
@media (min-width: 880px) { .plots { grid-auto-flow: dense; } .card.wide { grid-column: span 2; } }
.pair { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; margin-bottom: 12px; overflow: hidden; }
.pair header { padding: 10px 16px; border-bottom: 1px solid var(--line); display: flex; gap: 6px 24px; flex-wrap: wrap; }
.pair header span { color: var(--soft); font-size: 13px; } .pair header b { font-weight: 600; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }
.side { padding: 10px 16px 14px; min-width: 0; } .side + .side { border-left: 1px solid var(--line); }
.side p { margin: 0 0 6px; font-size: 13px; color: var(--soft); }
pre { margin: 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow-y: auto; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.table { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { text-align: left; padding: 5px 16px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; } td:first-child { color: var(--soft); white-space: nowrap; }
summary { cursor: pointer; font-size: 19px; font-weight: 600; margin: 40px 0 14px; }
@media (max-width: 720px) { .side + .side { border-left: 0; border-top: 1px solid var(--line); } main { padding: 20px 12px 48px; } }
@media print { body { background: #fff; } .card, .pair, .tile { break-inside: avoid; } }
"""

# merged under each figure's own layout
LAYOUT: Mapping[str, Any] = {
    "autosize": True,
    "margin": {"l": 56, "r": 10, "t": 10, "b": 40},
    "font": {"family": "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif", "size": 12, "color": "#1c2430"},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hovermode": "x unified",
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
    "xaxis": {"title": {"text": "iteration", "standoff": 8}, "gridcolor": "#eef0f3", "zeroline": False, "linecolor": "#c9ced6"},
    "yaxis": {"gridcolor": "#eef0f3", "zeroline": False, "automargin": True},
}

# metric, label, format, unit: first and last value of the run
TILES = (
    ("eval/pass_at_1", "pass@1, held-out", "{:.3f}", ""),
    ("eval/response_tokens", "held-out response", "{:.1f}", "tokens"),
    ("rollout/reward", "reward", "{:.3f}", ""),
    ("rollout/response_tokens", "rollout response", "{:.1f}", "tokens"),
    ("rollout/tokens_per_s", "rollout speed", "{:,.0f}", "tokens/s"),
    ("train/entropy", "entropy", "{:.3f}", "nats"),
    ("train/logprob_diff_max", "log-prob difference", "{:.1e}", "nats"),
    ("step_s", "iteration", "{:.1f}", "s"),
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response, and how its whole group did."""

    step: int
    prompt: str
    answer: str
    response: str
    correct: bool
    num_tokens: int
    stop: str
    group_correct: int
    group_size: int


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what the run has written so far.

    Raises: FileNotFoundError if the folder is no run or has no metrics yet; ValueError if a metrics line is damaged.
    """
    for name in ("config.json", METRICS_FILE):
        if not (run_dir / name).is_file():
            raise FileNotFoundError(f"{run_dir} is no run folder, or its run has not begun: it has no {name}")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    lines = read_metrics(run_dir)
    iteration = iteration_figure(newest_iteration(run_dir))
    page = _page(config, lines, first_and_last(run_dir / "rollouts"), [iteration] if iteration else [])
    path = run_dir / "report.html"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path


def merge_by_step(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per iteration: later values win, times are added. Lines of the warm start (step < 0) are left out."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["step"] < 0:
            continue
        row = rows.setdefault(line["step"], {})
        for name, value in line.items():
            is_time = name == "step_s" or name.startswith("phase_s/")
            row[name] = row[name] + value if is_time and name in row else value
    return [rows[step] for step in sorted(rows)]


def memory_by_phase(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The most bytes that were in use in each turn (checkpoint/turns.py), by name; {} of a run that measured none."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        for metric, value in row.items():
            if metric.startswith("memory/") and value is not None:
                _, phase, name = metric.split("/")
                of_phase = found.setdefault(phase, {})
                of_phase[name] = max(value, of_phase.get(name, 0))
    return found


def first_and_last(rollouts: Path) -> list[tuple[Sample, Sample]]:
    """Responses to the same prompt early and late: prompts of both the first and the last iteration, then those seen furthest apart."""
    seen: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(rollouts.glob("step_*_rank_*.parquet")):
        step = int(path.stem.split("_")[1])
        for prompt_id in dict.fromkeys(pq.read_table(path, columns=["prompt_id"])["prompt_id"].to_pylist()):
            seen.setdefault(prompt_id, []).append((step, path))
    spans = [(at[0], at[-1], prompt_id) for prompt_id, at in seen.items() if at[0][0] < at[-1][0]]
    spans.sort(key=lambda span: (span[0][0] - span[1][0], span[2]))
    return [
        (_sample(first_path, first_step, prompt_id), _sample(last_path, last_step, prompt_id))
        for (first_step, first_path), (last_step, last_path), prompt_id in spans[:MAX_COMPARED_PROMPTS]
    ]


def _sample(path: Path, step: int, prompt_id: str) -> Sample:
    """The first response of a prompt in one file."""
    rows = pq.read_table(path, filters=[("prompt_id", "==", prompt_id)]).to_pylist()
    row = rows[0]
    texts = {name: str(row.get(name, "")) for name in ("prompt", "answer", "response", "stop")}
    num_correct = sum(bool(r["correct"]) for r in rows)
    return Sample(
        step=step, correct=bool(row["correct"]), num_tokens=row["num_tokens"], group_correct=num_correct, group_size=len(rows), **texts
    )


def _page(
    config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[Sample, Sample]], others: Sequence[Figure]
) -> str:
    """The whole page; `others` are figures that do not come out of the metrics."""
    rows, warm_start = merge_by_step(lines), [line for line in lines if line["step"] < 0]
    plots = [*figures(rows, warm_start), *others]
    name = html.escape(str(config["name"]))
    cards, calls = [], []
    for index, figure in enumerate(plots):
        cards.append(
            f'<div class="card{" wide" if figure.wide else ""}"><h3>{html.escape(figure.title)}</h3>'
            f'<p class="note">{html.escape(figure.note)}</p><div class="plot" id="plot{index}"></div></div>'
        )
        calls.append(_plot_call(index, figure))
    samples = "".join(_pair(first, last) for first, last in pairs)
    nothing = '<p class="sub">No prompt was seen in two iterations, or no rollouts were written.</p>'
    settings = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(json.dumps(value))}</td></tr>" for key, value in _flat(config))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · Tandem</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head>
<body><main>
<h1>{name}</h1><p class="sub">{html.escape(_subtitle(config, rows, lines))}</p>
<section class="tiles">{_tiles(rows)}</section>
<h2>Course of the run</h2><section class="plots">{"".join(cards)}</section>
<h2>Responses, first and last</h2>{samples or nothing}
{_memory(rows)}<h2>Numbers</h2><div class="table"><table><tr><th>metric</th><th>first</th><th>last</th></tr>{_numbers(rows)}</table></div>
<details><summary>Configuration</summary><div class="table"><table>{settings}</table></div></details>
</main><script>
{chr(10).join(calls)}
</script></body></html>
"""


def _plot_call(index: int, figure: Figure) -> str:
    layout = dict(LAYOUT) | {"showlegend": len(figure.data) > 1}
    for name, value in figure.layout.items():
        layout[name] = layout[name] | value if isinstance(layout.get(name), dict) else value
    arguments = json.dumps([figure.data, layout]).replace("</", "<\\/")  # text must not end the script element
    return f'Plotly.newPlot("plot{index}", ...{arguments}, {{responsive: true, displayModeBar: false}});'


def _subtitle(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> str:
    num_done = sum("phase_s/train" in row or "train/loss" in row for row in rows) or len(rows)
    busy_s = sum(line.get("step_s") or 0.0 for line in lines)
    parts = [f"{num_done} of {config['steps']} iterations", f"{duration(busy_s)} without start-up"]
    if lines:
        ended = datetime.datetime.fromtimestamp(lines[-1]["time"], tz=datetime.UTC)
        parts.append(f"last written {ended:%Y-%m-%d %H:%M} UTC")
    return " · ".join(parts)


def _first_last(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[Any, Any] | None:
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return (values[0], values[-1]) if values else None


def _tiles(rows: Sequence[Mapping[str, Any]]) -> str:
    tiles = []
    for metric, label, form, unit in TILES:
        ends = _first_last(rows, metric)
        if ends is None:
            continue
        first, last = (form.format(value) for value in ends)
        tiles.append(
            f'<div class="tile"><div class="label">{html.escape(label)}</div><div class="value">{last} '
            f'<span class="unit">{unit}</span></div><div class="before">at first {first}</div></div>'
        )
    return "".join(tiles)


def _numbers(rows: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({name for row in rows for name in row} - {"step", "time"})
    cells = []
    for name in names:
        ends = _first_last(rows, name)
        if ends is not None:
            cells.append(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{_number(value)}</td>" for value in ends) + "</tr>")
    return "".join(cells)


def _memory(rows: Sequence[Mapping[str, Any]]) -> str:
    found = memory_by_phase(rows)
    if not found:
        return ""
    columns = {name: label for name, label in MEMORY_COLUMNS.items() if any(name in of_phase for of_phase in found.values())}
    head = "".join(f"<th>{html.escape(label)}, GiB</th>" for label in columns.values())
    body = "".join(
        f"<tr><td>{html.escape(phase)}</td>" + "".join(f"<td>{of_phase.get(name, 0) / GIB:.3f}</td>" for name in columns) + "</tr>"
        for phase, of_phase in found.items()
    )
    return f'<h2>Memory in each turn, at most</h2><div class="table"><table><tr><th>turn</th>{head}</tr>{body}</table></div>'


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else html.escape(str(value))


def _pair(first: Sample, last: Sample) -> str:
    sides = "".join(
        f'<div class="side"><p>iteration {sample.step} · <span class="{"good" if sample.correct else "bad"}">'
        f"{'correct' if sample.correct else 'wrong'}</span> · {sample.num_tokens} tokens · {html.escape(sample.stop)} · "
        f"{sample.group_correct} of {sample.group_size} in the group are correct</p><pre>{html.escape(sample.response)}</pre></div>"
        for sample in (first, last)
    )
    head = f"<b>{html.escape(first.prompt)}</b><span>expected answer: {html.escape(first.answer)}</span>"
    return f'<div class="pair"><header>{head}</header><div class="sides">{sides}</div></div>'


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
