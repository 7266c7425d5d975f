"""Grading school questions: short answers that are a text, a number, a set or an ordered list; longer ones go to a model judge.

The kind of answer comes with the prompt, `grading: {"type": "exact" | "numeric" | "set" | "list" | "judge"}`, or follows from the
reference: a number, perhaps with a unit, is numeric; parts in brackets ( ) or [ ], or with > or → between them, are an ordered list;
parts in braces, or between commas, are a set; up to five words are exact; anything longer, and a sentence, is for the judge.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from tandem.engine.reward.extract import MAX_ANSWER_CHARS, extract_answer
from tandem.engine.reward.math import submit_math
from tandem.engine.reward.normalise import normalise
from tandem.engine.reward.quantity import Quantity, read_quantity, same_quantity
from tandem.engine.types import Grader, Prompt, Verdict

Kind = Literal["exact", "numeric", "set", "list", "judge"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_EXACT_WORDS = 5
_ORDER = r">|→|⇒|->|\\to(?![a-z])|\\rightarrow(?![a-z])"
# No comma within 1,234.
_PARTS = re.compile(rf"\s*(?:{_ORDER}|;|；|、|，|,(?!(?<=\d,)\d{{3}}(?!\d)))\s*(?:and\s+|or\s+)?|\s+and\s+|\s*(?:그리고|以及)\s*")
_ORDERED = re.compile(rf"\s*(?:{_ORDER})\s*")
_BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_FONT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")
_ARTICLE = re.compile(r"^(?:the|an?)\s+")
_FORMULA = re.compile(r"[\\^=+*/_√π]|\d\s*[-(]|[-(]\s*\d")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSpec:
    """What a prompt's `grading` says."""

    type: Kind
    tolerance: float = 0.0
    """Absolute difference of two numbers that is none, in the reference's unit."""
    relative_tolerance: float = 0.0
    """The same as a fraction of the reference."""
    accept: tuple[str, ...] = ()
    """Other right answers."""


class K12Grader:
    """Short answers, compared here or, where it takes algebra, as `submit_math` does; the rest goes to `judge`."""

    def __init__(self, judge: Grader | None = None) -> None:
        self._judge = judge

    def check(self, prompt: Prompt) -> None:
        spec = read_answer_spec(prompt.grading, prompt.answer)
        if not prompt.answer:
            raise ValueError("it has no answer")
        if spec.type != "judge":
            return
        if self._judge is None:
            raise ValueError(
                f"its answer {prompt.answer!r:.60} is for a model judge (type judge), and there is none; set "
                f"reward.judge_url, or give grading.type, one of {', '.join(KINDS)}, or a shorter answer"
            )
        self._judge.check(prompt)

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Verdict | Future[Verdict]:
        spec = read_answer_spec(prompt.grading, prompt.answer)
        if spec.type == "judge":
            if self._judge is None:
                return Verdict(correct=False, reason="there is no model judge", graded=False)
            return self._judge.grade(text, prompt, is_complete=is_complete)
        return grade_short_answer(text, prompt.answer, spec, is_complete=is_complete, question=prompt.text)

    def close(self) -> None:
        if self._judge is not None:
            self._judge.close()


@functools.lru_cache(maxsize=1024)
def read_answer_spec(grading: str, reference_answer: str) -> AnswerSpec:
    """The kind of answer that the prompt gives, or that its reference has. Raises: ValueError naming the field of `grading`."""
    fields: dict[str, Any] = json.loads(grading) if grading else {}
    known = ("type", "tolerance", "relative_tolerance", "accept")
    if unknown := set(fields) - set(known):
        raise ValueError(f"grading has no field {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    kind = fields.get("type", infer_kind(reference_answer))
    if kind not in KINDS:
        raise ValueError(f"grading.type is {kind!r:.80}; it must be one of {', '.join(KINDS)}")
    for name in ("tolerance", "relative_tolerance"):
        value = fields.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"grading.{name} is {value!r:.80}; it must be a number that is not negative")
    accept = fields.get("accept", [])
    if not isinstance(accept, list) or not all(isinstance(other, str) and other.strip() for other in accept):
        raise ValueError(f"grading.accept is {accept!r:.80}; it must be a list of texts")
    no_numbers = [text for text in (reference_answer, *accept) if _quantity(text) is None and not _is_formula(text)]
    if kind == "numeric" and no_numbers:
        raise ValueError(f"grading.type is numeric, but {no_numbers[0]!r:.80} is no number")
    return AnswerSpec(**{**fields, "type": kind, "accept": tuple(accept)})


def infer_kind(reference_answer: str) -> Kind:
    """See the module."""
    text = reference_answer.strip()
    if _quantity(text) is not None:
        return "numeric"
    if len(text.split()) > MAX_EXACT_WORDS and text[-1] in ".!?。":
        return "judge"
    opening, content = _unbracketed(text)
    if opening is not None and len(_parts(content)) > 1:
        return "set" if "{" in opening else "list"
    if len(_parts(content)) > 1 and all(len(part.split()) <= MAX_EXACT_WORDS for part in _parts(content)):
        return "list" if _ORDERED.search(content) else "set"
    if _is_formula(text) and len(text.split()) <= MAX_EXACT_WORDS:
        return "numeric"
    return "exact" if len(text.split()) <= MAX_EXACT_WORDS else "judge"


