"""Grading programs: each hidden test is a run in the sandbox, and what is expected never goes there.

A test is either text for stdin with the expected stdout, or Python statements about a function (as HumanEval's `check(candidate)`). The
outputs of the former are compared here. The statements of the latter run in a sandbox too, but never beside the program: see
`reward/function_test.py`.
"""

import math
import re
from collections.abc import Callable, Sequence

from tandem.engine.reward.code_tests import FunctionTest, Runner, StdioTest, TestOutcome, failed, shorten
from tandem.engine.reward.execution import Limits, Status
from tandem.engine.reward.function_test import run_function_test
from tandem.engine.types import Verdict

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\n`]*)$", re.MULTILINE)


def grade_code(
    response_text: str,
    tests: Sequence[StdioTest | FunctionTest],
    sandbox: Runner,
    *,
    language: str = "python",
    limits: Limits | None = None,
) -> Verdict:
    """Run the last code block of a response: `grade_program` of `extract_code`."""
    return grade_program(extract_code(response_text), tests, sandbox, language=language, limits=limits)


def grade_program(
    program: str,
    tests: Sequence[StdioTest | FunctionTest],
    sandbox: Runner,
    *,
    language: str = "python",
    limits: Limits | None = None,
) -> Verdict:
    """Run a program on all tests, up to the first that fails.

    Args:
        limits: Of each test; by default the sandbox's.
    Returns: `reason` names the first failing test, counted from 1, with its status. `graded=False` where the sandbox failed, not the
        program.
    Raises: ValueError without tests, or for a FunctionTest in another language than Python.
    """
    if not tests:
        raise ValueError("there are no tests; a program needs at least one to be graded")
    if language != "python" and any(isinstance(test, FunctionTest) for test in tests):
        raise ValueError(f"a FunctionTest is Python; language is {language!r}")
    if not program.strip():
        return Verdict(correct=False, answer=program, reason="the response holds no program")
    for number, test in enumerate(tests, start=1):
        if isinstance(test, StdioTest):
            outcome = run_stdio_test(program, test, sandbox, language=language, limits=limits)
        else:
            outcome = run_function_test(program, test, sandbox, limits=limits)
        if outcome.status is Status.SANDBOX_ERROR:
            return Verdict(correct=False, answer=program, reason=f"test {number}: {outcome.reason}", graded=False)
        if outcome.status is not Status.OK:
            return Verdict(correct=False, answer=program, reason=f"test {number} of {len(tests)}: {outcome.status}: {outcome.reason}")
    return Verdict(correct=True, answer=program)


def extract_code(response_text: str) -> str:
    """Content of the last fenced block, closed or not; without a fence, all of the text."""
    opened: tuple[str, int] | None = None
    found: str | None = None
    for fence in _FENCE.finditer(response_text):
        marks, info = fence.group(1), fence.group(2).strip()
        if opened is None:
            opened = marks, fence.end() + 1
        elif marks[0] == opened[0][0] and len(marks) >= len(opened[0]) and not info:
            found = response_text[opened[1] : fence.start()]
            opened = None
    if opened is not None:  # the response was cut, or forgot the end
        found = response_text[opened[1] :]
    return response_text if found is None else found


def run_stdio_test(program: str, test: StdioTest, sandbox: Runner, *, language: str, limits: Limits | None) -> TestOutcome:
    done = sandbox.run(program, language=language, stdin=test.stdin, limits=limits)
    if done.status is not Status.OK:
        return failed(done)
    difference = first_difference(done.stdout.decode(errors="replace"), test.expected, test.float_tolerance)
    return TestOutcome(status=Status.OK) if difference is None else TestOutcome(status=Status.WRONG_ANSWER, reason=difference)


def first_difference(output: str, expected: str, float_tolerance: float | None = None) -> str | None:
    """What differs first between the words of two texts; None if nothing does. White space separates words, however much of it."""
    same: Callable[[str, str], bool] = (
        str.__eq__ if float_tolerance is None else lambda found, wanted: _same_number(found, wanted, float_tolerance)
    )
    found_words, wanted_words = output.split(), expected.split()
    for number, (found, wanted) in enumerate(zip(found_words, wanted_words, strict=False), start=1):
        if not same(found, wanted):
            return f"word {number} of the output is {shorten(found)!r}; {shorten(wanted)!r} is expected"
    if len(found_words) != len(wanted_words):
        return f"the output has {len(found_words)} words; {len(wanted_words)} are expected"
    return None


def _same_number(found: str, wanted: str, tolerance: float) -> bool:
    if found == wanted:
        return True
    try:
        left, right = float(found), float(wanted)
    except ValueError:
        return False
    return math.isclose(left, right, rel_tol=tolerance, abs_tol=tolerance)
