"""Train/rollout log-prob difference over swaps of weights that do not change: it must stay flat, with every rollout engine.

    python benchmarks/logprob_drift.py [--swaps 20] [--nproc 2] [--engines embedded sglang]

Runs the toy recipe, with few prompts, at a learning rate of 0 on a model that was warm-started for a few steps: once for all engines, each
of which goes on from a copy. Prints mean and maximum of |trainer - engine| over the tokens of every iteration, in nats, draws
docs/logprob_drift.png, and prints a JSON line last. Fails if a difference exceeds 1e-5, or if the mean of the last quarter is more than
twice that of the first.
"""

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from partial_rollouts import available
from rollout import cpu_name

from tandem.engine.log import read_metrics

LARGEST = 1e-5  # the project's bound on train against rollout, in nats
COLOURS = {"embedded": "#2f6bd8", "sglang": "#d9772b"}
FIXED = {
    "--trainer.optimizer.lr": 0,
    "--trainer.optimizer.min_lr": 0,
    "--sft.0.steps": 100,
    "--evaluation.max_prompts": 2,
    "--length_penalty.weight": 0,
    "--sampling.groups_in_flight": 24,
    "--replay.groups_per_update": 12,
    "--rollout.token_budget": 6000,
}


def train(folder: Path, nproc: int, engine: str, num_steps: int) -> None:
    """Go on in the folder up to so many iterations."""
    options = [str(part) for option in FIXED.items() for part in option]
    command = ["-m", "tandem.engine.cli", "train", "toy_cpu", "--nproc", str(nproc), "--run_dir", str(folder), *options]
    command += ["--rollout.engine", engine, "--steps", str(num_steps)]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


def draw(lines: dict[str, list[dict[str, Any]]], to: Path) -> None:
    """Mean and maximum over the swaps, one colour per engine."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a94a3"})
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for engine, of_engine in lines.items():
        steps = [line["step"] for line in of_engine]
        for name, style in (("mean", "-"), ("max", ":")):
            values = [line[f"train/logprob_diff_{name}"] for line in of_engine]
            axis.plot(steps, values, style, color=COLOURS[engine], linewidth=1.6, label=f"{engine}, {name}")
    axis.set_yscale("log")
    axis.set_ylim(1e-8, 2 * LARGEST)
    axis.axhline(LARGEST, color="#c8435b", linewidth=0.8)
    axis.set_title("|trainer - engine| over swaps of the same weights, nats of a log-prob", fontsize=11, loc="left")
    axis.set_xlabel("swap")
    axis.legend(frameon=False, ncols=2)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--engines", nargs="+", choices=list(COLOURS), default=list(COLOURS))
    parser.add_argument("--to", type=Path, default=Path("docs/logprob_drift.png"), help="the picture to write")
    options = parser.parse_args()
    lines: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        train(warm, options.nproc, "embedded", 0)
        for engine in available(options.engines):
            shutil.copytree(warm, Path(folder) / engine)
            train(Path(folder) / engine, options.nproc, engine, options.swaps)
            lines[engine] = [line for line in read_metrics(Path(folder) / engine) if "train/logprob_diff_mean" in line]
    print(f"| swap | {' | '.join(f'{engine}, mean | {engine}, max' for engine in lines)} |\n|{'---|' * (1 + 2 * len(lines))}")
    for rows in zip(*lines.values(), strict=True):
        cells = [f"{row['train/logprob_diff_mean']:.2e} | {row['train/logprob_diff_max']:.2e}" for row in rows]
        print(f"| {rows[0]['step']} | {' | '.join(cells)} |")
    draw(lines, options.to)
    record: dict[str, Any] = {
        "benchmark": "logprob_drift",
        "date": datetime.date.today().isoformat(),
        "machine": cpu_name(),
        "torch": torch.__version__,
        "num_swaps": options.swaps,
    }
    for engine, of_engine in lines.items():
        means, quarter = [line["train/logprob_diff_mean"] for line in of_engine], max(1, len(of_engine) // 4)
        first, last = statistics.mean(means[:quarter]), statistics.mean(means[-quarter:])
        largest = max(line["train/logprob_diff_max"] for line in of_engine)
        record[engine] = {"mean_of_first_quarter": first, "mean_of_last_quarter": last, "max": largest}
    print(json.dumps(record))
    for engine in lines:
        of = record[engine]
        if of["max"] > LARGEST or of["mean_of_last_quarter"] > 2 * of["mean_of_first_quarter"]:
            raise SystemExit(f"{engine}: the difference grows or is too large: {of}")


if __name__ == "__main__":
    main()
