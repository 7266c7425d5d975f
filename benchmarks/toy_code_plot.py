"""Draws docs/toy_code.png from finished runs of the recipe toy_code and prints the README's table.

    python benchmarks/toy_code_plot.py runs/toy_code_0 runs/toy_code_1 runs/toy_code_2

One line per run: pass@1 and reward over the iterations.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.toy_plot import ToyRun, draw, load

PANELS = (("eval/pass_at_1", "pass@1, held-out, greedy", 1.02), ("rollout/reward", "reward in the rollout", 1.02))
# Rewards of single iterations are noisy: the first and the last are means of so many.
NUM_AVERAGED = 3


def values(run: ToyRun, metric: str) -> list[float]:
    """Of the iterations that have it, in order."""
    return [row[metric] for row in run.rows if row.get(metric) is not None]


def num_graded(run: ToyRun) -> int:
    """Responses that the sandbox graded: all of the rollouts, and one for each held-out prompt of each evaluation."""
    config = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
    num_held_out = config["data"]["task"]["num_test"]
    if config["evaluation"]["max_prompts"] is not None:
        num_held_out = min(num_held_out, config["evaluation"]["max_prompts"])
    return round(sum(values(run, "reward/code/num_responses"))) + num_held_out * len(values(run, "eval/pass_at_1"))


def different_share(run: ToyRun) -> float:
    """Different programs to one prompt in one iteration, of the responses of the rollouts: the others had no run of their own."""
    num_different = num_responses = 0
    for file in (run.path / "rollouts").glob("step_*.parquet"):
        responses = pq.read_table(file, columns=["prompt_id", "extracted"]).to_pylist()
        num_different += len({(one["prompt_id"], one["extracted"]) for one in responses})
        num_responses += len(responses)
    return num_different / num_responses


def grading_share(run: ToyRun) -> float:
    """Median share of an iteration, evaluation left out, that was spent waiting for verdicts after the last response."""
    rows = [row for row in run.rows if row.get("phase_s/grade") is not None]
    return statistics.median(row["phase_s/grade"] / (row["step_s"] - (row.get("phase_s/evaluate") or 0.0)) for row in rows)


def table(runs: Sequence[ToyRun]) -> str:
    """Markdown: one row per run."""
    lines = [
        "| run | pass@1 after SFT | pass@1 after RL | reward, first 3 | last 3 | responses graded | different programs | grading |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        before, after = run.ends("eval/pass_at_1")
        rewards = values(run, "rollout/reward")
        first, last = statistics.mean(rewards[:NUM_AVERAGED]), statistics.mean(rewards[-NUM_AVERAGED:])
        rest = f"{num_graded(run)} | {different_share(run):.0%} | {grading_share(run):.0%} of an iteration"
        lines.append(f"| {run.path.name} | {before:.3f} | {after:.3f} | {first:.3f} | {last:.3f} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--to", type=Path, default=Path("docs/toy_code.png"), help="the picture to write")
    options = parser.parse_args()
    runs = [load(path, "with mirror descent") for path in options.runs]
    draw(runs, options.to, PANELS)
    print(table(runs))


if __name__ == "__main__":
    main()
