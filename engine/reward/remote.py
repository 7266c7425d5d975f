"""A sandbox on another node, used like one here."""

import base64
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

import httpx

from tandem.engine.reward.execution import Execution, Limits, Status


class RemoteSandbox:
    """Client of `tandem sandbox-serve`. Threads may call `run` at once."""

    def __init__(self, url: str, *, patience_s: float = 300.0) -> None:
        """
        Args:
            url: Of the service, such as http://sandbox-1:8600.
            patience_s: How long a run may wait while the service is busy or does not answer, before it is a SANDBOX_ERROR.
        """
        self._patience_s = patience_s
        self._client = httpx.Client(base_url=url, timeout=httpx.Timeout(patience_s, connect=5.0))

    def run(
        self,
        source: str,
        *,
        language: str = "python",
        stdin: bytes | str = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> Execution:
        """As `Sandbox.run`. Whatever goes wrong on the way is a SANDBOX_ERROR.

        Raises: ValueError with the service's words for input that it does not take.
        """
        stdin = stdin.encode() if isinstance(stdin, str) else bytes(stdin)
        body = {
            "source": source,
            "language": language,
            "stdin": base64.b64encode(stdin).decode(),
            "files": {name: base64.b64encode(data).decode() for name, data in (files or {}).items()},
            "limits": asdict(limits) if limits else {},
        }
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                answer = self._client.post("/run", json=body)
                problem, wait_s = f"{answer.status_code} {answer.text[:300]}", _retry_after(answer)
            except httpx.HTTPError as error:
                answer, problem, wait_s = None, f"{type(error).__name__}: {error}", 1.0
            if answer is not None and answer.status_code == 200:
                return from_json(answer.json())
            if answer is not None and 400 <= answer.status_code < 500 and answer.status_code != 429:
                raise ValueError(f"the sandbox at {self._client.base_url} refuses the run: {problem}")
            if time.monotonic() + wait_s > deadline:
                return Execution(status=Status.SANDBOX_ERROR, stderr=f"the sandbox at {self._client.base_url}: {problem}".encode())
            time.sleep(wait_s)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _retry_after(answer: httpx.Response) -> float:
    value = answer.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 1.0


def from_json(data: dict[str, Any]) -> Execution:
    """The inverse of the service's `to_json`."""
    bodies = {name: base64.b64decode(data[name]) for name in ("stdout", "stderr")}
    return Execution(**{**data, **bodies, "status": Status(data["status"])})
