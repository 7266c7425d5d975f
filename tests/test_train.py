"""The loop itself, on real parts: Megatron-core ranks, the embedded engine, swaps, the replay buffer, and a task small enough to learn."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tandem.engine.config import (
    ArithmeticTask,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LengthPenaltyConfig,
    LogConfig,
    LossConfig,
    MeshConfig,
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
from tandem.engine.report import write_report
from tandem.engine.train import train
from tests.ranks import run_ranks

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"

TASK = ArithmeticTask(
    modulus=5,
    max_operations=2,
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
                steps=400,
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


@pytest.fixture(scope="module")
def warm_started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a supervised warm start, which the tests copy and go on with."""
    folder = tmp_path_factory.mktemp("train") / "warm"
    run_ranks(train, 2, small_toy(folder, steps=0))
    return folder


@pytest.fixture
def run_dir(warm_started: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(warm_started, tmp_path / "run")
    shared_memory = set(os.listdir("/dev/shm"))
    yield tmp_path / "run"
    assert set(os.listdir("/dev/shm")) <= shared_memory


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if "rollout/reward" in line]


def weights_of(run_dir: Path, step: int) -> dict[str, bytes]:
    state = run_dir / "checkpoints" / f"step_{step:08d}" / "state"
    return {file.name: file.read_bytes() for file in sorted(state.glob("*.distcp"))}


def test_reinforcement_raises_the_reward_and_pass_at_1(run_dir: Path) -> None:
    run_ranks(train, 2, small_toy(run_dir, log=LogConfig(progress=False)))
    steps, lines = steps_of(run_dir), read_metrics(run_dir)
    first, last = (sum(line["rollout/reward"] for line in part) / 3 for part in (steps[:3], steps[-3:]))
    evaluations = [line["eval/pass_at_1"] for line in lines if line.get("eval/pass_at_1") is not None and line["step"] >= 0]
    assert len(steps) == 10
    assert last > first + 0.1
    assert evaluations[-1] > evaluations[0] + 0.1
    assert max(line["train/logprob_diff_mean"] for line in steps) < 1e-6
    # What people look at is there.
    samples = pq.read_table(run_dir / "rollouts" / "step_00009_rank_0.parquet").to_pylist()
    assert len(samples) == 12 * 8
    assert all(row["num_tokens"] <= 48 for row in samples)
    assert (run_dir / "trace.json.gz").stat().st_size > 1000
    assert list((run_dir / "tensorboard").iterdir())
    assert write_report(run_dir).stat().st_size > 100_000


