"""The loop with SGLang as its rollout engine, on a CPU: a server for each of two ranks."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import pytest

from tandem.engine.config import OptimizerConfig, RolloutConfig, SGLangConfig, TrainerConfig
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.rollout.sglang_servers import need_sglang, server_processes
from tests.small_toy import small_toy, steps_of

pytestmark = [pytest.mark.slow, pytest.mark.sglang, pytest.mark.timeout(1500)]


def test_two_iterations_with_sglang_train_on_logprobs_that_are_the_trainers(tmp_path: Path) -> None:
    need_sglang()
    before, shared_before = server_processes(), set(os.listdir("/dev/shm"))
    config = small_toy(tmp_path / "run", steps=2)
    # In turns, as on a GPU: the trainer's state leaves, and the servers are told to release memory, weights too.
    sglang = SGLangConfig(start_timeout_s=600, release="all")
    rollout = RolloutConfig(engine="sglang", max_response_tokens=48, max_batch=32, sglang=sglang)
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, sleep="on"))
    warm_start = (dataclasses.replace(config.sft[0], steps=100),)
    run_ranks(train, 2, dataclasses.replace(config, rollout=rollout, sft=warm_start), timeout_s=1200)
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1]
    for step in steps:
        # Two float32 implementations that add in a different order: the project's bound on train against rollout.
        assert step["train/logprob_diff_max"] <= 1e-5
        assert step["rollout/new_tokens"] > 0
        assert step["memory/serve/trainer_bytes"] == 0 < step["memory/train/trainer_bytes"]
    assert server_processes() <= before
    assert set(os.listdir("/dev/shm")) <= shared_before


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_over_swaps_at_a_learning_rate_of_0_the_difference_stays_flat(tmp_path: Path, engine: Literal["embedded", "sglang"]) -> None:
    """benchmarks/logprob_drift.py in small."""
    if engine == "sglang":
        need_sglang()
    config = small_toy(tmp_path / "run", steps=5)
    rollout = RolloutConfig(engine=engine, max_response_tokens=48, max_batch=32, sglang=SGLangConfig(start_timeout_s=600))
    trainer = TrainerConfig(updates_per_iteration=2, optimizer=OptimizerConfig(lr=0.0, eps=1e-4))
    warm_start = (dataclasses.replace(config.sft[0], steps=60),)
    run_ranks(train, 2, dataclasses.replace(config, rollout=rollout, trainer=trainer, sft=warm_start), timeout_s=1200)
    means = [step["train/logprob_diff_mean"] for step in steps_of(tmp_path / "run")]
    assert len(means) == 5
    assert max(step["train/logprob_diff_max"] for step in steps_of(tmp_path / "run")) <= 1e-5
    # Other tokens each time, so not the same number; an error that each swap adds to would be five times the first.
    assert 0 < max(means) <= 2.5 * min(means)
