"""Short answers: what counts as the same, and which kind of answer a reference asks for."""

import json
from concurrent.futures import Future
from typing import Any

import pytest

from tandem.engine.reward.k12 import K12Grader, infer_kind, read_answer_spec
from tandem.engine.types import Prompt, Verdict


def prompt_of(answer: str, **grading: Any) -> Prompt:
    return Prompt(id="p", text="", token_ids=(1,), answer=answer, domain="k12", grading=json.dumps(grading) if grading else "")


def grade(answer: str, reference: str, *, is_complete: bool = True, **grading: Any) -> Verdict:
    """`answer` is put as a response would end; it is the whole response where it says so itself."""
    text = answer if "\n" in answer else f"Let me think.\nThe answer is {answer}"
    prompt = prompt_of(reference, **grading)
    grader = K12Grader()
    grader.check(prompt)
    verdict = grader.grade(text, prompt, is_complete=is_complete)
    return verdict.result(60) if isinstance(verdict, Future) else verdict


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("18", "numeric"),
        ("3.5 km", "numeric"),
        ("three", "numeric"),
        ("25%", "numeric"),
        ("1,234", "numeric"),
        (r"2\sqrt{3}", "numeric"),
        ("photosynthesis", "exact"),
        ("the Treaty of Versailles", "exact"),
        ("H2O", "exact"),
        ("red, green, blue", "set"),
        ("{1, 2, 3}", "set"),
        ("oxygen and hydrogen", "set"),
        ("(1, 2)", "list"),
        ("[solid, liquid, gas]", "list"),
        ("whale > dog > mouse", "list"),
        ("egg → larva → pupa", "list"),
        ("Because the water evaporates and then condenses on the cold lid.", "judge"),
        ("Because the water evaporates and then condenses on the lid.", "judge"),
        ("Plants make sugar, and release oxygen.", "judge"),
        ("it rises because warm air is lighter than cold air", "judge"),
    ],
)
def test_the_kind_of_an_answer_follows_from_the_reference(reference: str, kind: str) -> None:
    assert infer_kind(reference) == kind


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Photosynthesis.", "photosynthesis"),
        (r"\boxed{\text{photosynthesis}}", "photosynthesis"),
        ("**the Nile**", "Nile"),
        ("Treaty of  Versailles", "the treaty of Versailles"),
        ("ｐａｒｉｓ", "Paris"),
        ("18", "18"),
        ("eighteen hundred meters is 1.8 km\nThe answer is 1800 m", "1.8 km"),
        ("3", "three"),
        ("1/4", "0.25"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        ("blue, red and green", "red, green, blue"),
        (r"\boxed{\{3, 1, 2\}}", "{1, 2, 3}"),
        ("1,234 and 5", "{5, 1234}"),
        ("(1, 2)", "(1, 2)"),
        ("solid, liquid, gas", "[solid, liquid, gas]"),
        ("whale > dog > mouse", "whale > dog > mouse"),
        (r"\boxed{egg \to larva \to pupa}", "egg → larva → pupa"),
        ("Thinking.\nThe answer follows.\nParis", "Paris"),
    ],
)
def test_the_same_answer_is_right(answer: str, reference: str) -> None:
    verdict = grade(answer, reference)
    assert (verdict.correct, verdict.graded) == (True, True), verdict


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("respiration", "photosynthesis"),
        ("photosynthesis and respiration", "photosynthesis"),
        ("not Paris", "Paris"),
        ("19", "18"),
        ("1800 km", "1.8 km"),
        ("18 kg", "18 m"),
        ("red, green", "red, green, blue"),
        ("red, green, blue, yellow", "red, green, blue"),
        ("{1, 2, 4}", "{1, 2, 3}"),
        ("(2, 1)", "(1, 2)"),
        ("gas, liquid, solid", "[solid, liquid, gas]"),
        ("mouse > dog > whale", "whale > dog > mouse"),
        ("Paris is nice.\nI do not know.", "Paris"),
        ("\n", "Paris"),
    ],
)
def test_another_answer_is_wrong(answer: str, reference: str) -> None:
    verdict = grade(answer, reference)
    assert (verdict.correct, verdict.graded) == (False, True), verdict
    assert verdict.reason


