"""Several real SGLang servers as one engine: one is killed, and every request is answered once, with the tokens that it would have had."""

import collections
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tandem.engine.config import ElasticConfig, RepetitionConfig, RolloutConfig
from tandem.engine.rollout.fleet import FleetEngine
from tandem.engine.rollout.nodes import Announcement
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_server import SGLangServer
from tandem.engine.types import Completion, GenerationRequest, StopState, WeightTransferError
from tests.rollout.models import CONTEXT_LENGTH, VOCAB_SIZE, disk_tensors, send, serve, tiny_model
from tests.rollout.sglang_servers import SGLANG, Servers, marked, need_sglang, setup_of

CONFIG = RolloutConfig(
    engine="sglang",
    max_batch=8,
    repetition=RepetitionConfig(max_period=0, ngram=0),
    sglang=SGLANG,
    elastic=ElasticConfig(enabled=True, timeout_s=60.0),
)


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    return [tiny_model(seed=seed) for seed in range(2)]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def fleet(sglang_servers: Servers, models: list[PreTrainedModel], said: list[str]) -> Iterator[FleetEngine]:
    """Serves models[0] as version 0, on one server."""
    need_sglang()
    fleet = fleet_of(sglang_servers.engine(models[0], CONFIG), models[0], said)
    fleet.wait_until_ready()
    serve(fleet, models[0], policy_version=0)
    yield fleet
    fleet.disconnect()


def fleet_of(local: SGLangEngine, model: PreTrainedModel, said: list[str]) -> FleetEngine:
    hf_config = model.config.to_dict()
    return FleetEngine(local, hf_config, CONFIG, context_length=CONTEXT_LENGTH, stop_token_ids=(), say=said.append)


def some_requests(num: int) -> list[GenerationRequest]:
    """A short one first; then more than a server takes at a time. All sampled: SGLang draws otherwise where some of a batch are greedy."""
    requests = [GenerationRequest(request_id="short", token_ids=(1,), num_prefix_tokens=0, max_new_tokens=1, seed=0)]
    for i in range(num):
        prompt = tuple((i * j) % VOCAB_SIZE for j in range(1, 2 + i % 20))
        fields: dict[str, Any] = {"token_ids": prompt, "num_prefix_tokens": 0, "max_new_tokens": 20 + i % 40}
        requests.append(GenerationRequest(request_id=str(i), seed=i, **fields))
    return requests


def kill_server(server: SGLangServer) -> None:
    """kill -9 of SGLang's first process; the guard sees to the others."""
    (child,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)


def assert_same(completions: list[Completion], undisturbed: list[Completion]) -> None:
    """Each request once, and the same tokens but for near ties: what is computed with another batch, or anew, differs by rounding."""
    assert collections.Counter(c.request_id for c in completions) == collections.Counter(c.request_id for c in undisturbed)
    expected = {completion.request_id: completion for completion in undisturbed}
    differing = [c.request_id for c in completions if c.token_ids != expected[c.request_id].token_ids]
    assert len(differing) <= 1
    for completion in completions:
        assert completion.stop is StopState.LENGTH
        if completion.request_id not in differing:
            assert completion.logprobs == pytest.approx(expected[completion.request_id].logprobs, abs=1e-5)


@marked
@pytest.mark.timeout(1200)  # two servers, one after the other
def test_a_server_that_is_killed_comes_back_with_its_weights_and_no_token_is_lost(fleet: FleetEngine, said: list[str]) -> None:
    requests = some_requests(40)
    undisturbed = list(fleet.generate(requests))
    digest = fleet.weights_digest
    generation = fleet.generate(requests)
    completions = [next(generation)]
    kill_server(fleet._local.server)
    completions += generation
    assert_same(completions, undisturbed)
    assert (fleet.policy_version, fleet.weights_digest, fleet.is_alive) == (0, digest, True)
    assert "died while it generated" in said[0]
    assert fleet._reviver is not None
    fleet._reviver.join(60)
    assert sum("is back with the weights of version 0" in line for line in said) == 1


@marked
def test_a_transaction_that_fails_leaves_the_old_weights_and_the_next_one_brings_all(
    fleet: FleetEngine, models: list[PreTrainedModel], said: list[str]
) -> None:
    def corrupt(number: int, data: bytearray) -> None:
        if number == 1:
            data[300] ^= 1

    before = list(fleet.generate(some_requests(3)))
    with pytest.raises(WeightTransferError, match="checksum"):
        send(fleet, disk_tensors(models[1]), 1, corrupt=corrupt)
    fleet.rollback()
    assert fleet.policy_version == 0
    assert_same(list(fleet.generate(some_requests(3))), before)
    serve(fleet, models[1], policy_version=1)
    assert fleet.policy_version == 1
    assert {completion.policy_version for completion in fleet.generate(some_requests(3))} == {1}
    assert not said


@marked
def test_a_node_that_nobody_reaches_is_dropped_and_costs_the_others_nothing(
    fleet: FleetEngine, models: list[PreTrainedModel], said: list[str]
) -> None:
    fields: dict[str, Any] = {"port": 9, "control_port": 9, "secret": "x", "sglang": fleet.sglang, "model": "x", "max_batch": 8}
    nobody = Announcement(protocol=1, name="nobody", start="nobody-1", host="127.0.0.1", **fields)
    for version in range(1, 4):
        fleet.meet([], [nobody])
        serve(fleet, models[version % 2], policy_version=version)
        assert len(list(fleet.generate(some_requests(3)))) == 4
    assert len(said) == 2  # then it is left alone
    assert "rollout node nobody (http://127.0.0.1:9) cannot be reached" in said[0]
    assert "its --host must be an address that the trainer's machines reach; it is dropped, it may join again" in said[0]
    assert "it is left alone until it is started again" in said[1]


@marked
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_a_killed_server_was_generating_goes_to_another_leader_s_while_it_restarts(
    fleet: FleetEngine, models: list[PreTrainedModel], said: list[str], tmp_path: Path
) -> None:
    requests = some_requests(60)
    undisturbed = list(fleet.generate(requests))
    server = SGLangServer(setup_of(models[0], log_path=tmp_path / "log"))
    with SGLangEngine(server, CONFIG, stop_token_ids=(), timeout_s=120.0) as other:
        serve(other, models[0], policy_version=0)
        other.admit()
        fleet.meet([("rank 1's SGLang server", other.server.url)], [])
        generation = fleet.generate(requests)
        completions = [next(generation)]
        kill_server(fleet._local.server)
        completions += generation
        assert_same(completions, undisturbed)
        assert any("rank 1's SGLang server: " in line for line in said if line.startswith("tokens from"))
        # Version 1 is there before the server is back, or after: it has it in the end, and generates again.
        serve(other, models[1], policy_version=1)
        serve(fleet, models[1], policy_version=1)
        first = list(fleet.generate(requests))
        assert {completion.policy_version for completion in first} == {1}
        assert fleet._reviver is not None
        fleet._reviver.join()
        assert fleet.url is not None
        other.restart()
        assert_same(list(fleet.generate(requests)), first)
