"""Comparing expressions with math-verify and SymPy. Runs in a worker: it may take any time and any memory, and it may crash.

math-verify reads LaTeX and has the last word; three things are decided before it, because it answers them wrongly or not at all:
a value of millions of digits is refused, not computed; two expressions that differ at a point are different; two that agree to 30
digits at several points are equal. Its own comparison rounds to six decimals (10^-8 would equal 2·10^-8) and hides running out of memory.
"""

import dataclasses
import functools
import math
import random
import re
import sys
from fractions import Fraction
from typing import Any

from tandem.engine.reward.answers import compare_exactly, compare_shapes, read_shape
from tandem.engine.reward.quantity import counts_things, read_quantity, read_unit, same_value

# A value of more digits is not computed: 2^2024 has 610, and SymPy takes a second for 10^5.
MAX_DIGITS = 100_000
_PRECISION = 40  # digits of a numerical comparison
_EQUAL, _DIFFERENT = 1e-30, 1e-25  # relative differences; rounding leaves less than the first
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*degrees")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
# What the parser leaves out or joins: f', 1 2 as 12, 101_2 as 101, 1 == 1, 5 dx, "3 more", a variable m as metres
_LEFT_OUT = re.compile(r"'|(?<!_)\d\s+\d|\d_|==|(?<![A-Za-z\\])[A-Za-z]{2,}\s+[A-Za-z]{2,}\b|\.\.")
_HUGE = re.compile(r"\d[eE][-+]?\d{4,}")  # 1e99999: LaTeX would read a product


class TooCostlyError(ValueError):
    """An expression whose value is too large to compute."""


class UnreadableError(ValueError):
    """A reference that is no mathematics that can be parsed."""


def load() -> None:
    """Import what the first comparison would."""
    import math_verify  # noqa: F401

    # Sums of hundreds of terms are trees as deep; a worker that overflows its stack is replaced.
    sys.setrecursionlimit(20_000)


def same_answer(found: str, expected: str) -> bool:
    """Whether two normalised answers are equal.

    Raises: UnreadableError for a reference that cannot be parsed, TooCostlyError, and ValueError for nesting without end.
    """
    unreadable: list[str] = []
    outcome = compare_shapes(read_shape(found), read_shape(expected), functools.partial(_same_value, unreadable=unreadable))
    if outcome is None:
        outcome = _verified(found, expected, unreadable)
    if not outcome and unreadable:
        raise UnreadableError(f"{unreadable[0]!r} cannot be parsed")
    return bool(outcome)


def _same_value(found: str, expected: str, unreadable: list[str]) -> bool:
    outcome = compare_exactly(found, expected)
    if outcome is not None:
        return outcome
    if _HUGE.search(found) or _HUGE.search(expected):
        raise TooCostlyError("the value has an exponent of more than three digits")
    a, b = (_parse(_without_unit(text)) for text in (found, expected))
    if b is None:
        unreadable.append(expected)
    if a is None or b is None:
        return False
    if a.is_Relational and b.is_Relational:
        same = _same_equation(a, b)
    else:
        a, b = (_value_of(expression) for expression in (a, b))
        same = _same_number(a, b, found, expected)
    return _verify(b, a) if same is None else same


def _without_unit(text: str) -> str:
    """An expression without the words after it: 2\\sqrt{3} cm^2, 5\\pi square meters."""
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    words = text.split(" ")
    for i in range(1, len(words)):
        rest = " ".join(words[i:])
        if rest and rest[0].isalpha() and (read_unit(rest) is not None or (len(rest) > 3 and counts_things(f" {rest}"))):
            return " ".join(words[:i])
    return text


