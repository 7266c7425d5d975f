"""Train/rollout log-prob difference over swaps of weights that do not change: it must stay flat.

    python benchmarks/logprob_drift.py [--swaps 20] [--nproc 2]

Runs the toy recipe with a learning rate of 0 on a model that was warm-started for a few steps, and prints mean and maximum of
|trainer - engine| over the tokens of every iteration, in nats; a JSON line last.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tandem.engine.log import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            "--trainer.optimizer.lr",
            "0",
            "--trainer.optimizer.min_lr",
            "0",
            "--sft.0.steps",
            "100",
            "--evaluation.max_prompts",
            "2",
            "--length_penalty.weight",
            "0",
        ]
        command = ["-m", "tandem.engine.cli", "train", "toy_cpu", "--nproc", str(args.nproc), "--run_dir", folder, *fixed]
        subprocess.run([sys.executable, *command, "--steps", str(args.swaps)], check=True, stdout=subprocess.DEVNULL)
        lines = [line for line in read_metrics(Path(folder)) if "train/logprob_diff_mean" in line]
    print(f"{'swap':>5} {'mean':>10} {'max':>10}")
    for line in lines:
        print(f"{line['step']:>5} {line['train/logprob_diff_mean']:>10.2e} {line['train/logprob_diff_max']:>10.2e}")
    record = {
        "benchmark": "logprob_drift",
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "num_swaps": len(lines),
        "mean_first": lines[0]["train/logprob_diff_mean"],
        "mean_last": lines[-1]["train/logprob_diff_mean"],
        "max": max(line["train/logprob_diff_max"] for line in lines),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
