"""The run that the fault tests break: seconds long, two ranks, with everything that has a state; and what two runs must have in common."""

import dataclasses
import sqlite3
from pathlib import Path
from typing import Any

from tandem.engine.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
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
from tests.small_toy import TASK, small_toy, weights_of

STEPS = 4
SHORT = dataclasses.replace(
    TASK,
    min_operations=2,
    direct_probability=(0.0, 0.0),
    verbose_share=1.0,
    validation_share=0.1,
    num_prompts=60,
    num_sft_examples=2000,
    num_test=12,
)
# What depends on the clock, and what depends on it.
TIMED = ("time", "step_s", "phase_s/", "overhead_fraction", "tokens_per_s", "latency_s", "memory/")


def faulty_run(run_dir: Path, **changes: Any) -> RunConfig:
    """Responses that the budget cuts, a curriculum, priorities, an optimizer that is kept, and a checkpoint every other iteration."""
    config = small_toy(
        run_dir,
        steps=STEPS,
        model=ModelConfig(
            num_layers=2, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96, context_length=96
        ),
        data=DataConfig(task=SHORT),
        sft=(SFTStage(steps=120, batch_tokens=768, max_tokens=80, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=10)),),
        sampling=SamplingConfig(groups_in_flight=16, num_samples=6, curriculum_steps=2),
        rollout=RolloutConfig(max_response_tokens=64, token_budget=1500, max_batch=24),
        replay=ReplayConfig(groups_per_update=10),
        trainer=TrainerConfig(updates_per_iteration=2, reset_optimizer=False, optimizer=OptimizerConfig(lr=4e-4, eps=1e-4)),
        evaluation=EvaluationConfig(every=2),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    return dataclasses.replace(config, **changes)


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that two runs must have in common, bit for bit: weights and optimizer, sampler, buffers, metrics."""
    checkpoints = sorted((run_dir / "checkpoints").glob("step_*"))
    metrics = [{name: value for name, value in line.items() if not any(part in name for part in TIMED)} for line in read_metrics(run_dir)]
    return {
        "checkpoints": [folder.name for folder in checkpoints],
        "weights": weights_of(run_dir, int(checkpoints[-1].name.removeprefix("step_"))),
        "sampler": (checkpoints[-1] / "extra_0.pt").read_bytes(),
        "buffers": [buffer_rows(file) for file in sorted((run_dir / "replay").glob("rank_*.sqlite"))],
        "metrics": metrics,
    }


def buffer_rows(file: Path) -> list[tuple[Any, ...]]:
    """Of a replay buffer, oldest first; row numbers go on over what was rewound, and are left out."""
    database = sqlite3.connect(file)
    rows = database.execute("SELECT kind, created, consumed, payload, checksum FROM groups ORDER BY row_id").fetchall()
    database.close()
    return rows
