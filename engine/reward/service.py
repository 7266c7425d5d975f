"""The sandbox over HTTP, for nodes that have none, or to keep untrusted programs on machines of their own.

POST /run takes a program and returns its `Execution`; GET /health says whether programs run; GET /metrics counts, in Prometheus's text
format. Requests that find every worker busy and the queue full get 429 with Retry-After. Output and input are base64: they are bytes.
"""

import asyncio
import base64
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, fields, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from tandem.engine.reward.execution import Execution, Limits, Status
from tandem.engine.reward.languages import LANGUAGES, missing_tools
from tandem.engine.reward.sandbox import MAX_INPUT_BYTES, Sandbox

RECENT_RUNS = 100  # whose mean time tells how long to stay away
BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MAX_BODY_BYTES = 2 * MAX_INPUT_BYTES  # base64 and JSON around it


class RunRequest(BaseModel):
    """Body of POST /run. `limits` may only lower the service's own."""

    model_config = ConfigDict(extra="forbid")

    source: str
    language: str = "python"
    stdin: str = ""
    """base64"""
    files: dict[str, str] = Field(default_factory=dict)
    """base64 by path"""
    limits: dict[str, float] = Field(default_factory=dict)


class Metrics:
    """Counts since the start, and what is going on now."""

    def __init__(self) -> None:
        self.num_ended: Counter[tuple[str, str]] = Counter()
        self.num_refused = 0
        self.num_waiting = 0
        self.num_running = 0
        self.seconds = 0.0
        self.buckets: Counter[float] = Counter()
        self.recent: deque[float] = deque(maxlen=RECENT_RUNS)

    def add(self, language: str, execution: Execution, seconds: float) -> None:
        self.num_ended[language, execution.status.value.replace(" ", "_")] += 1
        self.seconds += seconds
        self.recent.append(seconds)
        for bound in BUCKETS_S:
            self.buckets[bound] += seconds <= bound

    def text(self, num_replaced: int) -> str:
        total = self.num_ended.total()
        lines = ["# TYPE sandbox_runs_total counter"]
        lines += [f'sandbox_runs_total{{language="{lang}",status="{state}"}} {n}' for (lang, state), n in sorted(self.num_ended.items())]
        lines += ["# TYPE sandbox_refused_total counter", f"sandbox_refused_total {self.num_refused}"]
        lines += ["# TYPE sandbox_workers_replaced_total counter", f"sandbox_workers_replaced_total {num_replaced}"]
        lines += ["# TYPE sandbox_waiting gauge", f"sandbox_waiting {self.num_waiting}"]
        lines += ["# TYPE sandbox_running gauge", f"sandbox_running {self.num_running}"]
        lines += ["# TYPE sandbox_run_seconds histogram"]
        lines += [f'sandbox_run_seconds_bucket{{le="{bound}"}} {self.buckets[bound]}' for bound in BUCKETS_S]
        lines += [f'sandbox_run_seconds_bucket{{le="+Inf"}} {total}', f"sandbox_run_seconds_sum {self.seconds:.6f}"]
        return "\n".join([*lines, f"sandbox_run_seconds_count {total}", ""])


def create_app(sandbox: Sandbox, *, max_waiting: int) -> FastAPI:
    """The service; it closes the sandbox when it is stopped, after the runs in progress.

    Args:
        max_waiting: Requests that may wait for a worker; the next one is refused with 429.
    """
    metrics = Metrics()
    places = asyncio.Semaphore(sandbox.num_workers)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(sandbox.close)

    app = FastAPI(title="Tandem sandbox", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def bound_body(request: Request, call_next: Any) -> Response:
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not length.isdigit():
            return JSONResponse({"detail": "Content-Length is missing"}, status_code=411)
        if length and int(length) > MAX_BODY_BYTES:
            return JSONResponse({"detail": f"the body has {length} bytes; at most {MAX_BODY_BYTES} are taken"}, status_code=413)
        return await call_next(request)

    @app.post("/run")
    async def run(request: RunRequest) -> Response:
        try:
            limits = lowered(sandbox.limits, request.limits)
            stdin = base64.b64decode(request.stdin, validate=True)
            files = {name: base64.b64decode(data, validate=True) for name, data in request.files.items()}
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, status_code=400)
        if places.locked() and metrics.num_waiting >= max_waiting:
            metrics.num_refused += 1
            mean_s = sum(metrics.recent) / len(metrics.recent) if metrics.recent else 1.0
            wait_s = max(1, round(mean_s * (metrics.num_waiting + 1) / sandbox.num_workers))
            return JSONResponse({"detail": "all workers are busy"}, status_code=429, headers={"Retry-After": str(wait_s)})
        metrics.num_waiting += 1
        try:
            await places.acquire()
        finally:
            metrics.num_waiting -= 1
        # a task of its own: if the client goes away, the place is taken until the run has ended all the same
        running = asyncio.create_task(run_and_release(request, stdin, files, limits))
        try:
            done = await asyncio.shield(running)
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, status_code=400)
        return JSONResponse(to_json(done))

    async def run_and_release(request: RunRequest, stdin: bytes, files: dict[str, bytes], limits: Limits) -> Execution:
        metrics.num_running += 1
        start = time.monotonic()
        try:
            done = await asyncio.to_thread(sandbox.run, request.source, language=request.language, stdin=stdin, files=files, limits=limits)
        finally:
            metrics.num_running -= 1
            places.release()
        metrics.add(request.language, done, time.monotonic() - start)
        return done

    @app.get("/health")
    async def health() -> Response:
        """200 if a trivial program ran, or all workers are busy with others; else 503."""
        languages = [language for language in LANGUAGES if not missing_tools(language)]
        state: dict[str, Any] = {"workers": sandbox.num_workers, "languages": languages, "not_enforced": sandbox.not_enforced}
        if not places.locked():
            async with places:
                done = await asyncio.to_thread(sandbox.run, "print(1)")
            if done.status is not Status.OK:
                return JSONResponse({**state, "problem": done.stderr.decode(errors="replace")}, status_code=503)
        return JSONResponse(state)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return PlainTextResponse(metrics.text(sandbox.num_replaced), media_type="text/plain; version=0.0.4")

    return app


def lowered(limits: Limits, wanted: dict[str, float]) -> Limits:
    """Raises: ValueError for an unknown field, or one above the service's."""
    kinds = {field.name: type(getattr(limits, field.name)) for field in fields(limits)}
    for name, value in wanted.items():
        if name not in kinds:
            raise ValueError(f"limits has {name!r}; it must be one of {', '.join(kinds)}")
        if value > getattr(limits, name):
            raise ValueError(f"limits.{name} is {value}; this service allows at most {getattr(limits, name)}")
    return replace(limits, **{name: kinds[name](value) for name, value in wanted.items()})


def to_json(execution: Execution) -> dict[str, Any]:
    data = asdict(execution)
    return {**data, "stdout": base64.b64encode(execution.stdout).decode(), "stderr": base64.b64encode(execution.stderr).decode()}


def serve(host: str, port: int, *, num_workers: int | None, max_waiting: int, limits: Limits) -> None:
    """Run until SIGTERM or Ctrl-C, then end the runs in progress in their own time.

    Raises: UnavailableError where there is no sandbox.
    """
    import uvicorn

    sandbox = Sandbox(limits, num_workers=num_workers)
    for sentence in sandbox.not_enforced:
        print(f"not enforced on this machine: {sentence}")
    uvicorn.run(create_app(sandbox, max_waiting=max_waiting), host=host, port=port, log_level="warning")
