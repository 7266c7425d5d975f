"""The rollout-only nodes of one leader: given the weights of every version, watched while they generate, and dropped when they fail.

A node that is dropped, or leaves, hurts nobody else: it has no part in the transaction of the trainer's ranks, which is over when a node
gets its weights (broadcast.py).
"""

import asyncio
import concurrent.futures
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tandem.engine.rollout.broadcast import BroadcastError, Sender, address_towards
from tandem.engine.rollout.nodes import Announcement
from tandem.engine.rollout.sglang_client import ServerGoneError, SGLangClient
from tandem.engine.rollout.weight_copy import WeightCopy

_POLL_S = 0.5  # between two looks at how a node is
_ANSWER_S = 10.0  # for questions that need no work
_MAX_FAILURES = 2  # of one start of a node; then it is left alone until it is started again


class Watcher(Protocol):
    """Told of nodes that serve, in the client's thread."""

    def node_is_gone(self, name: str, error: Exception) -> None: ...

    def node_leaves(self, name: str) -> bool:
        """It takes no further requests. Returns whether it has none left."""
        ...


class JoinedNodes:
    """`assign`, `fill` and `wait` are the leader's thread's; nodes come and go in others."""

    def __init__(self, client: SGLangClient, *, timeout_s: float, say: Callable[[str], None], watcher: Watcher) -> None:
        self._client, self._timeout_s, self._say, self._watcher = client, timeout_s, say, watcher
        self._lock = threading.Lock()
        self._assigned: dict[str, Announcement] = {}
        self._serving: dict[str, Announcement] = {}
        self._failures = Counter[str]()  # by start
        self._watched = set[str]()  # starts
        self._thread: threading.Thread | None = None

    @property
    def serving(self) -> list[Announcement]:
        """Those that have the newest weights."""
        with self._lock:
            return list(self._serving.values())

    @property
    def is_filling(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def assign(self, nodes: Sequence[Announcement]) -> None:
        """The nodes that get the weights from now on."""
        with self._lock:
            self._assigned = {node.name: node for node in nodes if self._failures[node.start] < _MAX_FAILURES}
            self._serving = {name: node for name, node in self._serving.items() if self._assigned.get(name) == node}

    def fill(self, copy: WeightCopy) -> None:
        """Begin to give them the version that the copy has. It must stay until `wait` returns."""
        with self._lock:
            nodes, self._serving = list(self._assigned.values()), {}
        if nodes:
            self._thread = threading.Thread(target=self._fill, args=(nodes, copy), daemon=True, name="fill-nodes")
            self._thread.start()

    def wait(self) -> None:
        """Until every node has the weights, or is dropped."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def drop(self, name: str, reason: str) -> None:
        """It serves no more, in this iteration."""
        with self._lock:
            node = self._assigned.pop(name, None)
            self._serving.pop(name, None)
            if node is None:
                return
            self._failures[node.start] += 1
            again = self._failures[node.start] < _MAX_FAILURES
        then = "it may join again with the next iteration" if again else "it is left alone until it is started again"
        self._say(f"rollout node {name} ({node.control_url}) {reason}; it is dropped, {then}")

    def _fill(self, nodes: list[Announcement], copy: WeightCopy) -> None:
        left = self._answering(nodes)
        while left:
            left = self._broadcast(left, copy)

    def _ask(self, node: Announcement, path: str, **fields: Any) -> "concurrent.futures.Future[Any]":
        client = self._client.at(node.control_url, f"node {node.name}")
        return self._client.submit(client.call(path, secret=node.secret, **fields))

    def _answering(self, nodes: list[Announcement]) -> list[Announcement]:
        """Without those that nobody reaches: no group waits for them."""
        answers = [(node, self._ask(node, "/status")) for node in nodes]
        found = list[Announcement]()
        for node, answer in answers:
            try:
                status = answer.result(_ANSWER_S)
            except (ServerGoneError, RuntimeError, concurrent.futures.TimeoutError) as error:
                answer.cancel()
                where = "its --host must be an address that the trainer's machines reach"
                self.drop(node.name, f"cannot be reached ({type(error).__name__}: {error}); {where}")
                continue
            if status["state"] == "serving":
                found.append(node)
            else:
                self.drop(node.name, f"is {status['state']}")
        return found

    def _broadcast(self, nodes: list[Announcement], copy: WeightCopy) -> list[Announcement]:
        """To all of them at once. Returns those that are not to blame for its failure, once others are dropped."""
        reached = next((node.host for node in nodes if not node.host.startswith("127.")), nodes[0].host)
        try:
            sender = Sender(address_towards(reached), len(nodes), self._timeout_s)
        except (OSError, RuntimeError) as error:  # torch.distributed's are the latter
            for node in nodes:
                self.drop(node.name, f"is at {node.host}, where no way leads ({error})")
            return []
        fields = {"policy_version": copy.policy_version, "host": sender.meeting.host, "port": sender.meeting.port}
        fields |= {"num_ranks": sender.meeting.num_ranks, "timeout_s": self._timeout_s}
        fields["tensors"] = [[meta.name, list(meta.shape), str(meta.dtype).removeprefix("torch.")] for meta in copy.tensors]
        answers = [(node, self._ask(node, "/take_weights", rank=rank, **fields)) for rank, node in enumerate(nodes, start=1)]
        failure = ""
        try:
            sender.send(copy, lambda: any(answer.done() for _, answer in answers))
        except BroadcastError as error:
            failure = str(error)
        del sender  # with its group: nodes that still wait for a broadcast are told so
        again = list[Announcement]()
        for node, answer in answers:
            try:
                problem = answer.result(self._timeout_s)
            except (ServerGoneError, RuntimeError, concurrent.futures.TimeoutError) as error:
                answer.cancel()
                problem = {"reason": f"did not take the weights ({type(error).__name__}: {error})", "is_broadcast": False}
            if not problem["reason"]:
                self._admit(node)
            elif problem["is_broadcast"]:
                again.append(node)
            else:
                self.drop(node.name, problem["reason"])
        if len(again) == len(nodes):  # nobody else is to blame
            for node in again:
                self.drop(node.name, f"could not be sent the weights: {failure}")
            return []
        return again

    def _admit(self, node: Announcement) -> None:
        with self._lock:
            if self._assigned.get(node.name) != node:
                return
            self._serving[node.name] = node
            self._failures.pop(node.start, None)
            is_new = node.start not in self._watched
            self._watched.add(node.start)
        if is_new:
            self._say(f"rollout node {node.name} ({node.url}) has joined")
            self._client.submit(self._watch(node))

    async def _watch(self, node: Announcement) -> None:
        """Until it is no longer this leader's."""
        client = self._client.at(node.control_url, f"node {node.name}")
        while self._assigned.get(node.name) == node:
            await asyncio.sleep(_POLL_S)
            try:
                async with asyncio.timeout(_ANSWER_S):
                    status = await client.call("/status", secret=node.secret)
                    if status["state"] == "leaving" and self._watcher.node_leaves(node.name):
                        with self._lock:
                            self._assigned.pop(node.name, None)
                            self._serving.pop(node.name, None)
                        self._say(f"rollout node {node.name} ({node.url}) has left")
                        await client.call("/release", secret=node.secret)
            except (ServerGoneError, RuntimeError, TimeoutError) as error:
                if self._assigned.get(node.name) == node:
                    self._watcher.node_is_gone(node.name, error)
        self._watched.discard(node.start)