def _parse(text: str) -> Any:
    """A SymPy object, or None.

    Raises: TooCostlyError before anything large is evaluated.
    """
    from math_verify import parse
    from sympy import Basic, Float, I, MatrixBase, Rational

    if _LEFT_OUT.search(text):
        return None
    # No fallback to whatever number stands somewhere in the text.
    parsed = parse(f"${text}$", [_reading()], fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
    expression = next((one for one in parsed if isinstance(one, Basic | MatrixBase)), None)
    if expression is None:
        return None
    _check_size(expression)
    # A decimal is meant exactly, and not as the binary number next to it; math-verify takes the i of 3 + 4i for a variable.
    exact = {decimal: Rational(str(decimal)) for decimal in expression.atoms(Float)}
    return expression.xreplace(exact | {symbol: I for symbol in expression.free_symbols if str(symbol) == "i"})


@functools.cache
def _reading() -> Any:
    """How math-verify reads: not with its own units, among which are t, o, ab and prime, so that 5t would be 5."""
    from math_verify import LatexExtractionConfig

    default = LatexExtractionConfig()
    return dataclasses.replace(default, normalization_config=dataclasses.replace(default.normalization_config, units=False))


def _value_of(expression: Any) -> Any:
    """x = 5 is 5."""
    from sympy import Eq

    return expression.rhs if isinstance(expression, Eq) else expression


def _check_size(expression: Any) -> None:
    for part in [expression] if not hasattr(expression, "flat") else expression.flat():
        if _digits(part) > MAX_DIGITS:
            raise TooCostlyError(f"the value has more than {MAX_DIGITS} digits")


def _digits(expression: Any) -> float:
    """An upper bound on |log10| of the value of each part of a tree, infinite where there is no saying. Symbols count as 1."""
    from sympy import Integral, Product, Sum, binomial, cosh, exp, factorial, factorial2, gamma, log, sinh, subfactorial, tanh

    try:
        if expression.is_Number:
            return float(abs(log(abs(expression), 10).evalf(5))) if expression.is_finite and not expression.is_zero else 0.0
        if not expression.args:
            return 0.5
        parts = [_digits(argument) for argument in expression.args]
        if expression.is_Pow:
            return max(parts[0], 0.01) * (1.0 if expression.args[1].free_symbols else 10 ** parts[1])
        if isinstance(expression, factorial | factorial2 | gamma | subfactorial | binomial):
            return 10 ** max(parts) * max(1.0, *parts)
        if isinstance(expression, exp | sinh | cosh | tanh):
            return 10 ** parts[0]
        return 10 * max(parts) if isinstance(expression, Sum | Product | Integral) else sum(parts)
    except OverflowError:
        return math.inf


def _same_equation(a: Any, b: Any) -> bool | None:
    """Equations are the same when their sides differ by a constant factor only: y = 2x + 1 and 4x - 2y + 2 = 0."""
    from sympy import Add, Mul

    if not (a.is_Equality and b.is_Equality):
        return None
    sides: list[Any] = [Add(equation.lhs, Mul(-1, equation.rhs)) for equation in (a, b)]
    ratios = []
    for point in _points(a.free_symbols | b.free_symbols):
        first, second = (_at(side, point) for side in sides)
        if first and second:
            ratios.append(_complex(first) / _complex(second))
    if len(ratios) < 2:
        return None
    return all(abs(ratio - ratios[0]) <= _DIFFERENT * abs(ratios[0]) for ratio in ratios)


def _same_number(a: Any, b: Any, found: str, expected: str) -> bool | None:
    """Equal or not by their values at points; None where they have none (sets, matrices, integrals that diverge)."""
    from sympy import Expr

    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return None
    symbols = a.free_symbols | b.free_symbols
    if not symbols and (decimal := _against_decimal(a, b, found, expected)) is not None:
        return decimal
    num_equal = 0
    for point in _points(symbols):
        first, second = _at(a, point), _at(b, point)
        if first is None or second is None:
            continue
        distance = _distance(first, second)
        if distance > _DIFFERENT:
            return False
        num_equal += distance <= _EQUAL
    return True if num_equal >= (2 if symbols else 1) else None


def _distance(first: Any, second: Any) -> float:
    """Relative difference; of rational values 0 or infinite: 2^2024 and 2^2024 - 1 agree to 609 digits."""
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return 0.0 if first == second else math.inf
    first, second = _complex(first), _complex(second)
    size = max(abs(first), abs(second))
    return float(abs(first - second) / size) if size else 0.0


def _against_decimal(a: Any, b: Any, found: str, expected: str) -> bool | None:
    """1.414214 for \\sqrt{2}: a decimal is compared with the value rounded as `same_value` says."""
    for decimal, other in ((read_quantity(found), b), (read_quantity(expected), a)):
        if decimal is not None and decimal.places is not None:
            value = _at(other, {})
            if value is None or (not isinstance(value, Fraction) and value.imag):
                return None
            exact = value if isinstance(value, Fraction) else Fraction(str(value.real))
            return same_value(decimal.value, decimal.places, exact, None)
    return None


def _points(symbols: set[Any]) -> list[dict[Any, Any]]:
    """Where to compare: random rationals of both signs, within and beyond 1, the same in every run; one empty point without symbols."""
    from sympy import Rational

    if not symbols:
        return [{}]
    numbers = random.Random(17)
    names = sorted(symbols, key=str)
    ranges = [(sign, span) for sign in (1, -1) for span in ((67, 205), (223, 997))]
    return [{name: Rational(sign * numbers.randint(*span), 211) for name in names} for sign, span in ranges for _ in range(2)]


def _at(expression: Any, point: dict[Any, Any]) -> Any:
    """The value at a point: a Fraction where it is rational, else an mpmath number of _PRECISION digits; None where there is none."""
    import mpmath
    from sympy import Expr, N

    # SymPy's evaluation raises many things for what has no value there, none of which says more than that.
    try:
        value = (expression.subs(point) if point else expression).doit()
        if value.is_Rational:
            return Fraction(int(value.p), int(value.q))
        value = N(value, _PRECISION)
        if not isinstance(value, Expr) or not value.is_number or not value.is_finite:
            return None
        with mpmath.workdps(_PRECISION):
            return mpmath.mpc(*(str(part) for part in value.as_real_imag()))
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return None


def _complex(value: Any) -> Any:
    import mpmath

    with mpmath.workdps(_PRECISION):
        return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _verified(found: str, expected: str, unreadable: list[str]) -> bool:
    """math-verify's comparison of two whole answers."""
    gold, target = _parse(expected), _parse(found)
    if gold is None:
        unreadable.append(expected)
    if gold is None or target is None:
        return False
    return _verify(gold, target)


def _verify(gold: Any, target: Any) -> bool:
    from math_verify import verify

    return verify(gold, target, timeout_seconds=None)