def test_a_killed_run_goes_on_bit_for_bit(warm_started: Path, tmp_path: Path) -> None:
    checkpoint = CheckpointConfig(every=1, keep=8)
    # Cut responses, a curriculum and priorities: everything that has a state.
    changes = {
        "steps": 4,
        "checkpoint": checkpoint,
        "rollout": RolloutConfig(max_response_tokens=48, token_budget=1500),
        "sampling": SamplingConfig(groups_in_flight=24, num_samples=8, curriculum_steps=3),
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(warm_started, whole)
    shutil.copytree(warm_started, killed)
    run_ranks(train, 2, small_toy(whole, **changes))

    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        run_ranks(train, 2, small_toy(killed, **changes))
        os._exit(0)
    deadline = time.monotonic() + 60
    while not any(line["step"] == 1 for line in steps_of(killed)) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    assert len(children) == 2, "the run ended before it was killed"
    for child in children:
        os.killpg(int(child), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    run_ranks(train, 2, small_toy(killed, **changes))
    assert weights_of(killed, 4) == weights_of(whole, 4)

    def comparable(run: Path) -> list[dict[str, Any]]:
        timed = ("time", "step_s", "phase_s/", "overhead_fraction", "tokens_per_s")
        return [{name: value for name, value in line.items() if not any(part in name for part in timed)} for line in steps_of(run)]

    assert comparable(killed) == comparable(whole)


def test_responses_cut_by_the_budget_are_finished_in_later_iterations(run_dir: Path) -> None:
    run_ranks(train, 2, small_toy(run_dir, steps=4, rollout=RolloutConfig(max_response_tokens=48, token_budget=1000)))
    steps = steps_of(run_dir)
    assert steps[0]["rollout/new_tokens"] % 1000 == 0
    assert any(line["rollout/resumed"] > 0 for line in steps[1:])
    assert any(line["rollout/stale_tokens"] > 0 for line in steps[1:])
    assert any(line["rollout/iterations_waited"] > 0 for line in steps[1:])
    assert all(line["train/logprob_diff_mean"] < 1e-6 for line in steps)  # of fresh tokens only


@pytest.mark.parametrize("variant", ["grpo", "ppo_clip", "gspo", "rest"])
def test_every_loss_variant_trains(run_dir: Path, variant: Any) -> None:
    loss = LossConfig(variant=variant, scale=0.1)
    run_ranks(train, 2, small_toy(run_dir, steps=1, loss=loss, evaluation=EvaluationConfig(every=0, max_prompts=4)))
    (line,) = steps_of(run_dir)
    assert math.isfinite(line["train/loss"])
    assert line["train/grad_norm"] > 0


def test_two_tensor_parallel_ranks_share_one_engine_and_agree_with_it(warm_started: Path, tmp_path: Path) -> None:
    shutil.copytree(warm_started, tmp_path / "run")
    mesh, rollout = MeshConfig(tp=2, sequence_parallel=True), RolloutConfig(tp=2, max_response_tokens=48)
    model = dataclasses.replace(small_toy(tmp_path).model, num_key_value_heads=2)
    config = small_toy(tmp_path / "run", steps=1, mesh=mesh, rollout=rollout, model=model, sft=())
    with pytest.raises(RuntimeError, match="holds a run with model"):
        run_ranks(train, 2, config)
    run_ranks(train, 2, dataclasses.replace(config, run_dir=str(tmp_path / "other")))
    (line,) = steps_of(tmp_path / "other")
    assert line["train/logprob_diff_max"] < 1e-5


def test_weights_that_do_not_change_keep_the_engines_apart_by_the_same_little(run_dir: Path) -> None:
    trainer = TrainerConfig(updates_per_iteration=1, optimizer=OptimizerConfig(lr=0.0))
    run_ranks(train, 2, small_toy(run_dir, steps=5, trainer=trainer, evaluation=EvaluationConfig(every=0, max_prompts=4)))
    differences = [line["train/logprob_diff_mean"] for line in steps_of(run_dir)]
    assert max(differences) < 1e-6
    assert max(differences) < 3 * min(differences)


def test_one_response_per_prompt_has_no_signal_and_changes_nothing(run_dir: Path) -> None:
    before = weights_of(run_dir, 0)
    run_ranks(train, 2, small_toy(run_dir, steps=1, sampling=SamplingConfig(groups_in_flight=24, num_samples=1)))
    (line,) = steps_of(run_dir)
    assert line["rollout/num_responses"] == 24
    assert "train/loss" not in line
    assert len(before) == len(weights_of(run_dir, 1))


def test_a_prompts_file_of_the_users_own_takes_the_tasks_place(run_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "own.jsonl"
    questions = [f"Ann has {i} apples and buys {i + 2} more. How many has she?" for i in range(12)]
    prompts.write_text("".join(json.dumps({"question": q, "answer": f"… #### {2 * i + 2}"}) + "\n" for i, q in enumerate(questions)))
    model = dataclasses.replace(small_toy(tmp_path).model, context_length=160)
    config = small_toy(tmp_path / "own", steps=1, model=model, data=DataConfig(prompts=str(prompts)), sft=())
    config = dataclasses.replace(config, sampling=SamplingConfig(groups_in_flight=8, num_samples=2))
    run_ranks(train, 2, config)
    (line,) = steps_of(tmp_path / "own")
    assert line["rollout/num_responses"] == 16
    assert "eval/pass_at_1" not in line  # the task's test set says nothing about these


def test_gsm8k_loads_and_runs(tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not there")
    model = dataclasses.replace(small_toy(tmp_path).model, context_length=1100)
    config = small_toy(tmp_path / "gsm8k", steps=2, model=model, data=DataConfig(prompts=str(GSM8K)), sft=())
    config = dataclasses.replace(
        config,
        sampling=SamplingConfig(groups_in_flight=8, num_samples=2),
        length_penalty=LengthPenaltyConfig(weight=0.5),
        replay=ReplayConfig(groups_per_update=4),
    )
    run_ranks(train, 2, config)
    assert len(steps_of(tmp_path / "gsm8k")) == 2


def test_a_model_folder_of_the_users_own_is_trained_without_a_warm_start(run_dir: Path, tmp_path: Path) -> None:
    exported, own = tmp_path / "model", tmp_path / "own"
    command = [sys.executable, "-m", "tandem.engine.cli", "export", str(run_dir), "--to", str(exported)]
    subprocess.run(command, check=True, timeout=100, capture_output=True)
    model = ModelConfig(path=str(exported), context_length=64)
    run_ranks(train, 2, small_toy(own, steps=1, model=model))
    (line,) = steps_of(own)
    assert not [line for line in read_metrics(own) if line["step"] == -1]
    evaluations = [
        next(line["eval/pass_at_1"] for line in read_metrics(folder) if "eval/pass_at_1" in line) for folder in (own, run_dir)
    ]
    assert evaluations[0] == evaluations[1]  # the same weights before the first update
    assert json.loads((own / "config.json").read_text())["sft"] == []
    assert line["train/logprob_diff_mean"] < 1e-6


def test_a_context_that_the_model_was_not_made_for_is_an_error(tmp_path: Path, run_dir: Path) -> None:
    exported = tmp_path / "model"
    command = [sys.executable, "-m", "tandem.engine.cli", "export", str(run_dir), "--to", str(exported)]
    subprocess.run(command, check=True, timeout=100, capture_output=True)
    model = ModelConfig(path=str(exported), context_length=4096)
    with pytest.raises(RuntimeError, match=r"model.context_length is 4096; it must not exceed max_position_embeddings"):
        run_ranks(train, 1, small_toy(tmp_path / "own", model=model))


def test_prompts_that_do_not_exist_and_bad_lines_end_the_run_before_it_starts(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1+1?", "answer": "2"}\nnot json\n')
    with pytest.raises(RuntimeError, match=r"bad.jsonl:2"):
        run_ranks(train, 1, small_toy(tmp_path / "bad", data=DataConfig(prompts=str(bad))))
    with pytest.raises(RuntimeError, match=r"missing.jsonl"):
        run_ranks(train, 1, small_toy(tmp_path / "missing", data=DataConfig(prompts=str(tmp_path / "missing.jsonl"))))


def test_torch_is_seeded_by_the_run_and_not_by_what_ran_before(run_dir: Path) -> None:
    torch.manual_seed(1)
    run_ranks(train, 2, small_toy(run_dir, steps=1))
    again = run_dir.with_name("again")
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "checkpoints" / "step_00000001")
    torch.manual_seed(2)
    run_ranks(train, 2, small_toy(again, steps=1))
    assert weights_of(again, 1) == weights_of(run_dir, 1)
