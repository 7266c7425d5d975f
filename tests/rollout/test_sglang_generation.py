"""Requests on servers that come, refuse and die, in memory and at random: each is answered once, with the tokens of its seed."""

import asyncio
import collections
import hashlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tandem.engine.architecture import Architecture
from tandem.engine.config import RepetitionConfig, RolloutConfig, SGLangConfig
from tandem.engine.rollout.sglang_client import ServerGoneError
from tandem.engine.rollout.sglang_generation import Generation
from tandem.engine.rollout.sglang_members import Member
from tandem.engine.types import Completion, GenerationRequest, StopState
from tests.rollout.models import tiny_model

STOP = 7
CONFIG = RolloutConfig(max_batch=3, repetition=RepetitionConfig(max_period=0, ngram=0), sglang=SGLangConfig(stall_timeout_s=30.0))


def token_at(seed: int, position: int) -> int:
    """What SGLang's are meant to be: a function of seed and place."""
    return hashlib.blake2b(f"{seed} {position}".encode(), digest_size=1).digest()[0] % 20


def expected(request: GenerationRequest) -> list[int]:
    tokens = list[int]()
    while len(tokens) < request.max_new_tokens and STOP not in tokens:
        tokens.append(token_at(request.seed, len(request.token_ids) + len(tokens)))
    return tokens


class MemoryServer:
    """Speaks as SGLang does, some tokens at a time. `dies_after` so many parts of answers; gives a request up now and then."""

    def __init__(self, generator: random.Random, dies_after: int | None, *, weight_version: int = 0) -> None:
        self.generator, self.left, self.version = generator, dies_after, weight_version
        self.num_running, self.most_running = 0, 0
        self.aborted = set[str]()
        self.order = list[int]()

    async def stream(self, *, rid: str, input_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> AsyncIterator[dict[str, Any]]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        self.order.append(sampling_params["sampling_seed"])
        try:
            new = list[int]()
            while True:
                await asyncio.sleep(0)
                if self.left is not None and self.left <= 0:
                    raise ServerGoneError("connection closed")
                self.left = None if self.left is None else self.left - 1
                part = list[int]()
                while len(part) < 3 and len(new) < sampling_params["max_new_tokens"] and STOP not in new:
                    token = token_at(sampling_params["sampling_seed"], len(input_ids) + len(new))
                    new.append(token)
                    part.append(token)
                given_up = rid in self.aborted or self.generator.random() < 0.03
                is_over = given_up or STOP in new or len(new) == sampling_params["max_new_tokens"]
                reason = {"type": "abort" if given_up else "stop"} if is_over else None
                entries = [[-0.5, token, None] for token in part]
                yield {
                    "output_ids": part,
                    "meta_info": {"weight_version": self.version, "finish_reason": reason, "output_token_logprobs": entries},
                }
                if is_over:
                    return
        finally:
            self.num_running -= 1

    async def call(self, path: str, *, rid: str) -> None:
        assert path == "/abort_request"
        self.aborted.add(rid)


class Restarter:
    """A keeper that brings another server after each own one that died."""

    def __init__(self, generator: random.Random) -> None:
        self.generator, self.lost_members, self.expects_member = generator, list[str](), False
        self.generation: Generation | None = None

    def lost(self, member: Member, error: Exception) -> None:
        self.lost_members.append(member.name)
        if member.is_own:
            self.expects_member = True
            self.task = asyncio.get_running_loop().create_task(self.replace())

    async def replace(self) -> None:
        for _ in range(self.generator.randrange(40)):
            await asyncio.sleep(0)
        assert self.generation is not None
        self.expects_member = False
        self.generation.add(member("again", MemoryServer(self.generator, self.generator.choice([None, 30]))))


def member(name: str, server: MemoryServer, capacity: int = 3, *, is_own: bool = True) -> Member:
    return Member(name=name, client=server, capacity=capacity, is_own=is_own)  # pyright: ignore[reportArgumentType]


def generate(requests: list[GenerationRequest], members: list[Member], keeper: Any, budget: int | None = None) -> list[Completion]:
    async def run() -> list[Completion | Exception | None]:
        generation = Generation(
            CONFIG,
            requests,
            members,
            stop_token_ids=(STOP,),
            architecture=Architecture.from_hf(tiny_model().config.to_dict()),
            token_budget=budget,
            policy_version=0,
            keeper=keeper,
        )
        if keeper is not None:
            keeper.generation = generation
        await asyncio.wait_for(generation.run(), 60)
        return [generation.ended.get() for _ in range(generation.ended.qsize())]

    *completions, end = asyncio.run(run())
    if end is not None:
        assert isinstance(end, Exception)
        raise end
    assert all(isinstance(completion, Completion) for completion in completions)
    return completions  # pyright: ignore[reportReturnType]


def some_requests(generator: random.Random) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=str(i),
            token_ids=tuple(range(1, generator.randrange(2, 9))),
            num_prefix_tokens=0,
            max_new_tokens=generator.randrange(1, 40),
            seed=generator.getrandbits(60),
        )
        for i in range(generator.randrange(1, 30))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_every_request_is_answered_once_with_the_tokens_of_its_seed(seed: int) -> None:
    generator = random.Random(seed)
    requests = some_requests(generator)
    servers = [MemoryServer(generator, generator.choice([None, 0, 5, 40])) for _ in range(generator.randrange(1, 4))]
    wrong = MemoryServer(generator, None, weight_version=9)
    members = [member(f"server {i}", server, 1 + i, is_own=i == 0) for i, server in enumerate(servers)]
    members.append(member("with other weights", wrong, is_own=False))
    total = sum(len(expected(request)) for request in requests)
    budget = generator.choice([None, generator.randrange(total + 1)])
    keeper = Restarter(generator)
    completions = generate(requests, members, keeper, budget)
    assert collections.Counter(completion.request_id for completion in completions) == {request.request_id: 1 for request in requests}
    for completion in completions:
        tokens = expected(requests[int(completion.request_id)])
        if completion.stop is StopState.BUDGET:
            assert budget is not None
            assert list(completion.token_ids) == tokens[: len(completion.token_ids)]
        else:
            assert list(completion.token_ids) == tokens
            assert completion.stop is (StopState.FINISHED if tokens[-1] == STOP else StopState.LENGTH)
        assert len(completion.logprobs) == len(completion.token_ids)
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    assert num_tokens == (total if budget is None else min(budget, total))
    for i, server in enumerate(servers):
        assert server.most_running <= 1 + i


