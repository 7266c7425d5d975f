"""The toy task's answer line."""

import pytest

from tandem.engine.reward.arithmetic import grade_arithmetic


@pytest.mark.parametrize(
    ("text", "correct", "answer"),
    [
        ("A:18.", True, "18"),
        ("8*4=2;2-9=23;A:18.", True, "18"),
        ("A:3.A:18.", True, "18"),  # the last answer counts
        ("A:18.A:3.", False, "3"),
        ("A:18", False, "18"),
        ("A:18. ", False, "18"),
        ("A:18.;", False, "18"),
        ("A:018.", False, "018"),
        ("A: 18.", False, " 18"),
        ("A:.", False, ""),
        ("18.", False, None),
        ("", False, None),
    ],
)
def test_only_the_exact_answer_line_at_the_end_is_right(text: str, correct: bool, answer: str | None) -> None:
    verdict = grade_arithmetic(text, "18")
    assert (verdict.correct, verdict.answer, verdict.graded) == (correct, answer, True)
    assert correct or verdict.reason
