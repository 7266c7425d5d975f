"""`tandem serve MODEL`: a Hugging Face folder behind OpenAI's HTTP API, on the embedded engine.

GET /v1/models, POST /v1/chat/completions and /v1/completions, GET /health. Concurrent requests share the engine in waves (waves.py).
Log-probs are those of `Completion`, under the softmax at the request's temperature. Stop texts cut the answer, but the engine knows only
stop tokens and goes on to the end. SGLang speaks the same API by itself.
"""

import asyncio
import contextlib
import hashlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tandem.engine.build import stop_token_ids
from tandem.engine.chat_api import APIError, ChatRequest, TextRequest, chat_answer, read_completion, text_answer
from tandem.engine.checkpoint.hf_folder import read_hf_config
from tandem.engine.checkpoint.serve_folder import serve_folder
from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.data.tokenizer import HFTokenizer, load_tokenizer
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import GenerationRequest, StopState
from tandem.engine.waves import Waves

_POLL_S = 0.5  # how often a request that waits looks whether its client is still there
_GRACE_S = 5  # that requests have to end when the server is stopped


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a request needs to know of the server."""

    name: str
    tokenizer: HFTokenizer
    vocab_size: int
    context_length: int
    default_max_tokens: int
    max_waiting: int


def create_app(waves: Waves, served: Served, *, on_start: Callable[[], object] = lambda: None) -> FastAPI:
    """The service; it closes `waves` when it is stopped."""
    num_open = 0

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        on_start()
        yield
        await asyncio.to_thread(waves.close)

    app = FastAPI(title="Tandem", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(APIError)
    async def api_error(_: Request, error: APIError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return await api_error(request, APIError(400, f"{field}: {first['msg']}", param=field))

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> Response:
        return await api_error(request, APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def ours(request: Request, error: Exception) -> Response:
        return await api_error(request, APIError(500, f"{type(error).__name__}: {error}"))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"model": served.name, "open_requests": num_open}, status_code=200 if waves.is_alive else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        entry = {"id": served.name, "object": "model", "created": 0, "owned_by": "tandem", "max_model_len": served.context_length}
        return JSONResponse({"object": "list", "data": [entry]})

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return JSONResponse(await answer(body, request))

    @app.post("/v1/completions")
    async def text(body: TextRequest, request: Request) -> Response:
        return JSONResponse(await answer(body, request))

    async def answer(body: ChatRequest | TextRequest, request: Request) -> dict[str, Any]:
        nonlocal num_open
        name = secrets.token_hex(8)
        prompts, requests = read_requests(body, served, name)
        if num_open >= served.max_waiting:
            raise APIError(429, f"{num_open} requests are open, as many as this server takes; try again later")
        num_open += 1
        job = waves.submit(requests)
        try:
            done = asyncio.ensure_future(asyncio.wrap_future(job.future))
            while not (await asyncio.wait([done], timeout=_POLL_S))[0]:
                if await request.is_disconnected():
                    waves.cancel(job)
            completions = done.result()
        except asyncio.CancelledError:
            waves.cancel(job)
            raise APIError(503, "the server is stopping") from None
        except RuntimeError as error:  # the engine died, or failed; the next wave has another
            raise APIError(503, f"{error}".partition("\n")[0]) from error
        finally:
            num_open -= 1
        if any(completion.stop is StopState.ABORTED for completion in completions):
            raise APIError(503, "the server is stopping")
        choices = [read_completion(completion, body.stops, served.tokenizer) for completion in completions]
        shape = chat_answer if isinstance(body, ChatRequest) else text_answer
        wants_logprobs = body.logprobs is not None and body.logprobs is not False
        return shape(name, served.name, sum(map(len, prompts)), choices, served.tokenizer if wants_logprobs else None)

    return app


def read_requests(body: ChatRequest | TextRequest, served: Served, name: str) -> tuple[list[list[int]], list[GenerationRequest]]:
    """The prompts, and `n` requests to the engine for each. The same seed gives the same answers.

    Raises: APIError for what cannot be answered.
    """
    body.check()
    if body.model != served.name:
        raise APIError(
            404, f"there is no model {body.model!r:.200}; this server has {served.name!r}", code="model_not_found", param="model"
        )
    prompts = body.prompts(served.tokenizer)
    requests = []
    for number, prompt in enumerate(prompts or [[]]):
        if not prompt:
            raise APIError(400, f"prompt {number} is empty; it needs at least one token", param="prompt")
        if min(prompt) < 0 or max(prompt) >= served.vocab_size:
            raise APIError(400, f"prompt {number} has token ids outside of [0, {served.vocab_size})", param="prompt")
        left = served.context_length - len(prompt)
        wanted = body.most_tokens if body.most_tokens is not None else min(served.default_max_tokens, max(1, left))
        if wanted > left:
            message = f"{len(prompt)} tokens of prompt and max_tokens={wanted} exceed the context of {served.context_length} tokens"
            raise APIError(400, message, code="context_length_exceeded", param="max_tokens")
        for sample in range(body.n or 1):
            request = GenerationRequest(
                request_id=f"{name}-{number}-{sample}",
                token_ids=tuple(prompt),
                num_prefix_tokens=0,
                max_new_tokens=wanted,
                seed=secrets.randbits(63) if body.seed is None else _seed_of(body.seed, number, sample),
                temperature=1.0 if body.temperature is None else body.temperature,
            )
            requests.append(request)
    return prompts, requests


def _seed_of(seed: int, prompt: int, sample: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {prompt} {sample}".encode(), digest_size=8).digest(), "little") >> 1


def serve(
    model: Path, host: str, port: int, *, num_threads: int, max_batch: int, max_waiting: int, context_length: int | None, max_tokens: int
) -> None:
    """Run until SIGTERM or Ctrl-C. Prints the address once requests are taken; port 0 is any free one.

    Args:
        max_batch: responses decoded at the same time.
        max_waiting: open requests; more get status 429.
        context_length: most tokens of prompt and answer; None: the model's.
        max_tokens: of an answer whose request names no number.
    Raises: ValueError for a folder that is no model, and an address that cannot be listened on.
    """
    import uvicorn

    hf_config, tokenizer = read_hf_config(model), load_tokenizer(model)
    longest = int(hf_config["max_position_embeddings"])
    if context_length is not None and not 2 <= context_length <= longest:
        raise ValueError(f"context_length is {context_length}; it must lie between 2 and the model's {longest}")
    served = Served(
        name=model.resolve().name,
        tokenizer=tokenizer,
        vocab_size=int(hf_config["vocab_size"]),
        context_length=longest if context_length is None else context_length,
        default_max_tokens=max_tokens,
        max_waiting=max_waiting,
    )
    listener = _listen(host, port)
    engine = EmbeddedEngine(
        hf_config,
        RolloutConfig(max_batch=max_batch, repetition=RepetitionConfig(max_period=0, ngram=0)),
        dtype="float32",
        context_length=served.context_length,
        stop_token_ids=stop_token_ids(tokenizer, model),
        num_threads=num_threads,
    )
    with listener, engine:
        waves = Waves(engine, lambda: serve_folder(model, engine, torch.float32))
        template = "the model's chat template" if tokenizer.chat_template is not None else 'no chat template: lines "role: text"'
        address = f"http://{host}:{listener.getsockname()[1]}/v1"
        app = create_app(waves, served, on_start=lambda: print(f"{served.name} is served at {address} ({template})", flush=True))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_S)
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"{host}:{port} cannot be listened on: {error}; choose another port, or 0 for any") from error
    return listener
