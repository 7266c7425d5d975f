"""The loop itself, on real parts: Megatron-core ranks, the embedded engine, swaps, the replay buffer, and a task small enough to learn."""

import contextlib
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
from tandem.engine.evaluate import evaluate_model
from tandem.engine.log import read_metrics
from tandem.engine.recipes.registry import parse_recipe
from tandem.engine.report import write_report
from tandem.engine.train import train
from tests.ranks import run_ranks

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"

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


@pytest.fixture(scope="module")
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
    deadline = time.monotonic() + 10
    while (left := engines_running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


# Inherited by every process that these tests start, so that they find their own and no other session's.
os.environ["TANDEM_TEST_SESSION"] = str(os.getpid())
SESSION = f"TANDEM_TEST_SESSION={os.getpid()}"


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
    subprocess.run(command, check=True, timeout=100, capture_output=True)


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
        try:
            os.setpgid(0, 0)
            run_ranks(train, 2, small_toy(killed, **changes))
        finally:
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
    rollout, replay = RolloutConfig(max_response_tokens=48, token_budget=601, max_batch=16), ReplayConfig(groups_per_update=1)
    run_ranks(train, 2, small_toy(run_dir, steps=4, rollout=rollout, replay=replay))
    steps = steps_of(run_dir)
    assert any(line["rollout/resumed"] > 0 for line in steps[1:])
    assert any(line["rollout/stale_tokens"] > 0 for line in steps[1:])
    assert any(line["rollout/iterations_waited"] > 0 for line in steps[1:])
    assert all(line["train/logprob_diff_mean"] < 1e-6 for line in steps)  # of fresh tokens only


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "grpo"},
        {"variant": "ppo_clip"},
        {"variant": "gspo"},
        {"variant": "rest"},
        {"variant": "token_level"},
        {"baseline": "log_mean_exp"},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_every_loss_variant_trains(run_dir: Path, changes: Any) -> None:
    loss = LossConfig(scale=0.1, **changes)
    run_ranks(train, 2, small_toy(run_dir, steps=1, loss=loss, evaluation=EvaluationConfig(every=0, max_prompts=4)))
    (line,) = steps_of(run_dir)
    assert math.isfinite(line["train/loss"])
    assert line["train/grad_norm"] > 0


def test_the_rollouts_log_probs_serve_as_reference(run_dir: Path, tmp_path: Path) -> None:
    """They are those of the same weights, so the first update is nearly the same with a forward pass less."""
    shutil.copytree(run_dir, tmp_path / "other")
    sources: list[tuple[Path, Any]] = [(run_dir, "recompute"), (tmp_path / "other", "rollout")]
    for folder, source in sources:
        loss = LossConfig(reference=source, scale=0.1)
        trainer = TrainerConfig(updates_per_iteration=1, optimizer=OptimizerConfig(lr=4e-4, eps=1e-4))
        evaluation = EvaluationConfig(every=0, max_prompts=4)
        run_ranks(train, 2, small_toy(folder, steps=1, loss=loss, trainer=trainer, evaluation=evaluation))
    (recomputed,), (taken,) = steps_of(run_dir), steps_of(tmp_path / "other")
    for name in ("train/loss", "train/grad_norm"):
        assert taken[name] == pytest.approx(recomputed[name], rel=1e-4), name


def test_segments_of_older_policies_are_trained_where_asked(run_dir: Path, tmp_path: Path) -> None:
    rollout, replay = RolloutConfig(max_response_tokens=48, token_budget=601, max_batch=16), ReplayConfig(groups_per_update=1)
    first_stale = {}
    for treatment in ("mask", "correct", "train"):
        folder = tmp_path / treatment
        shutil.copytree(run_dir, folder)
        loss: Any = LossConfig(scale=0.1, stale_segments=treatment)
        evaluation = EvaluationConfig(every=0, max_prompts=4)
        run_ranks(train, 2, small_toy(folder, steps=3, rollout=rollout, replay=replay, loss=loss, evaluation=evaluation))
        lines = [line for line in steps_of(folder) if line["rollout/stale_tokens"] > 0 and "train/loss" in line]
        assert all(math.isfinite(line["train/loss"]) for line in lines)
        first_stale[treatment] = lines[0]
    # Until then all three are the same run.
    assert len({line["step"] for line in first_stale.values()}) == 1
    assert len({line["rollout/reward"] for line in first_stale.values()}) == 1
    assert first_stale["train"]["train/tokens"] == first_stale["correct"]["train/tokens"] > first_stale["mask"]["train/tokens"]
    assert len({line["train/loss"] for line in first_stale.values()}) == 3


