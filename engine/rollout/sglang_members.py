"""The servers that take part in a generation, and the requests that they have (sglang_generation.py)."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tandem.engine.rollout.repetition import RepetitionDetector
from tandem.engine.rollout.sglang_client import SGLangClient
from tandem.engine.types import GenerationRequest, StopState


class ServerStalledError(Exception):
    """Nothing has come from the server for too long."""


class GivenUpError(RuntimeError):
    """The server ended a request that it was not asked to end."""


@dataclass(kw_only=True, eq=False)
class Row:
    """A request that runs, or waits for its turn."""

    index: int  # its turn
    request: GenerationRequest
    num_moves: int = 0  # from one server to another
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: StopState | None = None  # once no token is taken any more
    is_aborted: bool = False  # by the caller; tokens that are on their way are still taken
    detector: RepetitionDetector | None = None
    routed_experts: np.ndarray | None = None


@dataclass(kw_only=True, eq=False)
class Member:
    """A server that takes part in a generation."""

    name: str  # as messages name it
    client: SGLangClient
    capacity: int  # requests at a time
    is_own: bool = True  # False: somebody else's, whose refusals and errors end its part and not the generation
    is_open: bool = True  # takes further requests
    is_lost: bool = False  # what it has is generated elsewhere
    num_tokens: int = 0  # that it generated
    running: dict[str, Row] = field(default_factory=dict)  # by the id under which the server knows it
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    heard_s: float = field(default_factory=time.monotonic)


class Keeper(Protocol):
    """Decides what becomes of a generation that lost a server. Called in the client's thread."""

    def lost(self, member: Member, error: Exception) -> None:
        """May add others to the generation."""
        ...

    @property
    def expects_member(self) -> bool:
        """Whether requests that no server takes are to wait."""
        ...