def test_a_tolerance_is_absolute_in_the_references_unit_or_relative() -> None:
    assert grade("9.7", "9.81", tolerance=0.2).correct
    assert not grade("9.6", "9.81", tolerance=0.2).correct
    assert grade("980 cm", "9.81 m", tolerance=0.02).correct
    assert grade("101", "100", relative_tolerance=0.01).correct
    assert not grade("102", "100", relative_tolerance=0.01).correct
    assert grade("26%", "0.25", tolerance=0.01).correct
    assert grade("{3.14, 2.7}", "{2.71, 3.14}", tolerance=0.01).correct
    assert not grade("9.7 kg", "9.81 m", tolerance=0.2).correct


def test_the_prompt_decides_where_its_reference_would_say_something_else() -> None:
    assert not grade("solid, gas, liquid", "solid, liquid, gas", type="list").correct
    assert grade("(2, 1)", "(1, 2)", type="set").correct
    assert not grade("18.0", "18", type="exact").correct
    assert grade("water", "H2O", accept=["water", "dihydrogen monoxide"]).correct


def test_sets_and_lists_that_take_algebra_are_compared_by_it() -> None:
    assert grade(r"\boxed{\{\sqrt{12}, 1\}}", r"{1, 2\sqrt{3}}").correct
    assert not grade(r"\boxed{(1, \sqrt{12})}", r"(2\sqrt{3}, 1)").correct
    assert grade("(3,4), (1,2)", "(1, 2), (3, 4)").correct
    assert not grade("(1, 4), (3, 2)", "(1, 2), (3, 4)").correct


def test_a_cut_response_needs_its_answer_marked_and_one_too_long_is_not_graded() -> None:
    assert not grade("Thinking.\nParis", "Paris", is_complete=False).correct
    assert grade("Thinking.\n#### Paris", "Paris", is_complete=False).correct
    verdict = grade("\\boxed{" + "x" * 5000 + "}\n", "Paris")
    assert (verdict.correct, verdict.graded) == (False, False)


@pytest.mark.parametrize("piece", ["{", "(", ", ", "a > ", r"\text{", "1,234,", "and ", "→"])
def test_hostile_answers_end_in_time(piece: str) -> None:
    for reference in ("Paris", "18", "{1, 2}", "[a, b]"):
        assert not grade("\n\\boxed{" + piece * 100_000, reference).correct
        assert not grade("\n\\boxed{" + piece * 150 + "}", reference).correct


@pytest.mark.parametrize(
    ("answer", "grading", "problem"),
    [
        ("18", {"type": "essay"}, "grading.type is 'essay'; it must be one of exact, numeric, set, list, judge"),
        ("Paris", {"type": "numeric"}, "grading.type is numeric, but 'Paris' is no number"),
        ("18", {"tolerance": -1}, "grading.tolerance is -1"),
        ("18", {"accept": "19"}, "grading.accept is '19'; it must be a list of texts"),
        ("18", {"tol": 1}, "grading has no field tol"),
        ("Because water evaporates when the sun shines on it.", {}, "is for a model judge"),
    ],
)
def test_prompts_that_cannot_be_graded_are_refused(answer: str, grading: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        K12Grader().check(prompt_of(answer, **grading))


class ModelJudge:
    """Remembers what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def check(self, prompt: Prompt) -> None:
        pass

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Verdict:
        self.asked.append(text)
        return Verdict(correct=True)

    def close(self) -> None:
        self.asked.append("closed")


def test_what_has_no_short_answer_goes_to_the_model_judge() -> None:
    judge = ModelJudge()
    grader, long_answer = K12Grader(judge), prompt_of("Because water evaporates when the sun shines on it.")
    grader.check(long_answer)
    assert grader.grade("It evaporates.", long_answer, is_complete=True) == Verdict(correct=True)
    assert isinstance(verdict := grader.grade("18", prompt_of("18"), is_complete=True), Verdict)
    assert verdict.correct
    grader.close()
    assert judge.asked == ["It evaporates.", "closed"]
    assert read_answer_spec(long_answer.grading, long_answer.answer).type == "judge"
