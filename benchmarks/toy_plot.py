"""Draws docs/toy_run.png from finished toy runs and prints the README's table.

    python benchmarks/toy_plot.py --with-penalty runs/toy_0 runs/toy_1 runs/toy_2 --control runs/control_0

One line per run: pass@1, response length and reward over the iterations, with the length penalty and without.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tandem.engine.log import read_metrics
from tandem.engine.report import merge_by_step

BLUE, ORANGE = "#2f6bd8", "#d9772b"
PANELS = (
    ("eval/pass_at_1", "pass@1, held-out, greedy", 1.0),
    ("eval/response_tokens", "held-out response length (tokens)", None),
    ("rollout/reward", "reward in the rollout", 1.0),
)


@dataclass(frozen=True, kw_only=True)
class ToyRun:
    """The metrics of one run and the variant it belongs to."""

    path: Path
    variant: str
    rows: list[dict[str, Any]]  # one per iteration
    minutes: float

    def ends(self, metric: str) -> tuple[float, float]:
        """First and last value. Raises ValueError if the run has none."""
        values = [row[metric] for row in self.rows if row.get(metric) is not None]
        if not values:
            raise ValueError(f"{self.path} has no {metric}; did the run evaluate?")
        return values[0], values[-1]

    def largest_difference(self) -> float:
        """The largest train/rollout log-prob difference of any token of any iteration, nats."""
        return max(row["train/logprob_diff_max"] for row in self.rows if row.get("train/logprob_diff_max") is not None)

    def overhead(self) -> float:
        """Mean over the iterations of the time outside rollout and training."""
        return statistics.mean(row["overhead_fraction"] for row in self.rows if row.get("overhead_fraction") is not None)


def load(path: Path, variant: str) -> ToyRun:
    """Read a run folder."""
    lines = read_metrics(path)
    return ToyRun(path=path, variant=variant, rows=merge_by_step(lines), minutes=sum(line.get("step_s") or 0.0 for line in lines) / 60)


def draw(runs: Sequence[ToyRun], to: Path, panels: Sequence[tuple[str, str, float | None]] = PANELS) -> None:
    """Panels (metric, title, top of the axis) side by side, one line per run, one colour for each of two variants."""
    first = runs[0].variant
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a94a3"})
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained")
    for axis, (metric, title, top) in zip(axes, panels, strict=True):
        labelled = set()
        for run in runs:
            at = [(row["step"], row[metric]) for row in run.rows if row.get(metric) is not None]
            axis.plot(
                [step for step, _ in at],
                [value for _, value in at],
                color=BLUE if run.variant == first else ORANGE,
                linewidth=1.6,
                alpha=0.85,
                marker="o" if metric.startswith("eval/") else "",
                markersize=3,
                label=None if run.variant in labelled else run.variant,
            )
            labelled.add(run.variant)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("iteration")
        axis.set_ylim(0, top)
        axis.grid(axis="y", color="#e3e7ec", linewidth=0.8)
    axes[0].legend(frameon=False, loc="lower right")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=130)
    plt.close(figure)


def table(runs: Sequence[ToyRun]) -> str:
    """Markdown: one row per run, then the mean of each variant."""
    lines = [
        "| run | length penalty | pass@1 after SFT | pass@1 after RL | response after SFT | after RL | log-prob diff | overhead | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(run.variant for run in runs):
        of_variant = [run for run in runs if run.variant == variant]
        numbers = [
            (*run.ends("eval/pass_at_1"), *run.ends("eval/response_tokens"), run.largest_difference(), run.overhead(), run.minutes)
            for run in of_variant
        ]
        names = [run.path.name for run in of_variant]
        if len(numbers) > 1:
            numbers.append(tuple(statistics.mean(column) for column in zip(*numbers, strict=True)))
            names.append("**mean**")
        penalty = "yes" if variant == "with length penalty" else "no"
        for name, (before, after, length_before, length_after, difference, overhead, minutes) in zip(names, numbers, strict=True):
            lengths = f"{length_before:.1f} tokens | {length_after:.1f} tokens"
            rest = f"{difference:.1e} | {overhead:.1%} | {minutes:.1f} min"
            lines.append(f"| {name} | {penalty} | {before:.3f} | {after:.3f} | {lengths} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with-penalty", type=Path, nargs="+", required=True, metavar="RUN", help="run folders with the length penalty")
    parser.add_argument("--control", type=Path, nargs="*", default=[], metavar="RUN", help="run folders without it")
    parser.add_argument("--to", type=Path, default=Path("docs/toy_run.png"), help="the picture to write")
    options = parser.parse_args()
    runs = [load(path, "with length penalty") for path in options.with_penalty] + [load(path, "without") for path in options.control]
    draw(runs, options.to)
    print(table(runs))


if __name__ == "__main__":
    main()
