"""Programs as a domain: hidden tests come with the prompt, and the judge has the sandbox run them in the background."""

import contextlib
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.reward.code_grader import CodeGrader, read_code_tests
from tandem.engine.reward.code_tests import FunctionTest, StdioTest
from tandem.engine.reward.execution import Execution, Limits, Status
from tandem.engine.types import Prompt, Verdict
from tests.reward.sandboxes import SYSTEM_PYTHON, sandbox_or_skip
from tests.reward.test_judge import group_of, judge_with

STDIO = [{"stdin": "1 2", "expected": "3"}, {"stdin": "5 5", "expected": "10"}]
RIGHT = "```python\nprint(sum(map(int, input().split())))\n```"
FUNCTION = [{"code": "def check(candidate):\n    assert candidate(2) == 4", "entry_point": "double", "prompt": "def double(x):\n"}]


def prompt_of(**grading: Any) -> Prompt:
    return Prompt(id="p", text="", token_ids=(1,), answer="", domain="code", grading=json.dumps(grading))


def test_tests_of_both_kinds_are_read_also_from_a_file(tmp_path: Path) -> None:
    read = read_code_tests(json.dumps({"tests": [*STDIO, *FUNCTION], "limits": {"wall_s": 2}}))
    assert read.tests[1] == StdioTest(stdin="5 5", expected="10")
    assert isinstance(read.tests[2], FunctionTest)
    assert read.limits == Limits(wall_s=2)
    (tmp_path / "tests.json").write_text(json.dumps(STDIO))
    assert read_code_tests(json.dumps({"tests": str(tmp_path / "tests.json")})).tests == read.tests[:2]


@pytest.mark.parametrize(
    ("grading", "problem"),
    [
        ({}, "grading.tests is None; it must be a list"),
        ({"tests": []}, "at least one test"),
        ({"tests": "missing.json"}, "names the file missing.json, which cannot be read"),
        ({"tests": STDIO, "time": 1}, "grading has no field time"),
        ({"tests": STDIO, "language": "cobol"}, "grading.language is 'cobol'"),
        ({"tests": FUNCTION, "language": "cpp"}, "tests with an entry_point are Python"),
        ({"tests": [STDIO[0], {"stdin": "1"}]}, "test 2 of grading.tests: expected is None; it must be text"),
        ({"tests": [{"stdin": "1", "expected": "1", "float_tolerance": -1}]}, "float_tolerance is -1"),
        ({"tests": [{"input": "1"}]}, "test 1 of grading.tests has no field input"),
        ({"tests": STDIO, "limits": {"wall_s": -1}}, "limits.wall_s is -1"),
        ({"tests": STDIO, "limits": {"walls": 1}}, "grading.limits is"),
        ({"tests": STDIO, "limits": 5}, "grading.limits is 5"),
    ],
)
def test_what_a_prompt_lacks_is_named(grading: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_code_tests(json.dumps(grading))


def test_the_judge_grades_programs_in_the_sandbox_in_the_background() -> None:
    texts = [RIGHT, "print(3)", "I do not know", "```python\nwhile True: pass\n```"]
    with sandbox_or_skip(python=SYSTEM_PYTHON) as sandbox, judge_with() as judge:
        judge._graders["code"] = CodeGrader(sandbox, num_workers=1)
        grading = json.dumps({"tests": STDIO, "limits": {"wall_s": 1, "cpu_s": 1}})
        judge.check([group_of("x", domain="code", grading=grading).prompt])
        judge.submit(group_of(*texts, domain="code", grading=grading))
        (scored,) = judge.finish()
    assert [(verdict.correct, verdict.graded) for verdict in scored.verdicts] == [(True, True)] + [(False, True)] * 3
    reasons = [verdict.reason for verdict in scored.verdicts]
    assert "test 2 of 2: wrong answer" in reasons[1]
    assert "runtime error" in reasons[2]
    assert "time limit" in reasons[3]


class HeldRuns:
    """Every run waits until told; then programs that begin with "right" print 3, others 0."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.may_end = threading.Event()

    def run(self, source: str, **options: Any) -> Execution:
        self.sources.append(source)
        assert self.may_end.wait(60)
        return Execution(status=Status.OK, stdout=b"3" if source.startswith("right") else b"0")

    def close(self) -> None:
        pass


def test_the_same_program_is_run_once_for_all_who_wait_for_it() -> None:
    sandbox, one, other = HeldRuns(), prompt_of(tests=STDIO[:1]), prompt_of(tests=STDIO[:1], limits={"wall_s": 2})
    with contextlib.closing(CodeGrader(sandbox, num_workers=1)) as grader:
        texts = ["```\nright\n```", "right\n", "wrong", "Well:\n```python\nright\n```\nDone.", "wrong", "right"]
        done = [grader.grade(text, one, is_complete=True) for text in texts] + [grader.grade("right", other, is_complete=True)]
        sandbox.may_end.set()
        assert [future.result(60).correct for future in done] == [True, True, False, True, False, True, True]
    assert sandbox.sources == ["right\n", "wrong", "right", "right"]  # other limits and other text are other runs


def test_a_verdict_is_not_kept_for_those_who_come_later() -> None:
    """A program that passes now and then must not live off one lucky run; nor does a fault of the sandbox stick to a program."""
    sandbox, prompt = HeldRuns(), prompt_of(tests=STDIO[:1])
    sandbox.may_end.set()
    with contextlib.closing(CodeGrader(sandbox, num_workers=2)) as grader:
        for _ in range(3):
            assert grader.grade("right", prompt, is_complete=True).result(60).correct
            deadline = time.monotonic() + 60
            while grader._running and time.monotonic() < deadline:  # waiters wake a moment before a run's end is noted
                time.sleep(0.001)
    assert sandbox.sources == ["right"] * 3


class DownSandbox:
    """A service that is down."""

    closed = False

    def run(self, source: str, **options: Any) -> Execution:
        return Execution(status=Status.SANDBOX_ERROR, stderr=b"connection refused")

    def close(self) -> None:
        self.closed = True


def test_a_sandbox_that_is_down_leaves_programs_ungraded_and_closes_with_the_judge() -> None:
    sandbox = DownSandbox()
    with contextlib.closing(CodeGrader(sandbox, num_workers=2)) as grader:
        done: Future[Verdict] = grader.grade(RIGHT, prompt_of(tests=STDIO), is_complete=True)
        verdict = done.result(60)
    assert (verdict.correct, verdict.graded) == (False, False)
    assert "connection refused" in verdict.reason
    assert sandbox.closed
