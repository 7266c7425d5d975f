"""Grading mathematics: which answer is taken, and when it equals the reference."""

import threading

import pytest

from tandem.engine.reward.math import MAX_ANSWER_CHARS, extract_answer, grade_math
from tandem.engine.types import Verdict


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and then \boxed{18}", "18"),
        (r"\boxed{\frac{1}{2}} but the answer is 3", r"\frac{1}{2}"),
        (r"\boxed{7} \boxed{8", "7"),  # the last one whose braces close
        ("12 + 6\n#### 18", "18"),
        ("#### 1\n#### 2\n", "2"),
        ("The answer is 18. I checked 3 times.", "18"),
        ("The answer is: 3.5.", "3.5"),
        ("Final Answer: 18 dollars per day", "18"),
        ("so **answer is $18**", "$18"),
        ("first 3, then 1,234.", "1,234"),
        ("it is -0.5", "-0.5"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_a_cut_response_needs_a_marked_answer() -> None:
    assert extract_answer("3 + 4 = 7", is_complete=False) is None
    assert extract_answer(r"\boxed{7} so", is_complete=False) == "7"
    assert not grade_math("3 + 4 = 7", "7", is_complete=False).correct


@pytest.mark.parametrize(
    ("answer", "reference", "correct"),
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("1,234", "1234", True),
        (r"\$18", "18", True),
        (r"\frac{3}{4}", "0.75", True),
        (r"\dfrac{3}{4}", "3/4", True),
        ("-3", "3", False),
        ("0.333", "1/3", False),
        ("1/0", "5", False),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("x^2+1", "1+x^2", True),
        ("x^2+y^2", "y^2 + x^2", True),
        ("2^{10}", "1024", True),
        ("x=5", "5", True),
        (r"\{1, 2\}", r"\{2,1\}", True),
        ("(1,2)", "(2,1)", False),
        (r"\text{Monday}", "monday", True),
        ("Tuesday", "Monday", False),
        ("banana", "18", False),
        ("", "5", False),
    ],
)
def test_answers_are_compared_by_value(answer: str, reference: str, correct: bool) -> None:
    verdict = grade_math(rf"so \boxed{{{answer}}}", reference)
    assert (verdict.correct, verdict.graded) == (correct, True)


def test_gsm8k_and_amc_references_grade_plain_responses() -> None:
    assert grade_math("She makes $18 every day.", "18").correct
    assert grade_math("#### 27.0", "27").correct
    assert not grade_math("#### 26", "27").correct


@pytest.mark.parametrize(
    "answer", ["9^{9^{9^9}}", "10^{99999999999}", "170!!", "(99999)!", "1e99999999", "2**99999999", "(9^{999})^{999}", "9^{2*9^9}"]
)
def test_what_would_not_fit_into_memory_is_never_evaluated(answer: str) -> None:
    verdict = grade_math(rf"\boxed{{{answer}}}", "5")
    assert (verdict.correct, verdict.graded) == (False, False)
    assert "too costly" in verdict.reason


def test_an_endless_answer_is_wrong_and_cut() -> None:
    verdict = grade_math("answer is " + "1+" * 100_000, "5")
    assert not verdict.correct
    assert verdict.graded
    assert len(verdict.answer or "") == MAX_ANSWER_CHARS
    for piece in (r"\boxed{", "answer is \n", " ", "\n", "1,", "answer", "####\n", "1.", "-"):
        grade_math("answer is" + piece * 20_000, "5")  # no search takes more than linear time, or this runs into the time limit


def test_grading_works_outside_the_main_thread() -> None:
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(grade_math(r"\boxed{2\sqrt{2}}", r"\sqrt{8}")))
    thread.start()
    thread.join(60)
    assert [verdict.correct for verdict in verdicts] == [True]
