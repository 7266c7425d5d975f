"""Grading programs as a domain: the tests come with the prompt, the runs go to a sandbox."""

import functools
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from tandem.engine.reward.code import extract_code, grade_program
from tandem.engine.reward.code_tests import FunctionTest, Runner, StdioTest
from tandem.engine.reward.execution import Limits
from tandem.engine.reward.languages import LANGUAGES, missing_tools
from tandem.engine.reward.remote import RemoteSandbox
from tandem.engine.reward.sandbox import Sandbox
from tandem.engine.types import Prompt, Verdict

# Programs at a time on a sandbox service, which says by itself when it has enough.
NUM_REMOTE_RUNS = 32


class ClosableRunner(Runner, Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTests:
    """What a prompt's `grading` says."""

    tests: tuple[StdioTest | FunctionTest, ...]
    language: str = "python"
    limits: Limits | None = None


@functools.lru_cache(maxsize=128)  # as many prompts as are likely to be graded at a time
def read_code_tests(grading: str) -> CodeTests:
    """`{"tests": [{"stdin", "expected", "float_tolerance"?} | {"code", "entry_point", "prompt"?}, …], "language"?, "limits"?}`.

    `tests` may be the path of a JSON file with the list, for tests too large to travel with every group; like every path in a
    configuration it counts from the folder in which the run is started. `limits` holds fields of `Limits`.

    Raises: ValueError naming the field.
    """
    spec = json.loads(grading) if grading else {}
    if unknown := set(spec) - {"tests", "language", "limits"}:
        raise ValueError(f"grading has no field {', '.join(sorted(unknown))}; it has tests, language and limits")
    tests = spec.get("tests")
    if isinstance(tests, str):
        try:
            tests = json.loads(Path(tests).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"grading.tests names the file {spec['tests']}, which cannot be read as JSON: {error}") from error
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"grading.tests is {tests!r:.80}; it must be a list of at least one test, or the path of a JSON file with one")
    language = spec.get("language", "python")
    if language not in LANGUAGES:
        raise ValueError(f"grading.language is {language!r}; it must be one of {', '.join(LANGUAGES)}")
    read = tuple(_read_test(test, number) for number, test in enumerate(tests, start=1))
    if language != "python" and any(isinstance(test, FunctionTest) for test in read):
        raise ValueError(f"grading.language is {language!r}; tests with an entry_point are Python")
    return CodeTests(tests=read, language=language, limits=_read_limits(spec.get("limits")))


class CodeGrader:
    """Runs programs on the hidden tests of their prompts, several at a time.

    Many responses to one prompt are the same program. One that asks for what waits or runs already (the same program, tests and limits)
    gets that run's verdict; one that comes after its end gets a run of its own. So a program that behaves differently from run to run
    still has the expected reward that it deserves, and a lucky verdict is never kept: it counts for the responses that asked for it
    together, and the next to write that program is judged anew. What sharing takes from such a program is the averaging over its copies.
    """

    def __init__(self, sandbox: ClosableRunner, *, num_workers: int) -> None:
        self._sandbox = sandbox
        self._running: dict[tuple[str, str], Future[Verdict]] = {}  # by program and grading; entries leave it on the threads below
        # Threads, for they only wait: a run ends by the sandbox's limit of wall time.
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="code-grader")

    @classmethod
    def open(cls, url: str | None, *, num_workers: int) -> Self:
        """With the sandbox service at `url`, or a sandbox of its own with so many workers. Raises: as `Sandbox` and `RemoteSandbox`."""
        if url is not None:
            return cls(RemoteSandbox(url), num_workers=NUM_REMOTE_RUNS)
        return cls(Sandbox(num_workers=num_workers), num_workers=num_workers)

    def check(self, prompt: Prompt) -> None:
        spec = read_code_tests(prompt.grading)
        if isinstance(self._sandbox, Sandbox) and (missing := missing_tools(spec.language)):
            raise ValueError(f"{spec.language} needs {', '.join(missing)}, which this machine lacks; install it, or set reward.sandbox_url")

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Future[Verdict]:
        """A response that was cut may still hold a whole program."""
        spec, program = read_code_tests(prompt.grading), extract_code(text)
        key = program, prompt.grading
        verdict = self._running.get(key)
        if verdict is None:
            verdict = self._threads.submit(grade_program, program, spec.tests, self._sandbox, language=spec.language, limits=spec.limits)
            self._running[key] = verdict
            verdict.add_done_callback(lambda _: self._running.pop(key))
        return verdict

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()


def _read_test(test: Any, number: int) -> StdioTest | FunctionTest:
    where = f"test {number} of grading.tests"
    if not isinstance(test, dict):
        raise ValueError(f"{where} is {test!r:.80}; it must be a JSON object")
    kind, texts = (FunctionTest, ("code", "entry_point", "prompt")) if "entry_point" in test else (StdioTest, ("stdin", "expected"))
    numbers = ("float_tolerance",) if kind is StdioTest else ()
    if unknown := set(test) - {*texts, *numbers}:
        raise ValueError(f"{where} has no field {', '.join(sorted(unknown))}; it has {', '.join((*texts, *numbers))}")
    for name in texts:
        if not isinstance(test.get(name, "" if name == "prompt" else None), str):
            raise ValueError(f"{where}: {name} is {test.get(name)!r:.80}; it must be text")
    tolerance = test.get("float_tolerance")
    if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0):
        raise ValueError(f"{where}: float_tolerance is {tolerance!r:.80}; it must be a number that is not negative")
    return kind(**test)


def _read_limits(limits: Any) -> Limits | None:
    if limits is None:
        return None
    try:
        return Limits(**limits)
    except TypeError as error:
        raise ValueError(f"grading.limits is {limits!r:.80}; it must hold numbers under names of limits: {error}") from error
