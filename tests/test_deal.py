"""Rows of a real iteration, dealt apart and with shared prompts."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.algo.plan import MIN_SHARED_TOKENS
from tandem.engine.config import OptimizerConfig, TrainerConfig
from tandem.engine.data.prompts import encode_prompt
from tandem.engine.data.tasks import prompts as task_prompts
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.recipes.toy_cpu import toy_cpu
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.small_toy import small_toy, steps_of


def shared_events(run_dir: Path) -> list[dict[str, Any]]:
    with gzip.open(run_dir / "trace.json.gz") as file:
        return [event["args"] for event in json.load(file)["traceEvents"] if event["name"] == "prompts are shared"]


@pytest.mark.distributed
def test_an_iteration_with_shared_prompts_computes_fewer_tokens_and_the_same_update(run_dir: Path, tmp_path: Path) -> None:
    steps = {}
    for share in ("never", "always"):
        folder = shutil.copytree(run_dir, tmp_path / share)
        trainer = TrainerConfig(updates_per_iteration=1, share_prompts=share, optimizer=OptimizerConfig(lr=4e-4, eps=1e-4))
        run_ranks(train, 2, small_toy(folder, steps=1, trainer=trainer))
        (steps[share],) = steps_of(folder)
        events = shared_events(folder)
        assert len(events) == (2 if share == "always" else 0)  # one of each rank
        assert all(0 < event["computed_tokens"] < 0.8 * event["positions"] for event in events)
    for name in ("tokens", "loss", "grad_norm", "entropy", "logprob_diff_mean"):
        assert steps["always"][f"train/{name}"] == pytest.approx(steps["never"][f"train/{name}"], rel=1e-4, abs=1e-7), name
    assert steps["never"]["train/grad_norm"] > 0


def test_the_toy_is_dealt_row_by_row() -> None:
    """Its prompts are too short to be worth sharing, so that its figures do not depend on it."""
    config = toy_cpu()
    assert config.trainer.share_prompts == "auto"
    tokenizer = load_tokenizer(config.model.path)
    records = task_prompts(config.data.task, config.data.task.num_prompts, config.seed)
    assert max(len(encode_prompt(str(record["question"]), tokenizer, config.data)) for record in records) < MIN_SHARED_TOKENS
