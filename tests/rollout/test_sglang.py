"""SGLang as an engine: its process, its versions, its cache, and faults at every step of a swap. A real server where one is needed."""

import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tandem.engine.buckets import ShardedWeightSink
from tandem.engine.config import RepetitionConfig, RolloutConfig, SGLangConfig
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_client import SGLangClient
from tandem.engine.rollout.sglang_guard import mapped_files, processes
from tandem.engine.rollout.sglang_server import SGLangServer
from tandem.engine.types import Completion, EngineDiedError, GenerationRequest, StopState, WeightTransferError
from tests.rollout.models import CONTEXT_LENGTH, VOCAB_SIZE, disk_tensors, metas, reference_logprobs, send, serve, tiny_model
from tests.rollout.sglang_servers import SGLANG, Servers, marked, need_sglang, server_processes, setup_of, shared_files

PROMPT = tuple(range(3, 43))
CONFIG = RolloutConfig(max_batch=8, repetition=RepetitionConfig(max_period=0, ngram=0), sglang=SGLANG)


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    return [tiny_model(seed=seed) for seed in range(3)]


@pytest.fixture
def engine(sglang_servers: Servers, models: list[PreTrainedModel]) -> SGLangEngine:
    """Serves models[0] as version 0."""
    need_sglang()
    engine = sglang_servers.engine(models[0], CONFIG)
    serve(engine, models[0], policy_version=0)
    return engine


def ask(name: str = "a", max_new_tokens: int = 8, **fields: Any) -> GenerationRequest:
    fields = {"token_ids": PROMPT, "num_prefix_tokens": 0, "seed": 1, "temperature": 0.0} | fields
    return GenerationRequest(request_id=name, max_new_tokens=max_new_tokens, **fields)


def serves(engine: SGLangEngine, model: PreTrainedModel, policy_version: int) -> bool:
    (completion,) = engine.generate([ask()])
    difference = reference_logprobs(model, PROMPT, completion.token_ids) - torch.tensor(completion.logprobs)
    return difference.abs().max().item() <= 1e-5 and completion.policy_version == engine.policy_version == policy_version


def call(server: SGLangServer, path: str, **fields: Any) -> Any:
    """What the server answers to somebody who is not the engine."""
    client = SGLangClient(server.url)
    try:
        return client.submit(client.call(path, **fields)).result(60)
    finally:
        client.close()


# ---- before a server is healthy


@marked
def test_a_port_in_use_is_named(models: list[PreTrainedModel]) -> None:
    need_sglang()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is in use .*rollout\.sglang\.port.*choose another"):
            SGLangServer(setup_of(models[0], config=SGLangConfig(port=port)))


@marked
def test_a_server_that_never_becomes_healthy_is_killed_and_says_what_it_said(models: list[PreTrainedModel]) -> None:
    need_sglang()
    before = server_processes()
    server = SGLangServer(setup_of(models[0], config=SGLangConfig(start_timeout_s=1.0)))
    with SGLangEngine(server, CONFIG, stop_token_ids=()) as engine:
        with pytest.raises(EngineDiedError, match=r"not healthy within rollout\.sglang\.start_timeout_s=1 s and was killed; call"):
            serve(engine, models[0])
        assert not engine.is_alive
    assert server_processes() <= before


@marked
@pytest.mark.slow
def test_a_server_whose_memory_is_not_enough_says_so(models: list[PreTrainedModel]) -> None:
    need_sglang()
    setup = setup_of(models[0])
    setup = dataclasses.replace(setup, hf_config={**setup.hf_config, "intermediate_size": 1 << 32})  # 2.4 TB of weights
    said = r"ran out of memory: lower .*rollout\.sglang\.kv_tokens.* \(it said: .*memory"
    with SGLangEngine(SGLangServer(setup), CONFIG, stop_token_ids=()) as engine, pytest.raises(EngineDiedError, match=said):
        engine.wait_until_ready()


@marked
@pytest.mark.slow
def test_a_port_that_is_taken_while_the_server_starts_is_named(models: list[PreTrainedModel]) -> None:
    need_sglang()
    with SGLangEngine(SGLangServer(setup_of(models[0])), CONFIG, stop_token_ids=()) as engine, socket.socket() as listener:
        listener.bind(("127.0.0.1", engine.server.port))
        listener.listen()
        with pytest.raises(EngineDiedError, match=r"its port was taken while it started: choose another rollout\.sglang\.port"):
            engine.wait_until_ready()


