"""How long saving a checkpoint blocks training, against the whole save.

    python benchmarks/checkpoint.py [--megabytes 100] [--ranks 1 2] [--folder DIR]

A Qwen3 of this size in float32 with its Adam state: three times as many bytes as the model. Saves alternate: one during which nothing
else runs ("whole": until the folder has its name and everything is flushed to the disk), and one during which the trainer goes on with
steps. "blocked" is the time from asking the trainer for its state to the return of `save`; the ratio is of the blocked time to the whole
of the undisturbed save. The first save also allocates the host memory and agrees on the plan. At the end the newest is loaded back into
a trainer of other weights, and every tensor must be equal.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tandem.engine.trainer  # noqa: F401  before megatron
from benchmarks.swap import large_model
from tandem.engine.algo.pack import TrainingRow, build_microbatch
from tandem.engine.checkpoint.disk import load_latest
from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.config import LossConfig, MeshConfig, OptimizerConfig, TrainerConfig
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tests.ranks import run_ranks

NUM_TOKENS = 64


def train(trainer: MegatronTrainer) -> None:
    """One supervised step on a short row."""
    tokens = np.arange(NUM_TOKENS, dtype=np.int32)
    row = TrainingRow(
        prompt_ids=tokens[:1],
        response_ids=tokens[1:],
        behaviour_logprobs=np.zeros(NUM_TOKENS - 1, dtype=np.float32),
        loss_mask=np.ones(NUM_TOKENS - 1, dtype=np.bool_),
        on_policy=np.ones(NUM_TOKENS - 1, dtype=np.bool_),
        advantage=0.0,
        row_id=0,
    )
    trainer.sft_step([build_microbatch([row])], trainer.mesh.dp_size * (NUM_TOKENS - 1))


def measure(megabytes: int, repeats: int, folder: Path) -> dict[str, Any]:
    """One rank: blocked and whole seconds of every save; whole ones of the saves that nothing disturbs."""
    model = large_model(megabytes, torch.float32.itemsize)
    mesh, config = build_mesh(MeshConfig(), model), TrainerConfig(reset_optimizer=False, optimizer=OptimizerConfig(lr=1e-4))
    trainer = MegatronTrainer(model, mesh, config, LossConfig(), 1.0, seed=0)
    train(trainer)
    found: dict[str, Any] = {"blocked_s": [], "whole_s": [], "disturbed_s": [], "num_steps": []}
    with CheckpointSaver(folder, keep=1) as saver:
        for i in range(2 * repeats + 1):
            dist.barrier()
            started = time.perf_counter()
            saver.save(i, trainer.sharded_state_dict())
            found["blocked_s"].append(time.perf_counter() - started)
            num_steps = 0
            while i % 2 and saver.poll() is None:
                train(trainer)
                num_steps += 1
            saver.wait()
            assert saver.last is not None
            found["disturbed_s" if i % 2 else "whole_s"].append(saver.last.total_s)
            found["num_steps"] += [num_steps] if i % 2 else []
        assert saver.last is not None
        found["bytes"] = saver.last.num_bytes
    saved = [shard.tensor.clone() for shard in trainer.weight_shards()]
    other = MegatronTrainer(model, mesh, config, LossConfig(), 1.0, seed=1)
    loaded = load_latest(folder, other.sharded_state_dict)
    assert loaded is not None
    other.load_sharded(loaded.state)
    assert all(torch.equal(x, shard.tensor) for x, shard in zip(saved, other.weight_shards(), strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the model's weights, in MiB")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; a temporary folder by default")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root).stdout.strip()
    versions = f"torch {torch.__version__}, commit {commit}, load average {os.getloadavg()[0]:.1f}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    print("| model | ranks | bytes saved | whole s (min–max) | GB/s | blocked s (min–max) | first s | blocked / whole | steps meanwhile |")
    print("|---|---|---|---|---|---|---|---|---|")
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            ranks = run_ranks(measure, num_ranks, args.megabytes, args.repeats, Path(folder), timeout_s=600)
        num_bytes = sum(rank["bytes"] for rank in ranks)
        blocked = [max(times) for times in zip(*(rank["blocked_s"] for rank in ranks), strict=True)]
        whole = [max(times) for times in zip(*(rank["whole_s"] for rank in ranks), strict=True)]
        first_s, blocked, whole = blocked[0], blocked[1:], whole[1:]
        blocked_s, whole_s = statistics.median(blocked), statistics.median(whole)
        row = {
            "subject": "checkpoint",
            "model": f"{args.megabytes} MiB",
            "dtype": "float32",
            "ranks": num_ranks,
            "bytes": num_bytes,
            "whole_s": whole_s,
            "whole_min_s": min(whole),
            "whole_max_s": max(whole),
            "blocked_s": blocked_s,
            "blocked_min_s": min(blocked),
            "blocked_max_s": max(blocked),
            "first_blocked_s": first_s,
            "disturbed_s": statistics.median(ranks[0]["disturbed_s"]),
            "ratio": blocked_s / whole_s,
            "commit": commit,
        }
        spans = [f"{statistics.median(times):.3f} ({min(times):.3f}–{max(times):.3f})" for times in (whole, blocked)]
        steps = statistics.median(ranks[0]["num_steps"])
        cells = f"{num_bytes:,} | {spans[0]} | {num_bytes / whole_s / 1e9:.2f} | {spans[1]} | {first_s:.3f} | {blocked_s / whole_s:.3f}"
        print(f"| {args.megabytes} MiB | {num_ranks} | {cells} | {steps:g} |")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
