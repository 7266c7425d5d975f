"""Asking a model behind an OpenAI-compatible endpoint: `tandem serve`, SGLang, or any other.

What goes wrong on the way is tried again; what a reply says is read by the caller, and asked for again when it cannot be.
"""

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from tandem.engine.loop_thread import LoopThread

T = TypeVar("T")
Message = dict[str, str]

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between two attempts; doubled each time, unless the endpoint says how long
MAX_SHOWN_CHARS = 300
MAX_OBJECT_CHARS = 4000  # at the end of a reply; a verdict has some dozens
_OF_THE_QUESTION = (400, 413, 422)  # statuses that another question may not get
RETRY_TEMPERATURE = 0.7  # asked the same at 0, a model says the same again
_START_TIMEOUT_S = 10.0
_AFTER_AN_OBJECT = " \t\r\n`~"  # the end of a fenced block


class ChatError(RuntimeError):
    """The endpoint gave no reply: it is down, too slow, or refuses the request."""


class RefusedError(ChatError):
    """The endpoint will not answer this very question: it is too long, for example. Others it may."""


class MalformedReplyError(RuntimeError):
    """The model's replies are not what was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a model is, and how it is asked."""

    url: str
    """Up to and with /v1."""
    model: str | None = None
    """None: the first that the endpoint lists."""
    api_key: str | None = field(default=None, repr=False)
    max_concurrent: int = 32
    """Questions at a time; others wait."""
    max_tokens: int = 2048
    """Of a reply."""
    attempt_s: float = 120.0
    """Deadline of one request."""
    deadline_s: float = 600.0
    """Of a question with everything that is tried again, from the moment it no longer waits for others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    text: str
    is_complete: bool  # False: cut at max_tokens


def read_key(file: str | Path | None) -> str | None:
    """The first line of a file with an API key. Raises: ValueError for a file that cannot be read or is empty."""
    if file is None:
        return None
    try:
        lines = Path(file).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise ValueError(f"the file {file} with the API key cannot be read: {error}") from error
    if len(lines) != 1:
        raise ValueError(f"the file {file} must hold one API key and nothing else; it holds {len(lines)} words")
    return lines[0]


class ChatClient:
    """Asks one endpoint, in a thread of its own. `submit` may be called from any thread."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises: ValueError if the endpoint does not answer, refuses the key, or lists no model where none is named."""
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key is not None else {}
        self._endpoint = endpoint
        self.model = _model_at(endpoint.url, headers, endpoint.model)
        self._places = asyncio.Semaphore(endpoint.max_concurrent)
        limits = httpx.Limits(max_connections=endpoint.max_concurrent)
        # asyncio's timeouts bound the whole of a request; httpx's would count anew with every byte
        self._http = httpx.AsyncClient(
            base_url=endpoint.url.rstrip("/") + "/", headers=headers, timeout=None, limits=limits, trust_env=False
        )
        self._thread = LoopThread("chat-client", self._http.aclose)

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine, such as `ask`, in the client's thread."""
        if not self._thread.is_open:
            work.close()
            raise ChatError("the client is closed")
        return self._thread.submit(work)

    async def ask(self, messages: Sequence[Message], read: Callable[[Reply], T], *, num_tries: int = 1) -> T:
        """What `read` makes of the model's reply. Replies that it refuses with MalformedReplyError are asked for again.

        The first try is greedy; others are sampled, with seeds that are the same each time. In the client's thread only.

        Raises: ChatError; MalformedReplyError of the last try.
        """
        async with self._places:
            deadline = self._thread.time() + self._endpoint.deadline_s
            for number in itertools.count(1):
                body = {"model": self.model, "messages": list(messages), "max_tokens": self._endpoint.max_tokens, "seed": number}
                reply = await self._reply({**body, "temperature": 0 if number == 1 else RETRY_TEMPERATURE}, deadline)
                try:
                    return read(reply)
                except MalformedReplyError as error:
                    if number >= num_tries:
                        raise MalformedReplyError(f"{error} (reply {number} of {num_tries})") from error
        raise AssertionError("the loop ends by returning or raising")

    async def sample(self, messages: Sequence[Message], *, temperature: float, seed: int, max_tokens: int) -> Reply:
        """One sampled reply, whatever it says. In the client's thread only. Raises: ChatError."""
        async with self._places:
            deadline = self._thread.time() + self._endpoint.deadline_s
            body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "seed": seed}
            return await self._reply({**body, "temperature": temperature}, deadline)

    async def _reply(self, body: dict[str, Any], deadline: float) -> Reply:
        """One reply; whatever may pass by itself is tried again until the deadline."""
        problem, wait_s = "nothing was asked", FIRST_WAIT_S
        while (left_s := deadline - self._thread.time()) > 0:
            retry_after_s = None
            try:
                async with asyncio.timeout(min(left_s, self._endpoint.attempt_s)):
                    answer = await self._http.post("chat/completions", json=body)
                if answer.status_code == 200:
                    return _read_reply(answer)
                problem = f"status {answer.status_code}: {answer.text[:MAX_SHOWN_CHARS]}"
                if answer.status_code < 500 and answer.status_code not in (408, 409, 429):
                    kind = RefusedError if answer.status_code in _OF_THE_QUESTION else ChatError
                    raise kind(f"{self._endpoint.url} refuses the request with {problem}")
                retry_after_s = _retry_after(answer)
            except TimeoutError:
                problem = f"no answer within {min(left_s, self._endpoint.attempt_s):.3g} s"
            except (httpx.TransportError, MalformedReplyError) as error:
                problem = f"{type(error).__name__}: {error}"
            pause_s = wait_s * random.uniform(0.5, 1.0) if retry_after_s is None else retry_after_s
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            if self._thread.time() + pause_s >= deadline:
                break
            await asyncio.sleep(pause_s)
        raise ChatError(f"{self._endpoint.url} gave no reply within {self._endpoint.deadline_s:g} s; the last problem: {problem}")

    def close(self) -> None:
        """End what runs; its futures are cancelled. May be called twice."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def final_object(reply: Reply) -> dict[str, Any]:
    """The JSON object, fenced or not, that a reply ends with.

    Only its end counts: an object further up may be a quotation, or a draft.

    Raises: MalformedReplyError without one, and for a reply that was cut.
    """
    if not reply.is_complete:
        raise MalformedReplyError("the reply was cut at its longest length")
    text = reply.text[-MAX_OBJECT_CHARS:].rstrip(_AFTER_AN_OBJECT)
    start = len(text)
    while text.endswith("}") and (start := text.rfind("{", 0, start)) >= 0:
        with suppress(ValueError, RecursionError):
            return json.loads(text[start:])
    raise MalformedReplyError(f"the reply does not end with a JSON object but with {reply.text[-MAX_SHOWN_CHARS:]!r}")


def _read_reply(answer: httpx.Response) -> Reply:
    try:
        choice = answer.json()["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise MalformedReplyError(f"this is no chat completion: {answer.text[:MAX_SHOWN_CHARS]!r}") from error
    # null where a model spent all its tokens on hidden reasoning
    return Reply(text=text if isinstance(text, str) else "", is_complete=finish != "length")


def _retry_after(answer: httpx.Response) -> float | None:
    value = answer.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _model_at(url: str, headers: dict[str, str], wanted: str | None) -> str:
    """The wanted model, or the first; and whether the endpoint is there at all."""
    where = f"{url.rstrip('/')}/models"
    try:
        answer = httpx.get(where, headers=headers, timeout=_START_TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{where} does not answer ({error}); start the server, or correct the URL") from error
    if wanted is not None and answer.status_code == 404:  # not every endpoint lists what it has
        return wanted
    if answer.status_code != 200:
        said = answer.text[:MAX_SHOWN_CHARS]
        raise ValueError(f"{where} answers with status {answer.status_code} ({said}); check the API key, and that the URL ends with /v1")
    try:
        models = [str(model["id"]) for model in answer.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} answers with {answer.text[:MAX_SHOWN_CHARS]!r}, which is no list of models; correct the URL") from error
    if wanted is None and models:
        return models[0]
    if wanted not in models:
        raise ValueError(f"{url} has no model {wanted!r}; it has {', '.join(models) or 'none'}")
    return wanted
