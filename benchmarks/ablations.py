"""The ablations of Kimi k1.5 in miniature: a smaller toy recipe, one thing changed at a time, several seeds; then tables and plots.

    python benchmarks/ablations.py [--seeds 0 1 2] [--jobs 1] [--arms base rest …] [--to runs/ablations]

Every arm of a seed goes on from one supervised warm start, so that the arms differ in nothing but what they name. Runs that are complete
are not run again; `benchmarks/ablations_report.py` makes docs/ablations.md of them. Each run has a core of its own.
"""

import argparse
import dataclasses
import heapq
import json
import os
import queue
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tandem.engine import build
from tandem.engine.config import CheckpointConfig, EvaluationConfig, LengthPenaltyConfig, LogConfig, RunConfig
from tandem.engine.log import METRICS_FILE, read_metrics
from tandem.engine.recipes.toy_cpu import toy_cpu
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.train import train
from tandem.engine.types import Completion, GenerationRequest

ROOT = Path(__file__).resolve().parent.parent
WORK_FILE = "engine_work.jsonl"
WARM = "warm"  # stands for the warm start where an arm is named

replace = dataclasses.replace


def recipe(seed: int) -> RunConfig:
    """The arm that all others change: full rollouts, mirror descent, curriculum and prioritised sampling, no length reward."""
    toy = toy_cpu()
    return replace(
        toy,
        name="ablations",
        seed=seed,
        steps=18,
        model=replace(toy.model, num_layers=3, hidden_size=128, num_attention_heads=4, intermediate_size=320, context_length=128),
        data=replace(toy.data, task=replace(toy.data.task, max_operations=4, direct_probability=(0.1, 0.4, 0.6), num_test=300)),
        sft=(replace(toy.sft[0], steps=350),),
        sampling=replace(toy.sampling, groups_in_flight=32, curriculum_steps=6),
        # Fewer rows than responses: rows that end are filled again, and only the last responses of a phase leave some idle.
        rollout=replace(toy.rollout, max_response_tokens=80, token_budget=None, max_batch=128),
        replay=replace(toy.replay, groups_per_update=32),
        length_penalty=LengthPenaltyConfig(),
        evaluation=EvaluationConfig(every=3),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(tensorboard=False, rollouts_every=0, progress=False),
    )


def _rest(base: RunConfig) -> RunConfig:
    return replace(base, loss=replace(base.loss, variant="rest"))


def _uniform(base: RunConfig) -> RunConfig:
    return replace(base, sampling=replace(base.sampling, prioritised=False, curriculum_steps=0))


def _length_on(base: RunConfig) -> RunConfig:
    return replace(base, length_penalty=LengthPenaltyConfig(weight=0.5))


def _length_warmup(base: RunConfig) -> RunConfig:
    return replace(base, length_penalty=LengthPenaltyConfig(weight=0.5, start_step=base.steps // 2, warmup_steps=4))


def _partial(base: RunConfig) -> RunConfig:
    # The budget is what a full phase takes on average; half as many groups again are in flight, so that the batch is full when it ends.
    return replace(
        base,
        sampling=replace(base.sampling, groups_in_flight=48),
        rollout=replace(base.rollout, token_budget=7500),
        replay=replace(base.replay, groups_per_update=8),
    )


def _partial_train(base: RunConfig) -> RunConfig:
    partial = _partial(base)
    return replace(partial, loss=replace(partial.loss, stale_segments="train"))


ARMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "base": lambda base: base,
    "rest": _rest,
    "uniform": _uniform,
    "length_on": _length_on,
    "length_warmup": _length_warmup,
    "partial": _partial,
    "partial_train": _partial_train,
}


def decode_steps(num_tokens: Sequence[int], max_batch: int) -> int:
    """Steps in which an engine of `max_batch` rows, filled first come, first served, gives each request its number of tokens."""
    rows = [0] * max_batch
    for tokens in num_tokens:
        heapq.heappush(rows, heapq.heappop(rows) + tokens)
    return max(rows)


class MeasuredEngine(EmbeddedEngine):
    """Writes down what each rollout phase costs the engine, in decode steps and CPU seconds."""

    def __init__(self, *args: Any, log_path: Path, **kwargs: Any) -> None:
        super().__init__(*args, log_path=log_path, **kwargs)
        self._file = log_path.parent.parent / WORK_FILE
        self._file.unlink(missing_ok=True)

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Generator[Completion, None, None]:
        process, num_tokens = psutil.Process(self.pid), dict.fromkeys((request.request_id for request in requests), 0)
        before_s = process.cpu_times().user
        for completion in super().generate(requests, token_budget=token_budget):
            num_tokens[completion.request_id] = len(completion.token_ids)
            yield completion
        if all(request.temperature is None for request in requests):  # no evaluation
            row = {
                "policy_version": self.policy_version,
                "num_tokens": sum(num_tokens.values()),
                "decode_steps": decode_steps(list(num_tokens.values()), self._setup.config.max_batch),
                "cpu_s": process.cpu_times().user - before_s,
            }
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")


def is_complete(folder: Path, steps: int) -> bool:
    """Whether a run ended here."""
    return (folder / METRICS_FILE).is_file() and read_metrics(folder)[-1]["step"] == steps


def run_arm(to: Path, arm: str, seed: int) -> None:
    """Run an arm from a copy of the seed's warm start, or the warm start itself."""
    config, warm = recipe(seed), to / f"{WARM}_{seed}"
    if arm == WARM:
        train(replace(config, steps=0, run_dir=str(warm)))
        return
    folder = to / f"{arm}_{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(warm, folder)
    build.EmbeddedEngine = MeasuredEngine
    train(replace(ARMS[arm](config), run_dir=str(folder)))


def run_all(to: Path, arms: Sequence[str], seeds: Sequence[int], jobs: int) -> None:
    """Run what is not complete, a process per run, `jobs` at a time, seed by seed."""
    available = sorted(os.sched_getaffinity(0))
    cores: queue.Queue[int] = queue.Queue()
    for job in range(jobs):
        cores.put(available[-1 - job % len(available)])
    (to / "logs").mkdir(parents=True, exist_ok=True)

    def start(arm: str, seed: int) -> None:
        core = cores.get()
        try:
            command = [sys.executable, str(Path(__file__)), "--to", str(to), "--only", arm, str(seed), "--core", str(core)]
            with (to / "logs" / f"{arm}_{seed}.log").open("w") as log:
                subprocess.run(command, stdout=log, stderr=log, check=True)
            print(f"{arm}, seed {seed}: done", flush=True)
        except subprocess.CalledProcessError:
            traceback.print_exc()
            raise
        finally:
            cores.put(core)

    with ThreadPoolExecutor(jobs) as pool:
        for seed in seeds:
            if not is_complete(to / f"{WARM}_{seed}", 0):
                start(WARM, seed)
            missing = [arm for arm in arms if not is_complete(to / f"{arm}_{seed}", recipe(seed).steps)]
            for done in [pool.submit(start, arm, seed) for arm in missing]:
                done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--to", type=Path, default=ROOT / "runs" / "ablations", help="folder of the run folders")
    parser.add_argument("--only", nargs=2, metavar=("ARM", "SEED"), help="run this one, in this process")
    parser.add_argument("--core", type=int, help="core of --only")
    args = parser.parse_args()
    if args.only is not None:
        if args.core is not None:
            os.sched_setaffinity(0, {args.core})
        run_arm(args.to, args.only[0], int(args.only[1]))
        return
    run_all(args.to, args.arms, args.seeds, args.jobs)
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "ablations_report.py"), "--runs", str(args.to)], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