def test_evaluating_the_exported_folder_gives_the_runs_own_pass_at_1(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "model")
    (in_run,) = [line["eval/pass_at_1"] for line in read_metrics(run_dir) if line.get("eval/pass_at_1") is not None]
    found = evaluate_model(tmp_path / "model", run_dir / "data" / "eval.jsonl", max_response_tokens=48)
    assert found["num_prompts"] == 40
    assert found["pass_at_1"] == in_run


def test_two_tensor_parallel_ranks_share_one_engine_and_go_on_with_a_data_parallel_run(run_dir: Path) -> None:
    mesh, rollout = MeshConfig(tp=2, sequence_parallel=True), RolloutConfig(tp=2, max_response_tokens=48)
    run_ranks(train, 2, small_toy(run_dir, steps=2, mesh=mesh, rollout=rollout))
    steps = steps_of(run_dir)
    assert [line["rollout/num_responses"] for line in steps] == [24 * 8] * 2
    assert max(line["train/logprob_diff_mean"] for line in steps) < 1e-6


def test_layers_that_the_stages_do_not_divide_end_the_run_before_it_starts(run_dir: Path) -> None:
    with pytest.raises(RuntimeError, match=r"mesh.pp=2 x mesh.vpp=1 does not divide the model's num_hidden_layers=3"):
        run_ranks(train, 2, small_toy(run_dir, mesh=MeshConfig(pp=2)))


def test_two_pipeline_stages_train_what_both_leaders_generate(tmp_path: Path) -> None:
    model = dataclasses.replace(small_toy(tmp_path).model, num_layers=2)
    (stage,) = small_toy(tmp_path).sft
    config = small_toy(tmp_path / "run", steps=2, mesh=MeshConfig(pp=2), model=model, sft=(dataclasses.replace(stage, steps=80),))
    run_ranks(train, 2, config)
    steps = steps_of(tmp_path / "run")
    assert all(line["train/tokens"] > 0 for line in steps)
    assert max(line["train/logprob_diff_mean"] for line in steps) < 1e-6


def test_a_run_of_another_model_is_not_resumed(run_dir: Path) -> None:
    model = dataclasses.replace(small_toy(run_dir).model, num_key_value_heads=2)
    with pytest.raises(RuntimeError, match="holds a run with model"):
        run_ranks(train, 1, small_toy(run_dir, model=model))


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
    assert weights_of(run_dir, 1) == before


def test_supervised_training_alone_runs_both_stages_of_the_paper_on_a_folder_and_a_file(run_dir: Path, tmp_path: Path) -> None:
    exported, examples = tmp_path / "model", tmp_path / "sft.jsonl"
    export(run_dir, exported)
    examples.write_text(
        "".join(json.dumps({"prompt": f"{i}+{j}?", "response": f"A:{(i + j) % 5}."}) + "\n" for i in range(20) for j in range(5))
    )
    options = [
        "--model.path",
        str(exported),
        "--model.context_length",
        "64",
        "--data.sft",
        str(examples),
        "--run_dir",
        str(tmp_path / "sft"),
    ]
    small = ["--rollout.max_response_tokens", "16", "--trainer.dtype", "float32"]
    stages = [f"--sft.{i}.{name}" for i in (0, 1) for name in ("batch_tokens", "max_tokens")]
    config = parse_recipe(
        ["sft_two_stage", *options, *small, *[part for name in stages for part in (name, "256" if "batch" in name else "64")]]
    )
    run_ranks(train, 2, config)
    lines = [line for line in read_metrics(tmp_path / "sft") if line["step"] == -1]
    assert {line["sft/stage"] for line in lines} == {0, 1}
    num_tokens = sum(len(f"{i}+{j}?") + 1 + len("A:0.") for i in range(20) for j in range(5))
    assert {line["sft/step"] for line in lines} == {math.ceil(num_tokens / 256)}
    assert (tmp_path / "sft" / "checkpoints" / "step_00000000").is_dir()


