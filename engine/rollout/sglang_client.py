"""HTTP to one SGLang server, in a thread of its own, so that the server never waits while its client grades.

`call` is for commands; `stream` yields what a generation sends, as it sends it.
"""

import concurrent.futures
import copy
import functools
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Self, TypeVar

import httpx

from tandem.engine.loop_thread import LoopThread

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 5.0
_ERROR_CHARS = 2000
_ABORT = "/abort_request"
# SGLang closes a connection after 5 s without a request. One that is sent at that moment would look as if the server had died.
_IDLE_S = 2.0


class ServerGoneError(Exception):
    """The connection is closed or was never there: the server has died, or is about to."""


class SGLangClient:
    """Commands may come from any thread but the client's own."""

    def __init__(self, url: str) -> None:
        self._url, self._who = url, "SGLang"
        self._http = _http()
        # Each has one connection: a pool looks through all of its own several times for each request, 8 ms where 256 are open.
        self._streams: list[httpx.AsyncClient] = []  # that nobody uses
        self.num_commands = self.num_running = 0  # commands sent, and those of them that are not answered yet
        self._thread = LoopThread("sglang-client", functools.partial(_close, self._http, self._streams))

    def at(self, url: str, who: str = "SGLang") -> Self:
        """A client of another server in the same thread, closed with this one. `who` answers, as errors say it."""
        other = copy.copy(self)
        other._url, other._who = url, who
        return other

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run in the client's thread. Raises: RuntimeError after `close`."""
        return self._thread.submit(work)

    async def call(self, path: str, **fields: Any) -> Any:
        """POST, and the answer's JSON. Raises: ServerGoneError; RuntimeError with the server's message for another status than 200."""
        counts = path != _ABORT  # no deadline is on it
        self.num_commands, self.num_running = self.num_commands + counts, self.num_running + counts
        try:
            return await self._request("POST", path, fields)
        finally:
            self.num_running -= counts

    async def get(self, path: str) -> Any:
        """GET; as `call`."""
        return await self._request("GET", path, None)

    async def _request(self, method: str, path: str, fields: Mapping[str, Any] | None) -> Any:
        try:
            answer = await self._http.request(method, self._url + path, json=fields)
        except httpx.TransportError as error:
            raise ServerGoneError(f"{path}: {error!r}") from error
        if answer.status_code != 200:
            raise RuntimeError(f"{self._who} answered {path} with {answer.status_code}: {answer.text[:_ERROR_CHARS]}")
        with suppress(ValueError):
            return answer.json()
        return answer.text

    async def stream(self, **fields: Any) -> AsyncIterator[dict[str, Any]]:
        """POST /generate, and each of its server-sent events. Raises: as `call`."""
        http = self._streams.pop() if self._streams else _http()
        try:
            async with http.stream("POST", f"{self._url}/generate", json=fields | {"stream": True}) as answer:
                if answer.status_code != 200:
                    text = (await answer.aread()).decode(errors="replace")
                    raise RuntimeError(f"{self._who} answered /generate with {answer.status_code}: {text[:_ERROR_CHARS]}")
                left = b""
                async for part in answer.aiter_bytes():
                    *events, left = (left + part).split(b"\n\n")
                    for event in events:
                        data = event.removeprefix(b"data: ")
                        if data != b"[DONE]":
                            yield _checked(json.loads(data))
        except httpx.TransportError as error:
            raise ServerGoneError(f"/generate: {error!r}") from error
        finally:
            self._streams.append(http)

    def close(self) -> None:
        """End what runs. May be called twice."""
        self._thread.close()


def _http() -> httpx.AsyncClient:
    # Deadlines are the callers': a response may take hours to begin. Nothing is encrypted: certificates need not be read.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S)
    return httpx.AsyncClient(timeout=None, limits=limits, trust_env=False, verify=False)


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise RuntimeError(f"SGLang refused a request: {str(event['error'])[:_ERROR_CHARS]}")
    return event


async def _close(http: httpx.AsyncClient, streams: list[httpx.AsyncClient]) -> None:
    for each in (http, *streams):
        await each.aclose()
