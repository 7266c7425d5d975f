"""Which tests are valid, and which problems are kept, by what accepted programs do (Kimi k1.5, arXiv:2501.12599, 2.3.5).

An input is a valid test when at least 7 of 10 submissions end well and print the same, and that is something; it is then what is
expected. A problem is kept when enough of its tests are valid and at least 9 of 10 submissions pass all of them.

An input is disputed when at least 7 submissions end well and yet no 7 of them agree. A problem with too few valid tests, of whose
invalid ones at least half are disputed, has several right outputs: it needs a special judge. So does one whose statement says so.
"""

import enum
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.engine.reward.code_tests import Runner
from tandem.engine.reward.execution import Limits, Status
from tandem.engine.reward.generator import MAX_TEST_CHARS, SandboxFailedError

NUM_SUBMISSIONS = 10
MIN_AGREEING = 7
MIN_PASSING = 9
MAX_TIME_LIMITS = 3  # a submission that was stopped so often counts as failing the tests that are left: each would cost its limit

_SPECIAL_JUDGE = re.compile(
    r"special\s+(?:judge|checker)"
    r"|\b(?:print|output|report|find|return|choose)\s+any\b"
    r"|\bany\s+(?:one\s+)?of\s+(?:them|these|those)\b"
    r"|\bany\s+(?:valid|correct|possible|suitable|such)\s+(?:answer|solution|output|sequence|order|ordering|way|one)"
    r"|\bin\s+any\s+order\b|\bin\s+arbitrary\s+order\b"
    r"|\b(?:absolute|relative)\s+(?:or\s+(?:absolute|relative)\s+)?error\b"
    r"|\binteractive\s+(?:problem|task)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A program that was accepted as right."""

    source: str
    language: str = "python"


class Fate(enum.StrEnum):
    """What became of a problem."""

    KEPT = "kept"
    SPECIAL_JUDGE = "special judge"
    TOO_FEW_SUBMISSIONS = "too few submissions"
    NO_GENERATOR = "no generator"
    TOO_FEW_TESTS = "too few valid tests"
    SUBMISSIONS_FAIL = "submissions fail valid tests"


@dataclass(kw_only=True, slots=True)
class Checked:
    """What the submissions made of the inputs."""

    fate: Fate = Fate.KEPT
    reason: str = ""
    tests: list[dict[str, str]] = field(default_factory=list)  # valid ones, in the form of `reward/code.py`
    num_invalid: int = 0
    num_disputed: int = 0  # of the invalid ones
    failing: set[int] = field(default_factory=set)  # submissions that fail a valid test


def special_judge_phrase(statement: str) -> str | None:
    """The words by which a statement allows several outputs. None: it does not say so."""
    found = _SPECIAL_JUDGE.search(statement)
    return found.group() if found is not None else None


def check_inputs(
    inputs: Sequence[str], submissions: Sequence[Submission], sandbox: Runner, *, limits: Limits | None, min_valid: int
) -> Checked:
    """Run every submission on every input, until it is certain that the problem is left out.

    Raises: SandboxFailedError.
    """
    checked = Checked()
    num_time_limits = Counter[int]()
    for number, stdin in enumerate(inputs):
        outputs: dict[int, str] = {}  # of those that ended well
        for index, submission in enumerate(submissions):
            if num_time_limits[index] >= MAX_TIME_LIMITS:
                continue
            done = sandbox.run(submission.source, language=submission.language, stdin=stdin, limits=limits)
            if done.status is Status.SANDBOX_ERROR:
                raise SandboxFailedError(done.stderr.decode(errors="replace"))
            num_time_limits[index] += done.status is Status.TIME_LIMIT
            if done.status is Status.OK:
                outputs[index] = done.stdout.decode(errors="replace")
        _judge_input(stdin, outputs, checked, len(submissions))
        num_left = len(inputs) - number - 1
        if len(checked.tests) + num_left < min_valid:
            break
        if len(submissions) - len(checked.failing) < MIN_PASSING and checked.num_disputed == 0:
            break
    _decide(checked, len(submissions), min_valid)
    return checked


def _judge_input(stdin: str, outputs: dict[int, str], checked: Checked, num_submissions: int) -> None:
    words = {index: " ".join(text.split()) for index, text in outputs.items()}
    common, num_agreeing = Counter(words.values()).most_common(1)[0] if words else ("", 0)
    if num_agreeing >= MIN_AGREEING and 0 < len(common) <= MAX_TEST_CHARS:
        agreeing = {index for index, text in words.items() if text == common}
        checked.failing |= set(range(num_submissions)) - agreeing
        checked.tests.append({"stdin": stdin, "expected": outputs[min(agreeing)]})
        return
    checked.num_invalid += 1
    checked.num_disputed += len(words) >= MIN_AGREEING and num_agreeing < MIN_AGREEING


def _decide(checked: Checked, num_submissions: int, min_valid: int) -> None:
    num_passing = num_submissions - len(checked.failing)
    found = f"{len(checked.tests)} tests are valid, {checked.num_invalid} are not"
    if num_passing < MIN_PASSING and (checked.num_disputed == 0 or len(checked.tests) >= min_valid):
        checked.fate = Fate.SUBMISSIONS_FAIL
        checked.reason = f"{num_passing} of {num_submissions} submissions pass the valid tests; {MIN_PASSING} must"
    elif len(checked.tests) < min_valid and 0 < checked.num_invalid <= 2 * checked.num_disputed:
        checked.fate = Fate.SPECIAL_JUDGE
        checked.reason = f"{found}, and in {checked.num_disputed} of these the submissions end well but disagree"
    elif len(checked.tests) < min_valid:
        checked.fate = Fate.TOO_FEW_TESTS
        checked.reason = f"{found}; {min_valid} valid ones are needed"
