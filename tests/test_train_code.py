"""The loop on programs: the sandbox grades what the engine generates, and the reward rises."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tandem.engine.config import (
    DataConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    ProgramTask,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTStage,
    TrainerConfig,
)
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.reward.sandboxes import sandbox_or_skip
from tests.small_toy import small_toy, steps_of

# Three operations with the operand 2, so that a model learns in seconds what to write: 125 prompts, most of which invite a slip.
# An iteration draws all prompts to train on, so that the rewards of two can be compared.
TASK = ProgramTask(
    min_operations=3,
    max_operations=3,
    min_operand=2,
    max_operand=2,
    validation_share=0.05,
    test_share=0.25,
    num_prompts=16,
    num_sft_examples=3000,
    num_validation=2,
    num_test=20,
)


def small_programs(run_dir: Path, *, steps: int) -> RunConfig:
    return small_toy(
        run_dir,
        steps=steps,
        data=DataConfig(task=TASK),
        sft=(
            SFTStage(
                steps=200,
                batch_tokens=768,
                max_tokens=64,
                optimizer=OptimizerConfig(lr=3e-3, warmup_steps=20, decay_style="linear", decay_start=0.5),
            ),
        ),
        rollout=RolloutConfig(max_response_tokens=42),
        sampling=SamplingConfig(groups_in_flight=16, num_samples=8, prioritised=False),
        trainer=TrainerConfig(updates_per_iteration=2, optimizer=OptimizerConfig(lr=4e-4, eps=1e-4)),
        evaluation=EvaluationConfig(every=0, max_prompts=4),
        log=LogConfig(tensorboard=False, rollouts_every=1, progress=False),
    )


def test_verdicts_in_the_loop_are_the_sandboxs(tmp_path: Path) -> None:
    with sandbox_or_skip():
        pass
    run_ranks(train, 2, small_programs(tmp_path / "run", steps=1))
    (step,) = steps_of(tmp_path / "run")
    assert step["reward/code/num_responses"] == 16 * 8
    assert step["reward/code/not_graded_rate"] == 0
    rows = [row for rank in (0, 1) for row in pq.read_table(tmp_path / f"run/rollouts/step_00000_rank_{rank}.parquet").to_pylist()]
    assert len(rows) == 16 * 8
    assert 0 < sum(row["reward"] for row in rows) < len(rows)
    assert all((row["reason"] == "") == (row["reward"] == 1) for row in rows)
    assert any("wrong answer: word 1 of the output is" in row["reason"] for row in rows)
    for row in rows:  # a right program of this task has no / alone
        assert row["reward"] == 0 or "/" not in row["response"].replace("//", ""), row["response"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_reinforcement_on_programs_raises_the_reward(tmp_path: Path) -> None:
    with sandbox_or_skip():
        pass
    run_ranks(train, 2, small_programs(tmp_path / "run", steps=14), timeout_s=360)
    rewards = [step["rollout/reward"] for step in steps_of(tmp_path / "run")]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.1, rewards  # the first is of the warm start


def test_a_run_on_programs_without_bubblewrap_ends_at_its_start_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"the prompts need a sandbox: bwrap is not on the PATH; install bubblewrap.*reward\.sandbox_url"
    ):
        run_ranks(train, 2, small_programs(tmp_path / "run", steps=1))
    assert not (tmp_path / "run" / "checkpoints").exists()
