"""A run of seconds on a task small enough to learn, one warm start for all tests that go on from it, and what they look at afterwards."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.config import (
    ArithmeticTask,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTStage,
    TrainerConfig,
)
from tandem.engine.log import read_metrics
from tandem.engine.train import train
from tests.ranks import run_ranks

TASK = ArithmeticTask(
    modulus=5,
    min_operations=3,
    max_operations=3,
    operators="+",
    direct_probability=(0.6,),
    verbose_share=0.0,
    slip_probability=0.0,
    validation_share=0.05,
    test_share=0.3,
    num_prompts=100,
    num_sft_examples=6000,
    num_validation=5,
    num_test=40,
)

# Inherited by every process that these tests start, so that they find their own and no other session's.
os.environ["TANDEM_TEST_SESSION"] = str(os.getpid())
SESSION = f"TANDEM_TEST_SESSION={os.getpid()}"


def small_toy(run_dir: Path, **changes: Any) -> RunConfig:
    """A run of seconds. Its warm start leaves a model that can add step by step, and mostly guesses."""
    config = RunConfig(
        name="small_toy",
        run_dir=str(run_dir),
        steps=10,
        model=ModelConfig(
            num_layers=3, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, intermediate_size=320, context_length=64
        ),
        data=DataConfig(task=TASK),
        sft=(
            SFTStage(
                steps=450,
                batch_tokens=1024,
                max_tokens=64,
                optimizer=OptimizerConfig(lr=3e-3, warmup_steps=20, decay_style="linear", decay_start=0.4),
            ),
        ),
        sampling=SamplingConfig(groups_in_flight=24, num_samples=8),
        rollout=RolloutConfig(max_response_tokens=48),
        replay=ReplayConfig(groups_per_update=8),
        loss=LossConfig(scale=0.1),
        trainer=TrainerConfig(updates_per_iteration=2, optimizer=OptimizerConfig(lr=4e-4, eps=1e-4)),
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=0, keep=4),
        log=LogConfig(tensorboard=False, rollouts_every=0, progress=False),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="session")
def warm_started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a supervised warm start, which the tests copy and go on with."""
    folder = tmp_path_factory.mktemp("train") / "warm"
    run_ranks(train, 2, small_toy(folder, steps=0))
    return folder


@pytest.fixture
def run_dir(warm_started: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the warm start. Whatever becomes of a run, its engines are gone afterwards."""
    shutil.copytree(warm_started, tmp_path / "run")
    yield tmp_path / "run"
    deadline = time.monotonic() + 120
    while (left := engines_running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def engines_running() -> list[int]:
    """Process ids of the rollout engines that these tests started."""
    found = subprocess.run(["pgrep", "-f", "tandem.engine.rollout.embedded_worker"], capture_output=True, text=True, check=False)
    of_tests = []
    for pid in found.stdout.split():
        with contextlib.suppress(OSError):
            if SESSION.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                of_tests.append(int(pid))
    return of_tests


def export(run_dir: Path, to: Path) -> None:
    """In a process of its own, as a user would."""
    command = [sys.executable, "-m", "tandem.engine.cli", "export", str(run_dir), "--to", str(to)]
    subprocess.run(command, check=True, timeout=240, capture_output=True)


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if "rollout/reward" in line]


def weights_of(run_dir: Path, step: int) -> dict[str, bytes]:
    state = run_dir / "checkpoints" / f"step_{step:08d}" / "state"
    return {file.name: file.read_bytes() for file in sorted(state.glob("*.distcp"))}
