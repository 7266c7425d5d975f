"""What an SGLang server gives up of its GPU while the trainer has it: KV cache, CUDA graphs, weights.

Weights are lost by that: the server then counts as having none (policy_version -1), so that the next swap sends them, and nothing is
generated before. Keeping them (rollout.sglang.release=kv_cache) saves no transfer, for the trainer's steps change every weight; it keeps
the old version at hand while a swap may still fail. The order is SGLang's: weights come back before the swap, the cache after it.

SGLang's memory saver is for CUDA. A CPU server answers these calls and does nothing.
"""

import asyncio
import time
from typing import Literal

from tandem.engine.rollout.sglang_client import SGLangClient
from tandem.engine.rollout.sglang_weights import WeightCommands

KV_CACHE, CUDA_GRAPHS, WEIGHTS = "kv_cache", "cuda_graph", "weights"  # SGLang's tags
_IDLE_POLL_S = 0.05


def parts_of(release: Literal["auto", "all", "kv_cache", "nothing"], *, on_gpu: bool) -> tuple[str, ...]:
    """rollout.sglang.release as tags, in the order in which they are released."""
    if release == "auto":
        release = "all" if on_gpu else "nothing"
    return {"all": (KV_CACHE, CUDA_GRAPHS, WEIGHTS), "kv_cache": (KV_CACHE,), "nothing": ()}[release]


class ServerMemory:
    """Of one server, from its start to its end: a server that replaces it has released nothing."""

    def __init__(self, client: SGLangClient, weights: WeightCommands, *, timeout_s: float) -> None:
        self._client, self._weights, self._timeout_s = client, weights, timeout_s
        self.released: set[str] = set()

    async def release(self, part: str) -> None:
        """Raises: RuntimeError if the server still generates after the deadline; ServerGoneError."""
        if part in self.released:
            return
        await self._weights.pause()
        if not self.released:
            await self._wait_until_idle()
        await self._client.call("/release_memory_occupation", tags=[part])
        self.released.add(part)

    async def resume(self, part: str) -> None:
        """SGLang fails on a part that was not released. Raises: ServerGoneError."""
        if part in self.released:
            await self._client.call("/resume_memory_occupation", tags=[part])
            self.released.remove(part)

    async def _wait_until_idle(self) -> None:
        """A server that is told to release memory while a request runs ends: aborted ones may still be on their way out."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                await self._client.call("/flush_cache")  # refused while requests run
                return
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_IDLE_POLL_S)
