"""The toy recipe with SGLang as its rollout engine next to the embedded one: both learn the same, from one warm start.

    python benchmarks/toy_engines.py [--seeds 0] [--nproc 2]

The warm start knows no rollout engine, so it is run once per seed and each engine goes on from a copy of it. Runs one after the other into
runs/; one that is complete there is not run again. Draws docs/toy_engines.png and prints two tables: what was learned, and the seconds of
an iteration by phase.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from toy_plot import ToyRun, draw, load
from toy_seeds import ROOT, run_toy

ENGINES = ("embedded", "sglang")
PHASES = ("rollout", "grade", "swap", "pack", "reference", "train")


def run_engine(engine: str, seed: int, nproc: int) -> Path:
    """Run the recipe with an engine, from the seed's warm start."""
    warm, folder = ROOT / "runs" / f"toy_warm_{seed}", ROOT / "runs" / f"toy_{engine}_{seed}"
    options = ("--seed", str(seed))
    if not folder.exists():
        run_toy(warm, nproc, *options, "--steps", "0", num_steps=0)
        shutil.copytree(warm, folder)
    return run_toy(folder, nproc, *options, "--rollout.engine", engine)


def learned(runs: Sequence[ToyRun]) -> str:
    """Markdown: one row per run."""
    lines = [
        "| engine | run | pass@1 after SFT | after RL | response after SFT | after RL | largest log-prob difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        (before, after), (length_before, length_after) = run.ends("eval/pass_at_1"), run.ends("eval/response_tokens")
        lengths = f"{length_before:.1f} tokens | {length_after:.1f} tokens"
        lines.append(f"| {run.variant} | {run.path.name} | {before:.3f} | {after:.3f} | {lengths} | {run.largest_difference():.1e} |")
    return "\n".join(lines)


def times(runs: Sequence[ToyRun]) -> str:
    """Markdown: means over the iterations of each run."""
    lines = [f"| engine | run | iteration | {' | '.join(PHASES)} | rollout tokens/s |", "|" + "---|" * (4 + len(PHASES))]
    for run in runs:
        rows = [row for row in run.rows if row.get("phase_s/rollout") is not None]

        def mean(name: str, rows: list[dict[str, float]] = rows) -> float:
            return statistics.mean(row.get(name) or 0.0 for row in rows)

        phases = " | ".join(f"{mean(f'phase_s/{phase}'):.2f} s" for phase in PHASES)
        rate = mean("rollout/new_tokens") / mean("phase_s/rollout")
        lines.append(f"| {run.variant} | {run.path.name} | {mean('step_s'):.2f} s | {phases} | {rate:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--nproc", type=int, default=2, help="ranks of every run")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "toy_engines.png", help="the picture to write")
    options = parser.parse_args()
    runs = [load(run_engine(engine, seed, options.nproc), engine) for engine in ENGINES for seed in options.seeds]
    draw(runs, options.to)
    print(f"{learned(runs)}\n\n{times(runs)}")


if __name__ == "__main__":
    main()