def test_a_server_that_is_closed_at_once_leaves_nothing(
    models: list[PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guard has hardly begun: nobody else removes what the leader wrote. The interpreter says that it has SGLang, and never serves."""
    before, folders = server_processes(), tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo 0.5.21; else exec sleep 1000; fi\n')
    python.chmod(0o755)
    server = SGLangServer(setup_of(models[0], config=SGLangConfig(python=str(python))))
    (folder,) = folders.iterdir()
    assert (folder / "model" / "config.json").exists()
    server.close()
    assert not list(folders.iterdir())
    assert server_processes() <= before


# ---- a server that serves


@marked
def test_a_resumed_response_finds_its_prefix_in_the_cache_until_the_weights_change(
    engine: SGLangEngine, models: list[PreTrainedModel]
) -> None:
    def cached_tokens() -> int:
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        return call(engine.server, "/generate", input_ids=PROMPT, sampling_params=sampling)["meta_info"]["cached_tokens"]

    list(engine.generate([ask()]))
    assert cached_tokens() >= len(PROMPT) - 1
    serve(engine, models[1], policy_version=1)
    assert cached_tokens() == 0


@marked
@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (4, 0.6)])
def test_only_the_tokens_that_top_k_and_top_p_keep_are_drawn(sglang_servers: Servers, top_k: int, top_p: float) -> None:
    """By transformers' probabilities. SGLang, as the embedded engine, keeps a token if those before it come to less than top_p."""
    need_sglang()
    model = tiny_model(peaked=False)
    engine = sglang_servers.engine(model, dataclasses.replace(CONFIG, temperature=1.5, top_k=top_k, top_p=top_p))
    serve(engine, model, policy_version=0)
    requests = [ask(str(i), 40, token_ids=(1 + i, 2), seed=i, temperature=None) for i in range(6)]
    ranks = list[int]()
    for completion in engine.generate(requests):
        request = requests[int(completion.request_id)]
        with torch.no_grad():
            logits = model(torch.tensor([[*request.token_ids, *completion.token_ids]])).logits[0, len(request.token_ids) - 1 : -1]
        kept, order = (logits / 1.5).softmax(-1).sort(descending=True)
        for probabilities, tokens, token in zip(kept, order, completion.token_ids, strict=True):
            ranks.append(tokens.tolist().index(token))
            assert not top_k or ranks[-1] < top_k
            assert probabilities[: ranks[-1]].sum().item() < top_p + 1e-5
    assert len(ranks) == 240
    assert len(set(ranks)) > 1, "more than the likeliest is drawn"


@marked
def test_a_response_may_fill_the_context_to_its_last_token_also_when_resumed_there(engine: SGLangEngine) -> None:
    num_new = CONTEXT_LENGTH - len(PROMPT)
    (whole,) = engine.generate([ask("whole", num_new)])
    assert (len(whole.token_ids), whole.stop) == (num_new, StopState.LENGTH)
    (last,) = engine.generate([ask("last", 1, token_ids=(*PROMPT, *whole.token_ids[:-1]), num_prefix_tokens=num_new - 1)])
    assert (last.token_ids, last.stop) == (whole.token_ids[-1:], StopState.LENGTH)


@marked
def test_weights_that_somebody_else_relabels_are_noticed(engine: SGLangEngine, models: list[PreTrainedModel]) -> None:
    call(engine.server, "/update_weight_version", new_version="7", abort_all_requests=False)
    with pytest.raises(RuntimeError, match=r"with weights '7'; the engine serves 0\. Somebody else changed them"):
        list(engine.generate([ask()]))
    serve(engine, models[0], policy_version=1)
    assert serves(engine, models[0], 1)


@marked
def test_recorded_completions_are_not_generated_again_and_count(engine: SGLangEngine) -> None:
    recorded = Completion(request_id="known", token_ids=(7,) * 5, logprobs=(-1.0,) * 5, stop=StopState.FINISHED, policy_version=0)
    requests = [ask("known", 30, recorded=recorded), ask("fresh", 30)]
    first, second = engine.generate(requests, token_budget=12)
    assert first == recorded
    assert (len(second.token_ids), second.stop) == (7, StopState.BUDGET)
    (cut,) = engine.generate(requests[:1], token_budget=3)
    assert (cut.token_ids, cut.stop) == ((7,) * 3, StopState.BUDGET)


@marked
def test_a_commit_whose_last_step_fails_leaves_the_old_weights(engine: SGLangEngine, models: list[PreTrainedModel]) -> None:
    weights = engine._weights
    checksums, digest = call(engine.server, "/weights_checker", action="checksum"), engine.weights_digest
    label, failures = weights._label, [RuntimeError("injected")]

    async def failing_label(policy_version: int) -> None:
        if failures:
            raise failures.pop()
        await label(policy_version)

    weights._label = failing_label
    send(engine, disk_tensors(models[1]), 1)
    with pytest.raises(RuntimeError, match="injected"):
        engine.commit()
    assert serves(engine, models[0], 0)
    assert engine.weights_digest == digest
    assert call(engine.server, "/weights_checker", action="checksum") == checksums
    serve(engine, models[1], policy_version=1)
    assert serves(engine, models[1], 1)
    assert call(engine.server, "/weights_checker", action="checksum") != checksums


@marked
def test_recorded_experts_are_those_that_transformers_chooses(sglang_servers: Servers) -> None:
    need_sglang()
    model = tiny_model("qwen3_moe", mlp_only_layers=[])
    stops = RepetitionConfig(max_period=1, min_repeats=2, min_tokens=0, ngram=0)  # some are cut in the middle of what SGLang sent
    engine = sglang_servers.engine(model, dataclasses.replace(CONFIG, record_routing=True, repetition=stops))
    serve(engine, model, policy_version=0)
    requests = [ask(str(i), 12, token_ids=tuple(range(1, 4 + 5 * i)), seed=i, temperature=None) for i in range(6)]
    completions = list(engine.generate(requests, token_budget=50))
    assert {completion.stop for completion in completions} >= {StopState.BUDGET}
    chosen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _module, _inputs, outputs: chosen.append(outputs[-1]))
    num_compared = 0
    for completion in completions:
        request = requests[int(completion.request_id)]
        if not completion.token_ids:
            assert completion.routed_experts is None
            continue
        chosen.clear()
        with torch.no_grad():
            model(torch.tensor([[*request.token_ids, *completion.token_ids]]))
        expected = torch.stack(chosen, dim=1)[len(request.token_ids) - 1 : -1].sort(-1).values.numpy()
        assert completion.routed_experts is not None
        assert completion.routed_experts.dtype == np.int16
        assert np.array_equal(np.sort(completion.routed_experts, axis=-1), expected)
        num_compared += len(completion.token_ids)
    assert num_compared == 50


@marked
def test_a_model_that_sglang_builds_otherwise_is_refused(sglang_servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's Qwen3-MoE knows no `mlp_only_layers`: the layer without experts would keep experts that no weights fill."""
    need_sglang()
    model, other = tiny_model("qwen3_moe", mlp_only_layers=[]), tiny_model("qwen3_moe", mlp_only_layers=[1])
    server = sglang_servers.engine(model, CONFIG).server
    with monkeypatch.context() as patch:
        patch.setattr(server, "setup", dataclasses.replace(server.setup, hf_config=setup_of(other).hf_config))
        engine = sglang_servers.engine(other, CONFIG)
        with pytest.raises(WeightTransferError, match=r"no tensor fills SGLang's parameter model\.layers\.1\.mlp\.experts"):
            serve(engine, other)
        assert engine.policy_version == -1
    engine = sglang_servers.engine(model, CONFIG)
    serve(engine, model, policy_version=2)
    assert serves(engine, model, 2)


@marked
@pytest.mark.slow
def test_two_processes_share_a_model_and_flip_together(models: list[PreTrainedModel], tmp_path: Path) -> None:
    need_sglang()
    config, files = dataclasses.replace(CONFIG, tp=2), shared_files()
    with SGLangEngine(SGLangServer(setup_of(models[0], tp=2, log_path=tmp_path / "log")), config, stop_token_ids=()) as engine:
        assert isinstance(engine, ShardedWeightSink)
        for version in range(3):
            serve(engine, models[version], policy_version=version)
            assert serves(engine, models[version], version)
        send(engine, disk_tensors(models[0]), 3)
        engine.rollback()
        assert serves(engine, models[2], 2)
        assert shared_files() - files
    assert not shared_files() - files


@marked
def test_a_server_killed_at_any_step_of_a_swap_or_while_it_generates_is_noticed_and_replaced(
    engine: SGLangEngine, models: list[PreTrainedModel]
) -> None:
    before = server_processes()
    generation = engine.generate([ask("short", 1), *(ask(str(i), 50, token_ids=(i % VOCAB_SIZE,)) for i in range(200))])
    next(generation)
    kill_server(engine)
    with pytest.raises(EngineDiedError, match=r"SGLang \S+ server \(process \d+, port \d+\) died \(exit status 137\); call restart"):
        list(generation)
    assert engine.policy_version == -1
    with pytest.raises(RuntimeError, match="has no weights"):
        engine.generate([ask()])
    for step in (
        lambda: engine.prepare(1, metas(disk_tensors(models[1]))),
        lambda: engine.load("/dev/null", ()),
        engine.commit,
        engine.rollback,
    ):
        with pytest.raises(EngineDiedError, match="call restart"):
            step()
    engine.restart()
    assert (engine.policy_version, engine.weights_digest) == (-1, None)
    serve(engine, models[1], policy_version=1)
    assert serves(engine, models[1], 1)
    assert len(server_processes()) <= len(before)


def kill_server(engine: SGLangEngine) -> None:
    """kill -9 of SGLang's first process; the guard sees to the others."""
    (child,) = Path(f"/proc/{engine.server.pid}/task/{engine.server.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)


@marked
def test_an_idle_server_that_hangs_is_killed_and_says_where(sglang_servers: Servers, models: list[PreTrainedModel]) -> None:
    need_sglang()
    engine = sglang_servers.engine(models[0], CONFIG)
    serve(engine, models[0], policy_version=0)
    (server,) = Path(f"/proc/{engine.server.pid}/task/{engine.server.pid}/children").read_text().split()
    pids = processes(int(server))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    # From here on it is asked so often: a deadline this short would also kill a healthy server on a busy machine.
    hasty = dataclasses.replace(CONFIG, sglang=dataclasses.replace(SGLANG, health_interval_s=0.1, health_timeout_s=1.0))
    engine = sglang_servers.engine(models[0], hasty)
    engine.wait_until_ready()
    deadline = time.monotonic() + 120
    while engine.is_alive and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(EngineDiedError, match=r"answered no health check for rollout\.sglang\.health_timeout_s=1 s and was killed") as died:
        engine.wait_until_ready()
    assert str(died.value).count("stopped by a signal") == len(pids)
    assert "'sglang::scheduler'" in str(died.value)
    assert not set(pids) & server_processes()
    sglang_servers.close()


@marked
def test_a_server_that_stalls_is_killed(sglang_servers: Servers, models: list[PreTrainedModel]) -> None:
    need_sglang()
    config = dataclasses.replace(CONFIG, sglang=dataclasses.replace(SGLANG, stall_timeout_s=1.0))
    engine = sglang_servers.engine(models[0], config)
    serve(engine, models[0], policy_version=0)
    generation = engine.generate([ask("short", 1), *(ask(str(i), 50, token_ids=(i % VOCAB_SIZE,)) for i in range(200))])
    next(generation)
    for pid in Path(f"/proc/{engine.server.pid}/task/{engine.server.pid}/children").read_text().split():
        os.kill(int(pid), signal.SIGSTOP)
    with pytest.raises(EngineDiedError, match=r"generated nothing for rollout\.sglang\.stall_timeout_s=1 s and was killed"):
        list(generation)
    sglang_servers.close()


@marked
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_whose_guard_is_killed_is_replaced_and_leaves_nothing(models: list[PreTrainedModel], tmp_path: Path) -> None:
    need_sglang()
    with SGLangEngine(SGLangServer(setup_of(models[0], log_path=tmp_path / "log")), CONFIG, stop_token_ids=()) as engine:
        serve(engine, models[0], policy_version=0)
        guard = engine.server.pid
        (server,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
        pids, files = {guard, *processes(int(server))}, mapped_files(int(server))
        folder = Path(f"/proc/{guard}/cmdline").read_text().split("\0")[4]
        assert files
        os.kill(guard, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while pids & server_processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not pids & server_processes()
        with pytest.raises(EngineDiedError, match="call restart"):
            list(engine.generate([ask()]))
        engine.restart()
        assert not list(filter(os.path.exists, (*files, folder)))
        serve(engine, models[1], policy_version=1)
        assert serves(engine, models[1], 1)


@marked
def test_nothing_is_left_of_a_server_whose_leader_is_killed(models: list[PreTrainedModel], tmp_path: Path) -> None:
    """The leader is a rank of torchrun, whose variables must not reach the server: it would wait for torchrun's store for ever."""
    need_sglang()
    of_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    of_torchrun |= {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    program = """
import os, pickle, sys
from tandem.engine.rollout.sglang_server import SGLangServer
server = SGLangServer(pickle.load(open(sys.argv[1], "rb")))
server.wait_until_healthy()
print(server.pid, flush=True)
input()
os.kill(os.getpid(), 9)
"""
    (tmp_path / "setup").write_bytes(pickle.dumps(setup_of(models[0], log_path=tmp_path / "log")))
    command, environment = [sys.executable, "-c", program, str(tmp_path / "setup")], os.environ | of_torchrun
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    guard = int(process.stdout.readline())
    (server,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    pids, files = {guard, *processes(int(server))}, mapped_files(int(server))
    folder = Path(f"/proc/{guard}/cmdline").read_text().split("\0")[4]
    assert len(pids) >= 3
    assert files
    assert Path(folder, "model", "config.json").exists()
    process.communicate("\n")
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 120

    def left() -> set[object]:
        return {*(pids & server_processes()), *filter(os.path.exists, (*files, folder))}

    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left()
