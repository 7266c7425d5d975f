"""`tandem rollout-node`: a real process with a real SGLang server that joins a leader's fleet, generates, leaves, and is killed."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tandem.engine.cli import main
from tandem.engine.config import ElasticConfig, ModelConfig, RepetitionConfig, RolloutConfig, RunConfig
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.hf_config import hf_config_of
from tandem.engine.rollout.fleet import FleetEngine
from tandem.engine.rollout.nodes import Announcement, model_digest, read_announcement
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_server import ServerSetup, SGLangServer
from tandem.engine.types import Completion, GenerationRequest
from tests.rollout.models import reference_logprobs, serve
from tests.rollout.sglang_servers import SGLANG, need_sglang, server_processes

ROLLOUT = RolloutConfig(
    engine="sglang",
    max_batch=8,
    repetition=RepetitionConfig(max_period=0, ngram=0),
    sglang=SGLANG,
    elastic=ElasticConfig(enabled=True, timeout_s=120.0),
)
CONFIG = RunConfig(
    name="elastic",
    model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96, context_length=128),
    rollout=ROLLOUT,
)
HF_CONFIG = hf_config_of(CONFIG.model, load_tokenizer(None))
DIGEST = model_digest(HF_CONFIG, dtype=CONFIG.trainer.dtype, context_length=128)
PATIENCE_S = 400.0  # for a server to start where everything else runs too


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A node that runs in this process takes them over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def a_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    fields: dict[str, Any] = HF_CONFIG | {"initializer_range": 0.2}
    return Qwen3ForCausalLM(Qwen3Config(**fields)).eval()


def some_requests(num: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(request_id=str(i), token_ids=(1 + i % 7, 2, 3), num_prefix_tokens=0, max_new_tokens=20 + i % 60, seed=i)
        for i in range(num)
    ]


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


class NodeProcess:
    """As a user starts one."""

    def __init__(self, run: Path, name: str, *options: str) -> None:
        self.path, self.out = run / "nodes" / f"{name}.json", run / f"{name}.out"
        command = [sys.executable, "-m", "tandem.engine.cli", "rollout-node", str(run), "--name", name, "--host", "127.0.0.1", *options]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    def announcement(self, fleet: FleetEngine) -> Announcement:
        def announced() -> bool:
            assert self.process.poll() is None, self.out.read_text()
            return self.path.exists()

        wait_for(announced, "the node never announced itself")
        return read_announcement(self.path, model=DIGEST, sglang=fleet.sglang)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


def assert_of(model: PreTrainedModel, completions: list[Completion], requests: list[GenerationRequest], version: int) -> None:
    """Each once, with log-probs of this model: its weights are where it was generated."""
    assert sorted(completion.request_id for completion in completions) == sorted(request.request_id for request in requests)
    for completion in completions:
        request = requests[int(completion.request_id)]
        assert (len(completion.token_ids), completion.policy_version) == (request.max_new_tokens, version)
        expected = reference_logprobs(model, request.token_ids, completion.token_ids)
        assert (expected - torch.tensor(completion.logprobs)).abs().max() <= 1e-5  # the bound of train against rollout


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.timeout(2400)
def test_a_node_joins_generates_with_each_version_is_killed_and_another_one_leaves(tmp_path: Path) -> None:
    need_sglang()
    before, shared_before = server_processes(), set(os.listdir("/dev/shm"))
    said, models, requests = list[str](), [a_model(seed) for seed in range(3)], some_requests(40)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    setup = ServerSetup(
        hf_config=HF_CONFIG, config=SGLANG, dtype=CONFIG.trainer.dtype, context_length=128, max_running=8, log_path=tmp_path / "local.log"
    )
    node = NodeProcess(tmp_path, "first")
    local = SGLangEngine(SGLangServer(setup), ROLLOUT, stop_token_ids=(), timeout_s=300.0)
    fleet = FleetEngine(local, HF_CONFIG, ROLLOUT, context_length=128, stop_token_ids=(), say=said.append)
    try:
        fleet.wait_until_ready()
        first = node.announcement(fleet)
        fleet.meet([], [first])
        for version in range(2):
            serve(fleet, models[version], policy_version=version)
            assert_of(models[version], list(fleet.generate(requests)), requests, version)
        assert sum("rollout node first" in line and "has joined" in line for line in said) == 1
        shares = [line for line in said if line.startswith("tokens from")]
        assert len(shares) == 2
        assert all("rollout node first: " in line for line in shares)

        generation = fleet.generate(requests)
        completions = [next(generation)]
        node.kill()
        completions += generation
        assert_of(models[1], completions, requests, 1)
        wait_for(lambda: any("first" in line and "it is dropped" in line for line in said), "the dead node is not dropped")

        node = NodeProcess(tmp_path, "second")
        fleet.meet([], [first, node.announcement(fleet)])  # the killed one's announcement is still there
        serve(fleet, models[2], policy_version=2)
        generation = fleet.generate(requests)
        completions = [next(generation)]
        node.process.send_signal(signal.SIGTERM)
        completions += generation
        assert_of(models[2], completions, requests, 2)
        assert node.process.wait(PATIENCE_S) == 0
        assert not node.path.exists()
        assert any("rollout node second" in line and "has left" in line for line in said)
        assert_of(models[2], list(fleet.generate(requests)), requests, 2)
    finally:
        node.kill()
        fleet.close()
    wait_for(lambda: server_processes() <= before, "a server is left")
    wait_for(lambda: set(os.listdir("/dev/shm")) <= shared_before, "something is left in shared memory")


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.timeout(900)
def test_a_node_whose_server_never_becomes_healthy_ends_and_was_never_announced(tmp_path: Path) -> None:
    need_sglang()
    before = server_processes()
    sglang = dataclasses.replace(SGLANG, start_timeout_s=1.0)
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(ROLLOUT, sglang=sglang))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    node = NodeProcess(tmp_path, "late")
    assert node.process.wait(PATIENCE_S) == 1
    assert "was not healthy within rollout.sglang.start_timeout_s=1 s and was killed" in node.out.read_text()
    assert not node.path.exists()
    wait_for(lambda: server_processes() <= before, "a server is left")


@pytest.mark.slow  # imports torch in another process
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_that_is_stopped_before_its_server_is_healthy_leaves_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """The interpreter says that it has SGLang, and its server never answers."""
    before = server_processes()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo 0.5.21; else exec sleep 1000; fi\n')
    python.chmod(0o755)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    node = NodeProcess(tmp_path, "early", "--python", str(python))
    try:
        wait_for(lambda: server_processes() - before or node.process.poll() is not None, "the node never starts a server")
        node.process.send_signal(number)
        assert node.process.wait(PATIENCE_S) == 128 + number, node.out.read_text()
    finally:
        node.kill()
    assert not node.path.exists()
    wait_for(lambda: server_processes() <= before, "a server is left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "../x"], "name is '../x'; it becomes a file's: letters, digits, . _ and - only, not beginning with a dot"),
        (["--tp", "0"], "tp is 0; it must be at least 1"),
        (["--control_port", "70000"], "control_port is 70000; it must lie between 1 and 65535, or be None"),
        (["--wait_s", "0"], "config.json is not there after 0 s; name the folder of a run, on a file system that both share"),
    ],
)
def test_bad_input_says_what_to_change(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["rollout-node", str(tmp_path), *arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert message in " ".join((shown.out + shown.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a run's: "),
        ('{"name": "x", "no_such": 1}', "is not a run's: RunConfig has no field no_such"),
        (json.dumps(RunConfig(name="x").to_dict()), "has rollout.elastic.enabled false; start the run with --rollout.elastic.enabled True"),
    ],
)
def test_a_folder_that_is_no_elastic_run_is_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["rollout-node", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_address_of_another_machine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with pytest.raises(SystemExit):
        main(["rollout-node", str(tmp_path), "--host", "192.0.2.1"])
    assert "192.0.2.1 is no address that this machine can listen on" in capsys.readouterr().err


def test_a_port_for_commands_that_is_in_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["rollout-node", str(tmp_path), "--host", "127.0.0.1", "--control_port", str(port)])
    said = capsys.readouterr().err
    assert f"port {port} is in use" in said
    assert "choose another --control_port" in said
