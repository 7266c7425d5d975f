"""Grading mathematics: which answer is taken, and when it equals the reference."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.engine.reward.extract import MAX_ANSWER_CHARS, MAX_RESPONSE_CHARS, extract_answer
from tandem.engine.reward.math import DEADLINE_S, POOL, WORKER_BYTES, grade_math, submit_math
from tandem.engine.reward.symbolic import load
from tandem.engine.reward.workers import WorkerPool
from tandem.engine.types import Verdict
from tests.reward.math_cases import CASES, Case
from tests.reward.math_hacks import RIGHT, WRONG, pairs

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and then \boxed{18}", "18"),
        (r"\boxed{\frac{1}{2}} but the answer is 3", r"\frac{1}{2}"),
        (r"\boxed{7} \boxed{8", "7"),  # the last one whose braces close
        ("12 + 6\n#### 18", "18"),
        ("The answer is 18. I checked 3 times.", "18"),
        ("The answer is: 3.5.", "3.5"),
        ("so **answer is $18**", "$18"),
        ("first 3, then 1,234.", "1,234"),
        ("정답은 18입니다.", "18"),
        ("答案是18。因为9+9", "18"),
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


@pytest.mark.parametrize("category", CASES)
def test_worked_cases(category: str) -> None:
    verdicts = [(case, grade_math(case.response, case.reference)) for case in CASES[category]]
    assert [(case, verdict) for case, verdict in verdicts if (verdict.correct, verdict.graded) != (case.correct, True)] == []
    assert all(verdict.correct or verdict.reason for _, verdict in verdicts)


@pytest.mark.parametrize("category", WRONG)
def test_what_only_looks_right_is_wrong(category: str) -> None:
    verdicts = [(pair, grade_math(rf"\boxed{{{pair[0]}}}", pair[1])) for pair in pairs(WRONG[category])]
    assert [(pair, verdict) for pair, verdict in verdicts if verdict.correct or not verdict.graded] == []


@pytest.mark.parametrize("category", RIGHT)
def test_what_looks_like_it_and_is_right_stays_right(category: str) -> None:
    verdicts = [(pair, grade_math(rf"\boxed{{{pair[0]}}}", pair[1])) for pair in pairs(RIGHT[category])]
    assert [(pair, verdict) for pair, verdict in verdicts if not verdict.correct] == []


@pytest.mark.parametrize(
    ("question", "answer", "reference", "correct"),
    [
        ("What is 2 + 3 * 4?", "2+3*4", "14", False),
        ("What is 2 + 3 * 4?", "14", "14", True),
        ("Compute $7!$.", "7!", "5040", False),
        ("Compute $2^{10}$.", "2^{10}", "1024", False),
        (r"Simplify $\sqrt{8}$.", r"\sqrt{8}", r"2\sqrt{2}", False),
        (r"Simplify $\sqrt{8}$.", r"2\sqrt2", r"2\sqrt{2}", True),
        ("Expand $(x+1)^2$.", "(x+1)^2", "x^2+2x+1", False),
        ("Expand $(x+1)^2$.", "1+2x+x^2", "x^2+2x+1", True),
        ("Which is larger, $3^5$ or $5^3$?", "3^5", "3^5", True),  # written as the reference is
        ("Find $m+n$.", "m+n=5", "5", True),
        ("", "2^{10}", "1024", True),
    ],
)
def test_a_computation_copied_from_the_question_is_no_answer(question: str, answer: str, reference: str, correct: bool) -> None:
    verdict = grade_math(rf"\boxed{{{answer}}}", reference, question=question)
    assert (verdict.correct, verdict.graded) == (correct, True)


def test_there_are_cases_of_each_kind_right_and_wrong() -> None:
    assert sum(len(cases) for cases in CASES.values()) >= 150
    assert all({case.correct for case in cases} == {True, False} for cases in CASES.values())


def other_digit(text: str) -> str:
    at = max(i for i, character in enumerate(text) if character.isdecimal())
    return text[:at] + str((int(text[at]) + 3) % 10) + text[at + 1 :]


@pytest.mark.parametrize("category", CASES)
def test_a_right_answer_is_wrong_once_a_digit_of_the_reference_changes(category: str) -> None:
    right = [case for case in CASES[category] if case.correct and any(character.isdecimal() for character in case.reference)]
    perturbed = [Case(case.response, other_digit(case.reference), False) for case in right]
    assert [case for case in perturbed if grade_math(case.response, case.reference).correct] == []


@pytest.mark.parametrize(
    ("answer", "perturbed"),
    [
        ("(1,2)", ["(2,1)", "[1,2)", "(1,2]", "(-1,2)", "(1,3)", "(1,2,3)", "1"]),
        (r"[-3,\infty)", [r"(-3,\infty)", r"(-\infty,-3]", r"[3,\infty)", r"[-3,5)", "-3"]),
        (r"\{1,\sqrt{2},5\}", [r"\{1,\sqrt{2}\}", r"\{1,\sqrt{3},5\}", r"\{1,-\sqrt{2},5\}", r"\{1,\sqrt{2},5,6\}", r"\sqrt{2}"]),
        (r"(-\infty,-1)\cup(2,\infty)", [r"(-\infty,-1)", r"(-\infty,1)\cup(2,\infty)", r"(-\infty,-1]\cup(2,\infty)", "(-1,2)"]),
        (
            r"\frac{3\sqrt{5}}{7}",
            [r"\frac{3\sqrt{5}}{8}", r"-\frac{3\sqrt{5}}{7}", r"\frac{7}{3\sqrt{5}}", r"\frac{3\sqrt{6}}{7}", "0.958"],
        ),
        (r"x^2-3x+2", ["x^2+3x+2", "x^2-3x-2", "x^3-3x+2", "x^2-3x", "y^2-3y+2"]),
        (
            r"\begin{pmatrix}1&-2\\0&3\end{pmatrix}",
            [r"\begin{pmatrix}1&2\\0&3\end{pmatrix}", r"\begin{pmatrix}1&0\\-2&3\end{pmatrix}", "3"],
        ),
        ("x=1, y=-2", ["x=-2, y=1", "x=1, y=2", "x=1", "1"]),
    ],
)
def test_perturbed_structures_are_wrong(answer: str, perturbed: list[str]) -> None:
    assert grade_math(rf"\boxed{{{answer}}}", answer).correct
    for other in perturbed:
        for response, reference in ((other, answer), (answer, other)):
            verdict = grade_math(rf"\boxed{{{response}}}", reference)
            assert (verdict.correct, verdict.graded) == (False, True), (response, reference)


def gold(name: str) -> list[tuple[str, str]]:
    """Solutions and their answers."""
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if name.startswith("gsm8k"):
        return [(record["answer"], record["answer"].rsplit("####", 1)[1].strip()) for record in records]
    if name == "aime24":
        return [(record["solution"], record["answer"]) for record in records]
    # Answers without solutions, as floats: 27.0
    return [(rf"Therefore it is $\boxed{{{record['answer']:g}}}$.", str(record["answer"])) for record in records]


@pytest.mark.parametrize(("name", "num"), [("aime24", 30), ("amc23", 40), ("gsm8k_test", 1319), ("gsm8k_train", 7473)])
def test_gold_solutions_are_right(name: str, num: int) -> None:
    solutions = gold(name)
    assert len(solutions) == num
    assert [solution for solution, answer in solutions if not grade_math(solution, answer).correct] == []


PERTURBATIONS: list[Callable[[str], str]] = [
    lambda answer: f"{float(answer) + 1:g}" if "." in answer else str(int(answer) + 1),
    lambda answer: f"{float(answer) - 1:g}" if "." in answer else str(int(answer) - 1),
    lambda answer: f"-{answer}" if float(answer) else "1",
    lambda answer: f"{answer}0" if "." not in answer and float(answer) else "10",
    other_digit,
    lambda answer: rf"\frac{{{int(float(answer))}}}{{7}}" if float(answer) else r"\frac{1}{7}",
    lambda answer: f"{int(float(answer))}.25",
]


@pytest.mark.parametrize("name", ["aime24", "amc23", "gsm8k_test"])
def test_perturbed_gold_answers_are_wrong(name: str) -> None:
    forms = (r"so it is \boxed{%s}", "#### %s", "The answer is $%s$.")
    accepted = []
    for i, (_, reference) in enumerate(gold(name)):
        answer = reference.replace(",", "").removesuffix(".0")
        for j, perturb in enumerate(PERTURBATIONS):
            verdict = grade_math(forms[(i + j) % 3] % perturb(answer), reference)
            if verdict.correct or not verdict.graded:
                accepted.append((reference, verdict))
    assert accepted == []


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """The imports of the first worker are no part of what a test bounds."""
    POOL.run(len, "", deadline_s=120)


def seconds_of(call: Callable[[], Verdict], clock: Callable[[], float] = time.monotonic) -> tuple[Verdict, float]:
    start = clock()
    return call(), clock() - start


MILLION = 10**6
HOSTILE = {
    "braces": "{" * MILLION + "}" * MILLION,
    "a box of braces": r"\boxed{" + "{" * MILLION + "5" + "}" * MILLION + "}",
    "a small box of braces": r"\boxed{" + "{" * 300 + "5" + "}" * 300 + "}",
    "parentheses": r"\boxed{" + "(" * 400 + "5" + ")" * 400 + "}",
    "boxes": r"\boxed{" * (MILLION // 7),
    "text": "Let us think step by step. " * (MILLION // 27),
    "digits": "1" * MILLION,
    "a sum": "answer is " + "1+" * 100_000,
    "fractions in fractions": r"\boxed{" + r"\frac{1}{" * 90 + "2" + "}" * 90 + "}",
    "spaces": r"\boxed{" + " " * MILLION + "5 x" + " " * MILLION + "}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_ends_in_time_and_is_not_graded(name: str) -> None:
    verdict, seconds = seconds_of(lambda: grade_math(HOSTILE[name], "7"))
    assert (verdict.correct, verdict.graded) == (False, False)
    assert verdict.reason
    assert len(verdict.answer or "") <= MAX_ANSWER_CHARS
    assert seconds < 2 * DEADLINE_S


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9**9",
        "9^9^9^9",
        "9^{9^{9^9}}",
        "10^{10^{10}}",
        "10^{99999999999}",
        "2^{10^{10}} - 1",
        "170!!",
        "(99999)!",
        "((100!)!)!",
        "1e99999999",
        "(9^{999})^{999}",
        "9^{2*9^9}",
        r"\binom{10^{9}}{5 \cdot 10^{8}}",
        r"\sqrt{2}^{10^{12}}",
        r"e^{e^{e^{e^{9}}}}",
        r"\{1, 9^{9^{9^9}}\}",
    ],
)
def test_what_would_not_fit_into_memory_is_never_computed(answer: str) -> None:
    reference = r"\{1, 2\}" if "," in answer else "5"
    verdict = grade_math(rf"\boxed{{{answer}}}", reference)
    assert (verdict.correct, verdict.graded) == (False, False)
    assert "TooCostly" in verdict.reason


@pytest.mark.parametrize(
    "answer", [r"\sum_{k=1}^{10^{9}} \frac{1}{k^2+k^3}", r"\prod_{p=1}^{99999999} (1+\sin p)", r"\int_0^1 x^x \sin(x^x) e^{x^x} dx"]
)
def test_a_comparison_without_end_is_stopped_and_not_graded(answer: str) -> None:
    with WorkerPool(1, deadline_s=1.0, max_bytes=WORKER_BYTES, initialise=load) as pool:
        pool.run(len, "", deadline_s=120)
        # The reference has the operation too: the answer is not refused unread
        reference = r"\sum_{k=1}^{2} k" if "sum" in answer else r"\prod_{k=1}^{2} k" if "prod" in answer else r"\int_0^1 x dx"
        verdict = grade_math(rf"\boxed{{{answer}}}", reference, pool=pool)
    assert not verdict.correct
    assert verdict.graded or "did not end within 1 s" in verdict.reason or "out of memory" in verdict.reason


@pytest.mark.parametrize(
    "piece",
    [r"\boxed{", "answer is \n", " ", "\n", "1,", "answer", "####\n", "1.", "-", "$", r"\[", r"\(", "答案", "{}", "^", r"\frac", "1 1/"],
)
def test_no_search_takes_more_than_linear_time(piece: str) -> None:
    seconds = [seconds_of(lambda n=n: grade_math("answer is" + piece * n, "5"), time.thread_time)[1] for n in (2_000, 20_000)]
    assert seconds[1] < max(1.0, 30 * seconds[0])
    for text in (rf"\boxed{{{(piece * 400)[:900]}}}", (piece * 400)[:900]):
        assert seconds_of(lambda text=text: grade_math(text, "5"), time.thread_time)[1] < 1.0


def test_the_end_of_an_endless_text_is_graded_when_an_answer_stands_there() -> None:
    padding = "x" * MAX_RESPONSE_CHARS
    assert grade_math(padding + r"\boxed{5}", "5").correct
    assert grade_math(padding + r"\boxed{6}", "5") == Verdict(correct=False, answer="6", reason="the answer is 5")
    assert grade_math(r"\boxed{5}" + padding, "5").graded is False


def test_a_reference_that_cannot_be_read_is_not_graded() -> None:
    for reference in ("", "  ", r"\frac{", r"\sqrt[3", "x" * 2000):
        verdict = grade_math(r"\boxed{\sqrt{2}}", reference)
        assert (verdict.correct, verdict.graded) == (False, False), reference
        assert verdict.reason


def test_malformed_answers_are_wrong() -> None:
    for answer in (r"\frac{1}", r"\sqrt{", "1 +", "= =", "((", r"\begin{pmatrix} 1 & 2", r"\unknown{5}{6}"):
        verdict = grade_math(f"answer is ${answer}$", r"\sqrt{2}")
        assert (verdict.correct, verdict.graded) == (False, True), answer


def test_plain_numbers_need_no_worker() -> None:
    with WorkerPool(1, deadline_s=1.0, initialise=load) as pool:
        for response, reference in ((r"\boxed{18}", "18"), ("#### 1,080", "1080"), (r"\boxed{\frac{1}{2}}", "0.5"), ("(1,2)", "(1,3)")):
            assert submit_math(response, reference, pool=pool).done()
        assert pool.worker_pids == []
        assert not submit_math(r"\boxed{\sqrt{8}}", r"2\sqrt{2}", pool=pool).done()


def test_grading_works_outside_the_main_thread_and_side_by_side() -> None:
    futures = [submit_math(rf"\boxed{{\sqrt{{{i * i * 2}}}}}", rf"{i}\sqrt{{2}}") for i in range(2, 30)]
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(grade_math(r"\boxed{2\sqrt{2}}", r"\sqrt{8}")))
    thread.start()
    thread.join(60)
    assert [verdict.correct for verdict in verdicts] == [True]
    assert all(future.result(60).correct for future in futures)


def test_a_grader_without_workers_grades_what_it_can() -> None:
    pool = WorkerPool(1, deadline_s=1.0)
    pool.close()
    assert grade_math(r"\boxed{5}", "5", pool=pool).correct
    verdict = grade_math(r"\boxed{\sqrt{8}}", r"2\sqrt{2}", pool=pool)
    assert (verdict.correct, verdict.graded, verdict.reason) == (False, False, "the worker pool is closed")
