"""A leader and its nodes: the nodes' real commands over HTTP and the real broadcast, into engines that are memory of this process."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from tandem.engine.rollout.joined_nodes import JoinedNodes
from tandem.engine.rollout.nodes import Announcement
from tandem.engine.rollout.sglang_client import SGLangClient
from tandem.engine.rollout.weight_copy import WeightCopy
from tandem.engine.rollout_node import Node
from tandem.engine.types import BucketEntry
from tests.rollout.test_broadcast import Memory, bytes_of, fill, some_tensors

PATIENCE_S = 100.0


class Engine(Memory):
    """A node's. `load` waits for `may_load`."""

    def __init__(self, fails_in: str = "") -> None:
        super().__init__(fails_in)
        self.may_load = threading.Event()
        self.may_load.set()

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        assert self.may_load.wait(PATIENCE_S)
        super().load(shared_memory_path, entries)

    def admit(self) -> None:
        pass


class Started:
    """A node's commands, served until `stop`."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.engine, self.node = engine, Node(engine)  # pyright: ignore[reportArgumentType]
        self.node.state = "serving"
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(self.node.app(), log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        port, fields = listener.getsockname()[1], {"protocol": 1, "sglang": "0.5.21", "model": "m", "max_batch": 8}
        self.announcement = Announcement(
            **fields, name=name, start=f"{name}-1", host="127.0.0.1", port=port, control_port=port, secret=self.node.secret
        )
        wait_for(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)


class Leader:
    """Meets `Watcher`."""

    def __init__(self, client: SGLangClient, timeout_s: float = PATIENCE_S) -> None:
        self.said, self.gone, self.may_leave = list[str](), list[str](), False
        self.nodes = JoinedNodes(client, timeout_s=timeout_s, say=self.said.append, watcher=self)

    def node_is_gone(self, name: str, error: Exception) -> None:
        self.gone.append(name)
        self.nodes.drop(name, "is gone")

    def node_leaves(self, name: str) -> bool:
        return self.may_leave

    def give(self, copy: WeightCopy, *nodes: Announcement) -> list[str]:
        """The names of those that serve afterwards."""
        self.nodes.assign(nodes)
        self.nodes.fill(copy)
        self.nodes.wait()
        return sorted(node.name for node in self.nodes.serving)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    with contextlib.ExitStack() as stack:

        def start_node(name: str, fails_in: str = "") -> Started:
            started = Started(name, Engine(fails_in))
            stack.callback(started.stop)
            stack.callback(started.engine.may_load.set)
            return started

        yield start_node


@pytest.fixture
def client() -> Iterator[SGLangClient]:
    client = SGLangClient("")
    yield client
    client.close()


@pytest.fixture
def leader(client: SGLangClient) -> Iterator[Leader]:
    leader = Leader(client)
    yield leader
    leader.nodes.assign([])


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[WeightCopy]:
    copy = WeightCopy()
    fill(copy, some_tensors(), 3, tmp_path)
    yield copy
    copy.close()


def has_weights(started: Started) -> bool:
    return (started.engine.serving, started.engine.policy_version) == (bytes_of(some_tensors()), 3)


def test_a_node_that_joined_is_told_that_it_may_go_once_it_has_no_requests_left(
    start: Callable[..., Started], leader: Leader, copy: WeightCopy
) -> None:
    first, second = start("first"), start("second")
    assert leader.give(copy, first.announcement, second.announcement) == ["first", "second"]
    assert has_weights(first)
    assert has_weights(second)
    second.node.state = "leaving"
    leader.may_leave = True
    assert second.node.is_released.wait(PATIENCE_S)
    wait_for(lambda: [node.name for node in leader.nodes.serving] == ["first"])
    assert not first.node.is_released.is_set()
    assert sorted(line.rpartition(" (")[0] + line.rpartition(")")[2] for line in leader.said) == [
        "rollout node first has joined",
        "rollout node second has joined",
        "rollout node second has left",
    ]


def test_a_node_of_another_secret_is_dropped_and_gets_no_weights(start: Callable[..., Started], leader: Leader, copy: WeightCopy) -> None:
    good, other = start("good"), start("other")
    assert leader.give(copy, good.announcement, dataclasses.replace(other.announcement, secret="guessed")) == ["good"]
    assert has_weights(good)
    assert other.engine.serving == {}
    (said,) = (line for line in leader.said if "other" in line)
    assert "answered /status with 403" in said
    assert "the secret is wrong; it is in the node's announcement" in said


@pytest.mark.parametrize("secret", [None, "", "gué", 7, "x" * 10_000])
def test_no_command_is_carried_out_without_the_secret(start: Callable[..., Started], secret: object) -> None:
    node = start("node")
    heard_s = node.node.heard_s
    for path in ("/status", "/release", "/take_weights"):
        answer = httpx.post(node.announcement.control_url + path, json={"secret": secret}, timeout=PATIENCE_S, trust_env=False)
        assert answer.status_code == 403
    assert not node.node.is_released.is_set()
    assert (node.node.heard_s, node.engine.num_rollbacks) == (heard_s, 0)


@pytest.mark.parametrize("step", ["prepare", "load", "commit", "settle"])
def test_a_node_whose_engine_fails_is_named_and_those_with_it_have_the_weights(
    step: str, start: Callable[..., Started], leader: Leader, copy: WeightCopy
) -> None:
    nodes = [start("a"), start("bad", step), start("c")]
    assert leader.give(copy, *(node.announcement for node in nodes)) == ["a", "c"]
    assert has_weights(nodes[0])
    assert has_weights(nodes[2])
    (said,) = (line for line in leader.said if "bad" in line)
    assert f"did not take the weights: no memory to {step}; it is dropped, it may join again with the next iteration" in said
    assert nodes[1].engine.num_rollbacks == 1


def test_a_node_that_failed_twice_is_left_alone_until_it_is_started_again(
    start: Callable[..., Started], leader: Leader, copy: WeightCopy
) -> None:
    node = start("node", "load")
    for _ in range(3):
        assert leader.give(copy, node.announcement) == []
    assert node.engine.num_rollbacks == 2
    assert "it is left alone until it is started again" in leader.said[-1]
    node.engine.fails_in = ""
    assert leader.give(copy, dataclasses.replace(node.announcement, start="node-2")) == ["node"]
    assert has_weights(node)


def test_a_node_that_is_too_slow_is_dropped_at_the_deadline(start: Callable[..., Started], client: SGLangClient, copy: WeightCopy) -> None:
    leader, node = Leader(client, timeout_s=0.5), start("node")
    node.engine.may_load.clear()
    assert leader.give(copy, node.announcement) == []
    (said,) = leader.said
    assert "rollout node node (" in said
    assert "it is dropped" in said


def test_a_node_that_ends_is_noticed_while_nobody_asks_it_for_anything(
    start: Callable[..., Started], leader: Leader, copy: WeightCopy
) -> None:
    node = start("node")
    assert leader.give(copy, node.announcement) == ["node"]
    node.stop()
    wait_for(lambda: leader.gone)
    assert leader.nodes.serving == []