def grade_short_answer(
    response_text: str, reference_answer: str, spec: AnswerSpec, *, is_complete: bool = True, question: str = ""
) -> Verdict | Future[Verdict]:
    """Compare the final answer of a response with the reference and with `spec.accept`.

    Args:
        response_text: with its answer marked (a box, "answer is …"); else its last line counts, and for numbers the last one, unless
            the response was cut.
        question: as of `submit_math`.
    Returns: at once, or as a future where the reference takes algebra and no accepted answer fits without. `graded=False` for an answer
        that is too long.
    """
    answer = _final_answer(response_text, spec.type, is_complete)
    if answer is None:
        return Verdict(correct=False, reason="no final answer found")
    if len(answer) > MAX_ANSWER_CHARS:
        reason = f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARS}"
        return Verdict(correct=False, answer=answer[:MAX_ANSWER_CHARS], reason=reason, graded=False)
    outcomes = [_same(answer, right, spec) for right in (reference_answer, *spec.accept)]
    if True in outcomes:
        return Verdict(correct=True, answer=answer)
    if outcomes[0] is None:
        as_math = _as_math(spec.type)
        return submit_math(rf"\boxed{{{as_math(answer)}}}", as_math(reference_answer), question=question)
    return Verdict(correct=False, answer=answer, reason=f"the answer is {reference_answer}")


def _final_answer(text: str, kind: Kind, is_complete: bool) -> str | None:
    marked = extract_answer(text, is_complete=is_complete and kind == "numeric")
    if marked is not None or not is_complete:
        return marked
    lines = [line for line in text[-2 * MAX_ANSWER_CHARS :].splitlines() if line.strip()]
    return lines[-1].strip(" \t*_`#") if lines else None


def _same(found: str, expected: str, spec: AnswerSpec) -> bool | None:
    """None: that takes algebra."""
    if spec.type not in ("set", "list"):
        return _same_item(found, expected, spec)
    found_items, expected_items = (_parts(_unbracketed(text.strip())[1]) for text in (found, expected))
    if spec.type == "list":
        if len(found_items) != len(expected_items):
            return False
        return _all([_same_item(a, b, spec) for a, b in zip(found_items, expected_items, strict=True)])
    return _same_set(found_items, expected_items, spec)


def _same_set(found: Sequence[str], expected: Sequence[str], spec: AnswerSpec) -> bool | None:
    """Each is the same as one of the others, however often it is said."""
    unknown = False
    for items, others in ((found, expected), (expected, found)):
        for item in items:
            outcomes = [_same_item(item, other, spec) if items is found else _same_item(other, item, spec) for other in others]
            if True not in outcomes:
                if None not in outcomes:
                    return False
                unknown = True
    return None if unknown else True


def _same_item(found: str, expected: str, spec: AnswerSpec) -> bool | None:
    if _plain(found) == _plain(expected):
        return True
    if spec.type == "exact":
        return False
    a, b = _quantity(found), _quantity(expected)
    if a is not None and b is not None:
        return _within(a, b, spec) if spec.tolerance or spec.relative_tolerance else same_quantity(a, b)
    if not (_is_formula(found) or _is_formula(expected)):
        return False
    return None if (a is not None or _is_formula(found)) and (b is not None or _is_formula(expected)) else False


def _within(found: Quantity, expected: Quantity, spec: AnswerSpec) -> bool:
    value = found.value
    if found.unit is not None and expected.unit is not None:
        if found.unit[0] != expected.unit[0]:
            return False
        value = value * found.unit[1] / expected.unit[1]
    elif found.is_percent != expected.is_percent:
        value = value / 100 if found.is_percent else value * 100
    allowed = max(Fraction(spec.tolerance), Fraction(spec.relative_tolerance) * abs(expected.value))
    return abs(value - expected.value) <= allowed


def _quantity(text: str) -> Quantity | None:
    word = _plain(text)
    return read_quantity(str(_NUMBER_WORDS.index(word)) if word in _NUMBER_WORDS else normalise(text))


def _is_formula(text: str) -> bool:
    return _FORMULA.search(_FONT.sub(r"\1", text)) is not None


def _unbracketed(text: str) -> tuple[str | None, str]:
    """The bracket that encloses the whole text, and what is in it."""
    text = text.strip().strip("$").strip().removeprefix(r"\left").strip()
    for opening, closing in _BRACKETS.items():
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            content = text[len(opening) : -len(closing)]
            if min(_depths(content), default=0) >= 0:
                return opening, content.removesuffix(r"\right").strip()
    return None, text


def _depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(itertools.accumulate((character in "([{") - (character in ")]}") for character in text))


def _parts(text: str) -> list[str]:
    """What separators outside all brackets part."""
    depths, parts, start = [0, *_depths(text)], [], 0
    for separator in _PARTS.finditer(text):
        if depths[separator.start()] == 0:
            parts.append(text[start : separator.start()])
            start = separator.end()
    return [part for part in (*parts, text[start:]) if part.strip()]


def _plain(text: str) -> str:
    """For comparing words: no case, accents' encoding, fonts, articles, outer punctuation or runs of white space."""
    text = _FONT.sub(r"\1", unicodedata.normalize("NFKC", text)).casefold()
    text = re.sub(r"\s+", " ", text).strip(" .,;:!?\"'`*$“”‘’。")
    return _ARTICLE.sub("", text)


def _as_math(kind: Kind) -> Callable[[str], str]:
    def written(text: str) -> str:
        joined = ", ".join(_parts(_unbracketed(text)[1]))
        return text if kind not in ("set", "list") else rf"\{{{joined}\}}" if kind == "set" else f"({joined})"

    return written


def _all(outcomes: Sequence[bool | None]) -> bool | None:
    return False if False in outcomes else None if None in outcomes else True