def test_a_prompts_file_of_the_users_own_takes_the_tasks_place(run_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "own.jsonl"
    questions = [f"Ann has {i} apples and buys {i + 2} more. How many has she?" for i in range(12)]
    prompts.write_text("".join(json.dumps({"question": q, "answer": f"… #### {2 * i + 2}"}) + "\n" for i, q in enumerate(questions)))
    config = small_toy(tmp_path / "own", steps=1, data=DataConfig(prompts=str(prompts)), sft=())
    config = dataclasses.replace(config, sampling=SamplingConfig(groups_in_flight=8, num_samples=2))
    run_ranks(train, 2, config)
    (line,) = steps_of(tmp_path / "own")
    assert line["rollout/num_responses"] == 16
    # The context grows to what the longest of them needs.
    longest = max(len(q.encode()) for q in questions) + 1
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model"]["context_length"] == longest + 48
    assert "eval/pass_at_1" not in line  # the task's test set says nothing about these


def test_groups_of_one_prompt_are_different_samples(tmp_path: Path) -> None:
    prompts = tmp_path / "few.jsonl"
    prompts.write_text("".join(json.dumps({"question": f"{i}+2+3?", "answer": "0", "domain": "arithmetic"}) + "\n" for i in range(3)))
    own = tmp_path / "own"
    config = small_toy(own, steps=1, data=DataConfig(prompts=str(prompts)), sampling=SamplingConfig(groups_in_flight=9, num_samples=8))
    run_ranks(train, 2, dataclasses.replace(config, sft=(), log=LogConfig(tensorboard=False, progress=False)))
    rows = [row for rank in (0, 1) for row in pq.read_table(own / "rollouts" / f"step_00000_rank_{rank}.parquet").to_pylist()]
    assert len(rows) == 9 * 8
    # An untrained model's long responses: none comes twice.
    long_ones = [row["response"] for row in rows if row["num_tokens"] == 48]
    assert len(long_ones) > 20
    assert len(set(long_ones)) == len(long_ones)


def test_gsm8k_takes_the_toys_place_by_one_option(tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not there")
    options = ["--data.prompts", str(GSM8K), "--run_dir", str(tmp_path / "gsm8k"), "--steps", "2", "--sft.0.steps", "2"]
    small = ["--sampling.groups_in_flight", "8", "--sampling.num_samples", "2", "--replay.groups_per_update", "4"]
    config = parse_recipe(["toy_cpu", *options, *small])
    run_ranks(train, 2, dataclasses.replace(config, length_penalty=LengthPenaltyConfig(weight=0.5)))
    steps = steps_of(tmp_path / "gsm8k")
    assert len(steps) == 2
    assert all(line["rollout/num_responses"] >= 8 for line in steps)


def test_a_killed_engine_is_replaced_and_its_responses_are_generated_again(run_dir: Path) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            run_ranks(train, 2, small_toy(run_dir, steps=6))
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    for step in (0, 2):
        while not any(line["step"] == step for line in steps_of(run_dir)) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(engines_running()[0], signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    assert [line["step"] for line in steps_of(run_dir)] == list(range(6))
    assert max(line["train/logprob_diff_mean"] for line in steps_of(run_dir)) < 1e-6


def test_a_model_folder_of_the_users_own_is_trained_without_a_warm_start(run_dir: Path, tmp_path: Path) -> None:
    exported, own = tmp_path / "model", tmp_path / "own"
    export(run_dir, exported)
    model = ModelConfig(path=str(exported), context_length=64)
    run_ranks(train, 2, small_toy(own, steps=1, model=model))
    (line,) = steps_of(own)
    assert not [line for line in read_metrics(own) if line["step"] == -1]
    evaluations = [next(line["eval/pass_at_1"] for line in read_metrics(folder) if "eval/pass_at_1" in line) for folder in (own, run_dir)]
    assert evaluations[0] == evaluations[1]  # the same weights before the first update
    assert json.loads((own / "config.json").read_text())["sft"] == []
    assert line["train/logprob_diff_mean"] < 1e-6


def test_a_context_that_the_model_was_not_made_for_is_an_error(tmp_path: Path, run_dir: Path) -> None:
    exported = tmp_path / "model"
    export(run_dir, exported)
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
