"""The loop with a fleet: a rollout-only node joins at iteration 1 and leaves at iteration 3, and a leader's server is killed."""

import contextlib
import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandem.engine.config import ElasticConfig, RolloutConfig, RunConfig, SGLangConfig
from tandem.engine.elastic import Roster
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.rollout.sglang_servers import need_sglang, server_processes
from tests.small_toy import small_toy, steps_of

pytestmark = [pytest.mark.slow, pytest.mark.sglang, pytest.mark.timeout(3000)]
PATIENCE_S = 900.0


def train_with_a_node(config: RunConfig) -> str:
    """What rank 0 or 1 printed. Rank 0 starts the node before iteration 1 begins, and stops it when iteration 3 does."""
    meet, iteration = Roster.meet, -1
    run = Path(str(config.run_dir))
    node: subprocess.Popen[bytes] | None = None

    def watched_meet(self: Roster) -> None:
        nonlocal iteration, node
        iteration += 1
        if os.environ["RANK"] == "0" and iteration == 1:
            command = [sys.executable, "-m", "tandem.engine.cli", "rollout-node", str(run), "--name", "n", "--host", "127.0.0.1"]
            with (run / "node.out").open("wb") as out:
                node = subprocess.Popen(command, stdout=out, stderr=out)
            deadline = time.monotonic() + PATIENCE_S
            while not (run / "nodes" / "n.json").exists():
                assert node.poll() is None, (run / "node.out").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        if node is not None and iteration == 3:
            node.send_signal(signal.SIGTERM)
            assert node.wait(PATIENCE_S) == 0
        meet(self)

    Roster.meet = watched_meet
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(config)
    assert iteration == config.steps - 1
    return printed.getvalue()


def test_a_node_joins_at_iteration_1_and_leaves_at_3(tmp_path: Path) -> None:
    need_sglang()
    before, shared_before = server_processes(), set(os.listdir("/dev/shm"))
    config = small_toy(tmp_path / "run", steps=4)
    rollout = RolloutConfig(
        engine="sglang",
        max_response_tokens=48,
        max_batch=16,
        sglang=SGLangConfig(start_timeout_s=PATIENCE_S),
        elastic=ElasticConfig(enabled=True),
    )
    warm_start = (dataclasses.replace(config.sft[0], steps=100),)
    said = run_ranks(train_with_a_node, 2, dataclasses.replace(config, rollout=rollout, sft=warm_start), timeout_s=2400)
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    for step in steps:
        # The project's bound on train against rollout, over all responses: the node has each iteration's weights.
        assert step["train/logprob_diff_max"] <= 1e-5
    assert said[0].count("rollout node n (http://127.0.0.1:") == 2, said
    assert "has joined" in said[0]
    assert "has left" in said[0]
    assert sum("rollout node n: " in line for line in said[0].splitlines() if "tokens from" in line) >= 2
    assert "rollout node n" not in said[1], "one leader has it"
    assert server_processes() <= before
    assert set(os.listdir("/dev/shm")) <= shared_before
