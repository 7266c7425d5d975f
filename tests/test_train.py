"""The loop itself, on real parts: Megatron-core ranks, the embedded engine, swaps, the replay buffer, and a task small enough to learn.

tests/test_faults.py has the runs that are killed, and those whose engines are.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tandem.engine.config import (
    DataConfig,
    EvaluationConfig,
    LogConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    ReplayConfig,
    RolloutConfig,
    SamplingConfig,
    TrainerConfig,
)
from tandem.engine.log import read_metrics
from tandem.engine.report import write_report
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.small_toy import small_toy, steps_of, weights_of


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
        pytest.param({"variant": "grpo"}, marks=pytest.mark.slow),
        pytest.param({"variant": "ppo_clip"}, marks=pytest.mark.slow),
        {"variant": "gspo"},
        {"variant": "rest"},
        pytest.param({"variant": "token_level"}, marks=pytest.mark.slow),
        pytest.param({"baseline": "log_mean_exp"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_every_loss_variant_trains(run_dir: Path, changes: Any) -> None:
    """One with a value per response, and one that takes the right responses only; tests/trainer/test_layouts.py has all of them."""
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


def test_two_tensor_parallel_ranks_share_one_engine_and_go_on_with_a_data_parallel_run(run_dir: Path) -> None:
    mesh, rollout = MeshConfig(tp=2, sequence_parallel=True), RolloutConfig(tp=2, max_response_tokens=48)
    run_ranks(train, 2, small_toy(run_dir, steps=2, mesh=mesh, rollout=rollout))
    steps = steps_of(run_dir)
    assert [line["rollout/num_responses"] for line in steps] == [24 * 8] * 2
    assert max(line["train/logprob_diff_mean"] for line in steps) < 1e-6


def test_two_pipeline_stages_train_what_both_leaders_generate(tmp_path: Path) -> None:
    model = dataclasses.replace(small_toy(tmp_path).model, num_layers=2)
    (stage,) = small_toy(tmp_path).sft
    config = small_toy(tmp_path / "run", steps=2, mesh=MeshConfig(pp=2), model=model, sft=(dataclasses.replace(stage, steps=80),))
    run_ranks(train, 2, config)
    steps = steps_of(tmp_path / "run")
    assert all(line["train/tokens"] > 0 for line in steps)
    assert max(line["train/logprob_diff_mean"] for line in steps) < 1e-6


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


def test_torch_is_seeded_by_the_run_and_not_by_what_ran_before(run_dir: Path) -> None:
    torch.manual_seed(1)
    run_ranks(train, 2, small_toy(run_dir, steps=1))
    again = run_dir.with_name("again")
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "checkpoints" / "step_00000001")
    torch.manual_seed(2)
    run_ranks(train, 2, small_toy(again, steps=1))
    assert weights_of(again, 1) == weights_of(run_dir, 1)
