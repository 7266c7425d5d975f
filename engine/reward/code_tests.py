"""Hidden tests of a program, and how one ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tandem.engine.reward.execution import Execution, Limits, Status

MAX_SHOWN_CHARS = 80


class Runner(Protocol):
    """A `Sandbox`, or a `RemoteSandbox`."""

    def run(
        self,
        source: str,
        *,
        language: str = ...,
        stdin: bytes | str = ...,
        files: Mapping[str, bytes] | None = ...,
        limits: Limits | None = ...,
    ) -> Execution: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StdioTest:
    """Given `stdin`, the program prints `expected`."""

    stdin: str
    expected: str
    float_tolerance: float | None = None
    """Absolute or relative difference of two numbers that is none; None: words must be the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionTest:
    """Python statements that define `check(candidate)`, which raises unless `candidate`, the program's function, is right."""

    code: str
    entry_point: str
    """Name of the function."""
    prompt: str = ""
    """Beginning of the program as the model was given it; what it defines, `code` may use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestOutcome:
    """How one test ended; `reason` is empty when passed."""

    __test__ = False  # for pytest, which takes the name for a test's

    status: Status
    reason: str = ""


def failed(done: Execution) -> TestOutcome:
    """Of a run that did not end well: the last line that it wrote about it."""
    words = done.stderr.decode(errors="replace").strip().splitlines()
    where = "the compiler: " if done.compiling else ""
    code = "" if done.exit_code is None else f" (exit status {done.exit_code})"
    said = words[0 if done.compiling else -1] if words else "no message"
    return TestOutcome(status=done.status, reason=f"{where}{shorten(said, 300)}{code}")


def shorten(text: str, limit: int = MAX_SHOWN_CHARS) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
