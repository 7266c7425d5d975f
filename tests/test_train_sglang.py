"""The loop with SGLang as its rollout engine, on a CPU: a server for each of two ranks."""

import dataclasses
import os
from pathlib import Path

import pytest

from tandem.engine.config import RolloutConfig, SGLangConfig
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.rollout.sglang_servers import need_sglang, server_processes
from tests.small_toy import small_toy, steps_of

pytestmark = [pytest.mark.slow, pytest.mark.sglang, pytest.mark.timeout(1500)]


def test_two_iterations_with_sglang_train_on_logprobs_that_are_the_trainers(tmp_path: Path) -> None:
    need_sglang()
    before, shared_before = server_processes(), set(os.listdir("/dev/shm"))
    config = small_toy(tmp_path / "run", steps=2)
    rollout = RolloutConfig(engine="sglang", max_response_tokens=48, max_batch=32, sglang=SGLangConfig(start_timeout_s=600))
    warm_start = (dataclasses.replace(config.sft[0], steps=100),)
    run_ranks(train, 2, dataclasses.replace(config, rollout=rollout, sft=warm_start), timeout_s=1200)
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1]
    for step in steps:
        # Two float32 implementations that add in a different order: the project's bound on train against rollout.
        assert step["train/logprob_diff_max"] <= 1e-5
        assert step["rollout/new_tokens"] > 0
    assert server_processes() <= before
    assert set(os.listdir("/dev/shm")) <= shared_before
