"""The README's toy figures: the recipe with three seeds, each with and without the length penalty; then the plot and the table.

    python benchmarks/toy_seeds.py [--seeds 0 1 2] [--nproc 2]

Runs one after the other into runs/; one that is complete there is not run again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tandem.engine.log import METRICS_FILE, read_metrics
from tandem.engine.recipes.toy_cpu import toy_cpu

ROOT = Path(__file__).resolve().parent.parent


def run_toy(folder: Path, nproc: int, *options: str, num_steps: int = toy_cpu().steps) -> Path:
    """Run the recipe into `folder` unless it has run there to the end, which is after `num_steps` iterations."""
    done = (folder / METRICS_FILE).is_file() and read_metrics(folder)[-1]["step"] == num_steps
    if not done:
        command = ["-m", "tandem.engine.cli", "train", "toy_cpu", "--nproc", str(nproc), "--run_dir", str(folder), *options]
        subprocess.run([sys.executable, *command], check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nproc", type=int, default=2, help="ranks of every run")
    args = parser.parse_args()
    runs = ROOT / "runs"
    with_penalty = [run_toy(runs / f"toy_{seed}", args.nproc, "--seed", str(seed)) for seed in args.seeds]
    control = [
        run_toy(runs / f"toy_control_{seed}", args.nproc, "--seed", str(seed), "--length_penalty.weight", "0") for seed in args.seeds
    ]
    plot = [str(ROOT / "benchmarks" / "toy_plot.py"), "--with-penalty", *map(str, with_penalty), "--control", *map(str, control)]
    subprocess.run([sys.executable, *plot], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
