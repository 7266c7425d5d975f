"""The figures of a run's report, as Plotly's JSON: one function from the metrics to all figures that they can fill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6bd8", "#d9772b", "#2f9467", "#c8435b", "#7b5cc4", "#8a94a3"
PHASE_COLOURS = (BLUE, GREEN, ORANGE, PURPLE, RED, "#3aa6b9", "#c9a227", "#a0627f", "#5c7a52", "#6f86c9", GREY)

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot: what Plotly draws and the words around it."""

    title: str
    note: str  # what the curves are, with their unit
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the iterations."""

    metric: str
    label: str
    colour: str
    points: bool = False  # few and far between: show them


def figures(rows: Sequence[Row], warm_start: Sequence[Row]) -> list[Figure]:
    """All figures for which there are numbers.

    Args:
        rows: one per iteration, in order, each with "step".
        warm_start: lines of the supervised warm start, in order.
    """
    percent = {"yaxis": {"tickformat": ".0%", "rangemode": "tozero"}}
    from_zero = {"yaxis": {"rangemode": "tozero"}}
    logarithmic = {"yaxis": {"type": "log", "exponentformat": "power", "dtick": 1}}
    length = [
        Curve(metric="rollout/response_tokens", label="rollout, mean", colour=BLUE),
        Curve(metric="eval/response_tokens", label="held-out, greedy, mean", colour=ORANGE, points=True),
    ]
    differences = [
        Curve(metric="train/logprob_diff_max", label="largest", colour=RED),
        Curve(metric="train/logprob_diff_mean", label="mean", colour=BLUE),
    ]
    reward = [
        Curve(metric="rollout/reward", label="reward", colour=BLUE),
        Curve(metric="rollout/success_rate", label="success rate", colour=GREEN),
    ]
    small = {"yaxis": {"tickformat": ".1e", "rangemode": "tozero"}}
    candidates = [
        _lines(
            "pass@1",
            "Greedy, on held-out prompts.",
            rows,
            [Curve(metric="eval/pass_at_1", label="pass@1", colour=ORANGE, points=True)],
            percent,
        ),
        _lines("Reward", "Per response, length reward included; and the fraction that is correct.", rows, reward, from_zero),
        _lines("Response length", "Tokens per response.", rows, length, from_zero),
        _lines(
            "Entropy", "Of the policy, nats per token.", rows, [Curve(metric="train/entropy", label="entropy", colour=PURPLE)], from_zero
        ),
        _lines(
            "KL to the reference",
            "To the policy at the iteration's start, nats.",
            rows,
            [Curve(metric="train/kl", label="KL", colour=GREEN)],
        ),
        _lines("Train/rollout log-prob difference", "Absolute, per token, freshly swapped weights, nats.", rows, differences, logarithmic),
        _stop_states(rows),
        _phase_times(rows),
        _lines("Loss", "Policy loss.", rows, [Curve(metric="train/loss", label="loss", colour=BLUE)]),
        _lines("Gradient norm", "Global, before clipping.", rows, [Curve(metric="train/grad_norm", label="norm", colour=GREY)], from_zero),
        _lines(
            "Rollout speed",
            "Generated tokens per second, all ranks.",
            rows,
            [Curve(metric="rollout/tokens_per_s", label="tokens/s", colour=BLUE)],
            from_zero,
        ),
        _lines(
            "Length penalty",
            "Weight of the length reward.",
            rows,
            [Curve(metric="length_penalty/weight", label="weight", colour=ORANGE)],
            from_zero,
        ),
        _lines(
            "Learning rate",
            "At the iteration's last update.",
            rows,
            [Curve(metric="train/learning_rate", label="learning rate", colour=GREY)],
            small,
        ),
        *_grading(rows),
        _overhead(rows),
        _warm_start(warm_start),
    ]
    return [figure for figure in candidates if figure is not None]


def _lines(title: str, note: str, rows: Sequence[Row], curves: Sequence[Curve], layout: dict[str, Any] | None = None) -> Figure | None:
    data = []
    for curve in curves:
        at = [(row["step"], row[curve.metric]) for row in rows if row.get(curve.metric) is not None]
        if at:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if curve.points or len(at) < 3 else "lines",
                    "name": curve.label,
                    "x": [step for step, _ in at],
                    "y": [value for _, value in at],
                    "line": {"color": curve.colour, "width": 2},
                    "marker": {"size": 6},
                }
            )
    return Figure(title=title, note=note, data=data, layout=layout or {}) if data else None


def _grading(rows: Sequence[Row]) -> list[Figure | None]:
    """What became of responses, by domain."""
    domains = sorted({name.split("/")[1] for row in rows for name in row if name.startswith("reward/") and name.count("/") == 2})
    accuracies = [
        row | {f"accuracy/{d}": 1 - rate for d in domains if (rate := row.get(f"reward/{d}/zero_rate")) is not None}
        for row in map(dict, rows)
    ]

    def by_domain(title: str, note: str, rows: Sequence[Row], metric: str, layout: dict[str, Any]) -> Figure | None:
        colours = (PHASE_COLOURS[index % len(PHASE_COLOURS)] for index in range(len(domains)))
        curves = [Curve(metric=metric.format(d), label=d, colour=colour) for d, colour in zip(domains, colours, strict=True)]
        return _lines(title, note, rows, curves, layout)

    share = {"yaxis": {"tickformat": ".0%", "rangemode": "tozero"}}
    seconds = {"yaxis": {"rangemode": "tozero", "ticksuffix": " s"}}
    return [
        by_domain("Accuracy by domain", "Of the graded responses, the right ones.", accuracies, "accuracy/{}", share),
        by_domain("Zero scores by domain", "Of the graded responses, the wrong ones.", rows, "reward/{}/zero_rate", share),
        by_domain("Not graded by domain", "Responses of which nobody could tell.", rows, "reward/{}/not_graded_rate", share),
        by_domain("Grading latency by domain", "To the verdict, 95th percentile.", rows, "reward/{}/latency_s_p95", seconds),
    ]


def _stop_states(rows: Sequence[Row]) -> Figure | None:
    states = (("finished", GREEN), ("length", ORANGE), ("repetition", RED), ("budget", GREY), ("aborted", PURPLE))
    data = []
    for state, colour in states:
        metric = f"rollout/stop_{state}"
        at = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        if any(value > 0 for _, value in at):
            area = {"type": "scatter", "mode": "lines", "stackgroup": "states", "name": state, "line": {"color": colour, "width": 1}}
            data.append(area | {"x": [step for step, _ in at], "y": [value for _, value in at]})
    note = "Why responses ended, as a fraction of all."
    return Figure(title="Stop states", note=note, data=data, layout={"yaxis": {"tickformat": ".0%", "range": [0, 1]}}) if data else None


def _phase_times(rows: Sequence[Row]) -> Figure | None:
    """Stacked bars, the longest phase at the bottom; what is in no phase on top."""
    steps = [row for row in rows if any(name.startswith("phase_s/") for name in row)]
    totals: dict[str, float] = {}
    for row in steps:
        for name, seconds in row.items():
            if name.startswith("phase_s/") and seconds is not None:
                totals[name] = totals.get(name, 0.0) + seconds
    data = [
        _bar(name.removeprefix("phase_s/"), PHASE_COLOURS[index % len(PHASE_COLOURS)], steps, [row.get(name) or 0.0 for row in steps])
        for index, (name, _) in enumerate(sorted(totals.items(), key=lambda item: -item[1]))
    ]
    if not data:
        return None
    outside = [max(0.0, (row.get("step_s") or 0.0) - sum(row.get(name) or 0.0 for name in totals)) for row in steps]
    if sum(outside) > 0.005 * sum(totals.values()):
        data.append(_bar("in no phase", "#d5d9df", steps, outside))
    layout = {"barmode": "stack", "bargap": 0.15, "yaxis": {"rangemode": "tozero"}}
    return Figure(title="Time per iteration", note="Seconds in each phase on rank 0.", data=data, layout=layout, wide=True)


def _bar(name: str, colour: str, rows: Sequence[Row], seconds: list[float]) -> dict[str, Any]:
    bar = {"type": "bar", "name": name, "marker": {"color": colour}, "hovertemplate": "%{y:.2f} s"}
    return bar | {"x": [row["step"] for row in rows], "y": seconds}


def _overhead(rows: Sequence[Row]) -> Figure | None:
    curves = [Curve(metric="overhead_fraction", label="overhead", colour=RED)]
    layout = {"yaxis": {"tickformat": ".0%", "rangemode": "tozero"}}
    return _lines("Overhead", "Fraction of the iteration that is neither rollout nor training compute.", rows, curves, layout)


def _warm_start(lines: Sequence[Row]) -> Figure | None:
    """The stages one after the other, over their optimizer steps."""
    at: list[tuple[float, float]] = []
    before = last = 0.0
    for index, line in enumerate(line for line in lines if line.get("sft/loss") is not None):
        step = line.get("sft/step", index + 1)
        if step <= last:  # the next stage counts from 1
            before += last
        last = step
        at.append((before + step, line["sft/loss"]))
    rows = [{"step": step, "sft/loss": loss} for step, loss in at]
    layout = {"xaxis": {"title": {"text": "optimizer step"}}}
    return _lines("Warm start", "Supervised loss, nats per token.", rows, [Curve(metric="sft/loss", label="loss", colour=BLUE)], layout)
