"""A leader's engines as one: its own SGLang server, rollout-only nodes, and for a while the servers of other leaders on its machine.

Meets `RolloutEngine` and `WeightSink`. Requests go to whoever has room. A server that dies costs its share of the speed only: what it was
generating goes on elsewhere, and the leader's own is started again, filled from the leader's copy of the weights while the others
generate, and takes requests again.
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence

from tandem.engine.architecture import Architecture
from tandem.engine.config import RolloutConfig
from tandem.engine.rollout.joined_nodes import JoinedNodes
from tandem.engine.rollout.nodes import Announcement
from tandem.engine.rollout.requests import check_requests
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_client import ServerGoneError, SGLangClient
from tandem.engine.rollout.sglang_generation import Generation
from tandem.engine.rollout.sglang_members import Member, ServerStalledError
from tandem.engine.rollout.weight_copy import WeightCopy
from tandem.engine.types import BucketEntry, Completion, EngineDiedError, GenerationRequest, TensorMeta

NODE = "rollout node "  # begins the names of members that are nodes
MAX_DEATHS = 3  # of the leader's own server in a row, without a version between
_ABORT_TIMEOUT_S = 60.0
_JOIN_S = 0.5


class FleetEngine:
    """Owns the local engine from then on.

    Which server has a request depends on the moment, so tokens are those of `SGLangEngine` up to near ties, wherever they are generated.
    """

    def __init__(
        self,
        local: SGLangEngine,
        hf_config: Mapping[str, object],
        config: RolloutConfig,
        *,
        context_length: int,
        stop_token_ids: tuple[int, ...],
        say: Callable[[str], None],
    ) -> None:
        """`say` gets a line for everything that joins, leaves or dies."""
        self._local, self._config, self._stop_token_ids, self._say = local, config, stop_token_ids, say
        self._architecture, self._context_length = Architecture.from_hf(hf_config), context_length
        self._copy = WeightCopy()
        self._client = SGLangClient("")
        self._nodes = JoinedNodes(self._client, timeout_s=config.elastic.timeout_s, say=say, watcher=self)
        self._peers: tuple[tuple[str, str], ...] = ()  # (name, URL) of the other leaders' servers on this machine
        self._policy_version = self._previous = -1
        self._turn = threading.Condition()  # the local server is either in a swap or being filled after its restart
        self._is_swapping = self._is_refilling = False
        self._local_swaps = False  # whether the local server is part of the open transaction
        self._local_serves = self._was_ready = self._is_closed = False
        self._num_deaths = 0
        self._reviver: threading.Thread | None = None
        self._is_reviving = False
        self._failure: EngineDiedError | None = None  # once the local server is given up
        self._generation: Generation | None = None

    # ---- who takes part

    @property
    def local(self) -> SGLangEngine:
        """The leader's own, whose memory the trainer shares."""
        return self._local

    @property
    def sglang(self) -> str:
        """The version of SGLang that all must have."""
        return self._local.server.version.text

    @property
    def url(self) -> str | None:
        """Where other leaders ask the local server; None while it has no weights."""
        return self._local.server.url if self._local_serves else None

    def meet(self, peers: Sequence[tuple[str, str]], nodes: Sequence[Announcement]) -> None:
        """Between two phases: the other leaders' servers on this machine, as (name, URL), and the nodes that are this leader's."""
        self._peers = tuple(peers)
        self._nodes.assign(nodes)

    def node_is_gone(self, name: str, error: Exception) -> None:
        """See `Watcher`."""
        member = self._member(NODE + name)
        if member is not None and self._generation is not None:
            self._generation.lose(member, error)
        else:
            self._nodes.drop(name, f"is gone ({type(error).__name__}: {error})")

    def node_leaves(self, name: str) -> bool:
        """See `Watcher`."""
        member = self._member(NODE + name)
        if member is None:
            return True
        member.is_open = False
        return not member.running

    def _member(self, name: str) -> Member | None:
        members = self._generation.members if self._generation is not None else []
        return next((member for member in members if member.name == name and not member.is_lost), None)

    # ---- generation

    @property
    def policy_version(self) -> int:
        """The version that is served; -1 before the first, and once the local server has released its weights."""
        has_released = self._local_serves and self._local.policy_version != self._policy_version
        return -1 if has_released else self._policy_version

    @property
    def weights_digest(self) -> str | None:
        """See `RolloutEngine.weights_digest`; None while the local server has no weights."""
        with contextlib.suppress(EngineDiedError):
            return self._local.weights_digest if self._local_serves else None
        return None

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Generator[Completion, None, None]:
        """See `RolloutEngine.generate`. Waits until every node has the weights, or is dropped.

        Raises: as `SGLangEngine.generate`; EngineDiedError when no server is left and the local one does not start again.
        """
        check_requests(
            requests,
            token_budget,
            context_length=self._context_length,
            vocab_size=self._architecture.vocab_size,
            policy_version=self.policy_version,
            sees_images=True,
        )
        if self._generation is not None:
            raise RuntimeError("generate while the fleet generates; finish or close the generation first")
        if self.policy_version < 0:
            raise RuntimeError("the fleet has no weights; commit a version first")
        return self._generate(tuple(requests), token_budget)

    def _generate(self, requests: tuple[GenerationRequest, ...], token_budget: int | None) -> Generator[Completion, None, None]:
        if not requests:
            return
        self._nodes.wait()
        with self._turn:
            members = [self._node_member(node) for node in self._nodes.serving]
            if self._local_serves:
                try:
                    self._local.admit()
                    members.insert(0, self._local_member())
                except EngineDiedError as error:
                    self._revive(error)
            if not self._local_serves:
                members += self._borrowed()
            self._generation = Generation(
                self._config,
                requests,
                members,
                stop_token_ids=self._stop_token_ids,
                architecture=self._architecture,
                token_budget=token_budget,
                policy_version=self._policy_version,
                keeper=self,
            )
        generation = self._generation
        try:
            yield from generation.completions(self._client)
        except Exception as error:
            raise self._reason(error) from error
        finally:
            self._generation = None
            if self._reviver is not None and self._local.server.setup.on_gpu:
                self._reviver.join()  # the trainer has the GPU next: nothing may be starting on it
        took_part = [member for member in generation.members if member.num_tokens]
        if len(took_part) > 1:
            self._say("tokens from " + ", ".join(f"{member.name}: {member.num_tokens}" for member in took_part))

    def _reason(self, error: Exception) -> Exception:
        if self._failure is not None:
            return self._failure
        if isinstance(error, ServerGoneError | ServerStalledError):
            return EngineDiedError(f"no rollout engine is left: {error}")
        return RuntimeError(f"the rollout engines failed to generate: {error}\n{self._local.server.log_tail()}")

    def _local_member(self) -> Member:
        server = self._local.server
        return Member(name=server.name, client=self._client.at(server.url), capacity=self._config.max_batch)

    def _node_member(self, node: Announcement) -> Member:
        return self._lent(NODE + node.name, node.url, node.max_batch)

    def _borrowed(self) -> list[Member]:
        return [self._lent(name, url, self._config.max_batch) for name, url in self._peers]

    def _lent(self, name: str, url: str, capacity: int) -> Member:
        return Member(name=name, client=self._client.at(url, name), capacity=capacity, is_own=False)

    def abort(self, request_ids: Collection[str] | None = None) -> None:
        """See `RolloutEngine.abort`."""
        generation = self._generation
        if generation is not None:
            with contextlib.suppress(RuntimeError, concurrent.futures.TimeoutError):
                self._client.submit(generation.abort(request_ids)).result(_ABORT_TIMEOUT_S)

    def lost(self, member: Member, error: Exception) -> None:
        """See `Keeper`."""
        node = member.name.removeprefix(NODE)
        if member.is_own:
            assert self._generation is not None
            is_lone = not any(other.is_open for other in self._generation.members)
            self._revive(EngineDiedError(f"{member.name} died while it generated {len(member.running)} responses: {error}"), error)
            for borrowed in self._borrowed():
                self._generation.add(borrowed)
            if is_lone and not self._peers:
                self._say("no other rollout engine is there; its responses wait until it is back")
        elif node != member.name:
            self._nodes.drop(node, f"failed while it generated {len(member.running)} responses ({error}), which go on elsewhere")
        else:
            self._say(f"{member.name} takes no responses of this leader any more: {error}")

    @property
    def expects_member(self) -> bool:
        """See `Keeper`."""
        return self._is_reviving

    # ---- the local server's life

    @property
    def is_alive(self) -> bool:
        """Whether generating is of use: the local server runs, or is about to again."""
        return not self._is_closed and self._failure is None

    def wait_until_ready(self) -> None:
        """See `RolloutEngine.wait_until_ready`. A server that died after that is replaced while others go on, without waiting."""
        if self._is_reviving:
            return
        if self._failure is not None:
            raise self._failure
        try:
            self._local.wait_until_ready()
        except EngineDiedError as error:
            if not self._was_ready:
                raise
            self._revive(error)
        self._was_ready = True

    def restart(self) -> None:
        """Replace the local server by one without weights (policy_version -1), as when there is no fleet."""
        if self._reviver is not None:
            self._reviver.join()
        self._failure, self._policy_version = None, -1
        self._local_serves = self._was_ready = False
        self._copy.rollback()
        self._local.restart()

    def _revive(self, error: EngineDiedError, cause: Exception | None = None) -> None:
        """Start the local server again, fill it, and let it take requests, all in a thread."""
        if self._is_reviving or self._is_closed:
            return
        self._local_serves, self._is_reviving = False, True
        self._reviver = threading.Thread(target=self._bring_back, args=(error, cause), daemon=True, name="revive-sglang")
        self._reviver.start()

    def _bring_back(self, error: EngineDiedError, cause: Exception | None) -> None:
        if isinstance(cause, ServerStalledError):
            self._local.server.kill()
        is_back = serves = False
        while not is_back and not self._is_closed:
            self._num_deaths += 1
            if self._num_deaths > MAX_DEATHS:
                self._say(f"{error}\nIt died {MAX_DEATHS} times before and is given up.")
                self._failure = error
                break
            self._say(f"{error}\nIt is started again; what it was generating is generated elsewhere.")
            try:
                self._local.restart()
                self._local.wait_until_ready()
                serves, is_back = self._refill(), True
                with_weights = f"the weights of version {self._policy_version}" if serves else "no weights until the next swap"
                self._say(f"{self._local.server.name} is back with {with_weights}")
            except Exception as again:  # whatever it is, a generation may be waiting for this to end
                error = again if isinstance(again, EngineDiedError) else EngineDiedError(f"{self._local.server.name}: {again}")
        if not is_back:
            self._is_reviving = False
        with contextlib.suppress(RuntimeError):  # closed
            self._client.submit(self._wake())

    def _refill(self) -> bool:
        """Give the local server the version that the others serve. Not during a swap, which brings another; False if there is none."""
        with self._turn:
            self._turn.wait_for(lambda: not self._is_swapping)
            if self._copy.policy_version < 0 or self._copy.policy_version != self._policy_version:
                self._is_reviving = False  # in the same moment: the next swap must take it along
                return False
            self._is_refilling = True
        try:
            self._copy.give_to(self._local)
            self._local.admit()
        finally:
            with self._turn:
                self._is_refilling = False
                self._turn.notify_all()
        with self._turn:
            self._local_serves, self._is_reviving = True, False  # from here on it may die again, and be brought back by another thread
        self._client.submit(self._rejoin())
        return True

    async def _rejoin(self) -> None:
        """The local server takes requests again; those of other leaders get no more of this one's."""
        generation = self._generation
        if generation is not None and self._local_serves and self._member(self._local.server.name) is None:
            for member in generation.members:
                member.is_open &= member.is_own or member.name.startswith(NODE)
            generation.add(self._local_member())

    async def _wake(self) -> None:
        if self._generation is not None:
            self._generation.wake()

    # ---- weights

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        """See `WeightSink.prepare`. A server that is being replaced takes no part; it is filled afterwards."""
        self._nodes.wait()  # they are being sent the copy
        with self._turn:
            self._turn.wait_for(lambda: not self._is_refilling)
            self._is_swapping = True
            self._local_swaps = not self._is_reviving
        self._copy.prepare(policy_version, tensors)
        self._locally(lambda: self._local.prepare(policy_version, tensors))

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        """See `WeightSink.load`."""
        self._locally(lambda: self._local.load(shared_memory_path, entries))
        self._copy.load(shared_memory_path, entries)

    def commit(self) -> None:
        """See `WeightSink.commit`."""
        self._locally(self._local.commit)
        if self._local_swaps:
            self._local_serves, self._num_deaths = True, 0
        self._copy.commit()
        self._previous, self._policy_version = self._policy_version, self._copy.policy_version

    def revert(self) -> None:
        """See `WeightSink.revert`. The copy is of no use until the next swap, as after `rollback`."""
        self._policy_version = self._previous
        self._take_back(self._local.revert)

    def settle(self) -> None:
        """See `WeightSink.settle`. The nodes get the version now, by broadcast."""
        self._locally(self._local.settle)
        self._end_swap()
        self._nodes.fill(self._copy)

    def rollback(self) -> None:
        """See `WeightSink.rollback`."""
        if self._is_swapping:
            self._take_back(self._local.rollback)

    def _take_back(self, how: Callable[[], None]) -> None:
        self._copy.rollback()
        self._locally(how)
        self._end_swap()

    def _end_swap(self) -> None:
        with self._turn:
            self._is_swapping = self._local_swaps = False
            self._turn.notify_all()

    def _locally(self, step: Callable[[], None]) -> None:
        """With the local server, if it takes part. It may die; the swap goes on without it."""
        try:
            if self._local_swaps:
                step()
        except EngineDiedError as error:
            self._local_swaps = False
            self._revive(error)

    def disconnect(self) -> None:
        """Leave the nodes to others, and the local engine to its owner. This one is of no use any more. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end_swap()
        self._nodes.assign([])
        while self._reviver is not None and self._reviver.is_alive():
            self._local.server.kill()
            self._reviver.join(_JOIN_S)
        self._nodes.wait()
        self._client.close()
        self._copy.close()

    def close(self) -> None:
        """`disconnect`, and stop the local server."""
        self.disconnect()
        self._local.close()
