"""Grading mathematics: find the final answer in a response, and compare it with the reference.

The answer is looked for in this order: the last \\boxed{…}, the last "#### …", the last "answer is …" or "answer: …", and, in a
response that ended by itself, the last plain number. Text and numbers are compared here, exactly; what remains goes to math-verify,
which parses LaTeX and compares symbolically. math-verify's own timeouts need signals and so the main thread; they are off, and
instead the answer's length is bounded and expressions that explode when evaluated are not handed over.
"""

import re
from fractions import Fraction

from tandem.engine.types import Verdict

MAX_ANSWER_CHARS = 300

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))"
_LAST_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-+]?\.\d+")
_PLAIN_NUMBER = re.compile(rf"({_NUMBER})(?:/({_NUMBER}))?")
_MARKED = re.compile(r"####[ \t]*([^\n]+)")
_SPOKEN = re.compile(r"answer[ \t]*(?:is|:|=)[ \t]*:?[ \t]*([^\n]+)", re.IGNORECASE)
# What may not fit into memory once evaluated: exponents of four digits and more, powers of powers, factorials of three digits and more.
_POWER = r"(?:\^|\*\*)\s*"
_EXPLODES = re.compile(
    rf"{_POWER}[{{(]?\s*[-+]?\d{{4,}}"
    rf"|{_POWER}(?:\{{[^{{}}]*|\([^()]*|[{{(\s]*[-+]?[\d.]+[\s}})]*){_POWER}"
    r"|\d{3,}\s*\)*\s*!|!\s*!|\de\+?\d{4,}",
    re.IGNORECASE,
)


def grade_math(response_text: str, reference_answer: str, *, is_complete: bool = True) -> Verdict:
    """Compare the final answer of a response with the reference.

    Args:
        is_complete: False for a response that was cut: an unmarked last number is then not its answer.
    Returns: a verdict with the extracted answer. `graded=False` when the reference cannot be parsed, or the answer is an
        expression too costly to evaluate.
    Raises: whatever math-verify raises for an expression that it cannot compare.
    """
    answer = extract_answer(response_text, is_complete=is_complete)
    if answer is None:
        return Verdict(correct=False, reason="no final answer found")
    if len(answer) > MAX_ANSWER_CHARS:
        reason = f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARS}"
        return Verdict(correct=False, answer=answer[:MAX_ANSWER_CHARS], reason=reason)
    found, expected = _normalise(answer), _normalise(reference_answer)
    if found.casefold() == expected.casefold():
        return Verdict(correct=True, answer=answer)
    found_value, expected_value = _value(found), _value(expected)
    if found_value is not None and expected_value is not None:
        return _verdict(found_value == expected_value, answer, reference_answer)
    if _EXPLODES.search(found) or _EXPLODES.search(expected):
        return Verdict(correct=False, answer=answer, reason="the expression is too costly to evaluate", graded=False)
    return _compare_symbolically(answer, found, reference_answer, expected)


def extract_answer(response_text: str, *, is_complete: bool = True) -> str | None:
    """The final answer as it is written, or None."""
    boxed = _last_boxed(response_text)
    if boxed is not None:
        return boxed
    for pattern in (_MARKED, _SPOKEN):
        marked = pattern.findall(response_text)
        if marked:
            return _first_statement(marked[-1])
    if not is_complete:
        return None
    numbers = _LAST_NUMBER.findall(response_text)
    return numbers[-1] if numbers else None


def _last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{…} whose braces close."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), min(len(text), match.end() + MAX_ANSWER_CHARS + 1)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def _first_statement(text: str) -> str:
    """Up to the end of the sentence: "18 dollars. Good." gives "18 dollars", "3.5." gives "3.5"."""
    text = re.split(r"\.(?:\s|$)", text.strip(), maxsplit=1)[0].strip().strip("*")
    # Of a number with a unit, the number: "18 dollars", "$18 per day".
    with_unit = re.fullmatch(rf"\\?\$?\s*({_NUMBER})\s*[A-Za-z][A-Za-z .]*", text)
    return with_unit.group(1) if with_unit else text


def _normalise(answer: str) -> str:
    """Without what changes no value: math delimiters, dollar signs, text and spacing commands, thousands commas, a final stop."""
    answer = answer.strip()
    for pattern, replacement in (
        (r"\\[\[\]()]", ""),
        (r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1"),
        (r"\\[!,;: ]|~", " "),
        (r"\\?\$", ""),
        (r"\\left|\\right", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"\s+", " "),
    ):
        answer = re.sub(pattern, replacement, answer)
    return answer.strip().rstrip(".").strip()


def _value(answer: str) -> Fraction | None:
    """The exact value of a plain number or a fraction of two."""
    fraction = re.fullmatch(r"([-+]?)\\frac\{(\d+)\}\{(\d+)\}", answer)
    if fraction:
        answer = f"{fraction.group(1)}{fraction.group(2)}/{fraction.group(3)}"
    plain = _PLAIN_NUMBER.fullmatch(answer.replace(" ", ""))
    if not plain or not any(character.isdigit() for character in plain.group(1)):
        return None
    numerator, denominator = Fraction(plain.group(1).replace(",", "")), Fraction((plain.group(2) or "1").replace(",", ""))
    return numerator / denominator if denominator else None


def _compare_symbolically(answer: str, found: str, reference_answer: str, expected: str) -> Verdict:
    # SymPy takes a second to import; graders of other domains never need it.
    from math_verify import parse, verify

    gold = parse(f"${expected}$", parsing_timeout=None)  # type: ignore[arg-type]
    if not gold:
        return Verdict(correct=False, answer=answer, reason=f"the reference {reference_answer!r} cannot be parsed", graded=False)
    target = parse(f"${found}$", parsing_timeout=None)  # type: ignore[arg-type]
    equal = bool(target) and verify(gold, target, timeout_seconds=None, raise_on_error=True)
    return _verdict(equal, answer, reference_answer)


def _verdict(correct: bool, answer: str, reference_answer: str) -> Verdict:
    return Verdict(correct=correct, answer=answer, reason="" if correct else f"the answer is {reference_answer}")