def test_requests_go_to_whoever_is_least_loaded_in_their_order() -> None:
    generator = random.Random(0)
    requests = [
        GenerationRequest(request_id=str(i), token_ids=(1,), num_prefix_tokens=0, max_new_tokens=30, seed=10**6 + i) for i in range(9)
    ]
    small, large = MemoryServer(generator, None), MemoryServer(generator, None)
    members = [member("small", small, 2), member("large", large, 4, is_own=False)]
    generate(requests, members, Restarter(generator), budget=1)
    assert [seed - 10**6 for seed in small.order] == [0, 3]
    assert [seed - 10**6 for seed in large.order] == [1, 2, 4, 5]


def test_without_a_keeper_the_loss_of_the_server_ends_the_generation() -> None:
    generator = random.Random(1)
    requests = some_requests(generator)
    with pytest.raises(ServerGoneError, match="connection closed"):
        generate(requests, [member("server", MemoryServer(generator, 0))], None)


def test_when_nobody_is_left_and_nobody_is_expected_the_last_loss_is_told() -> None:
    class Alone(Restarter):
        def lost(self, member: Member, error: Exception) -> None:
            self.lost_members.append(member.name)

    generator = random.Random(2)
    keeper = Alone(generator)
    members = [member(name, MemoryServer(generator, 2), is_own=False) for name in "ab"]
    with pytest.raises(ServerGoneError, match="connection closed"):
        generate(some_requests(generator), members, keeper)
    assert sorted(keeper.lost_members) == ["a", "b"]


def test_a_recorded_completion_needs_no_server() -> None:
    recorded = Completion(request_id="0", token_ids=(1, 2), logprobs=(-1.0, -2.0), stop=StopState.FINISHED, policy_version=0)
    request = GenerationRequest(request_id="0", token_ids=(1,), num_prefix_tokens=0, max_new_tokens=9, seed=1, recorded=recorded)
    assert generate([request], [], Restarter(random.Random(3))) == [recorded]
