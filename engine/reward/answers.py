"""The shape of an answer: one value, several of them, a tuple or interval, a set, a matrix, an equation; and comparing two of them.

A comparison has three outcomes: True, False and None for "these two texts need algebra". Nothing is evaluated here.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tandem.engine.reward.quantity import read_quantity, same_quantity

# Compares the texts of two single values; see the module.
CompareValues = Callable[[str, str], bool | None]

_OPENING, _CLOSING = "([{", ")]}"
_SEPARATOR = re.compile(
    r"\s*[,;]\s*(?:(?:and|or)(?![A-Za-z])\s*)?|(?<![A-Za-z\\])\s*(?:and|or)(?![A-Za-z])\s*|\s*(?:和|或者?|또는|그리고|및)\s*"
)
_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)|:=|\\equiv(?![a-z])")
_RELATION = re.compile(r"\\(?:le|ge)(?![a-z])|[<>]")
_UNION = re.compile(r"\\cup(?![a-z])|(?<=[)\]])\s*U\s*(?=[(\[])")
_MATRIX = re.compile(r"[\[(]?\s*\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[clr| ]*\})?(.*)\\end\{\1\}\s*[\])]?", re.DOTALL)
# What may stand left of "=" and only names the answer: x, f(x), x_1, |AB|, \angle ABC, (x, y), Total cost
_NAME = re.compile(
    r"\|?(?:\\[A-Za-z]+(?:\{[A-Za-z]+\})?|[A-Za-z])(?:\s*(?:\\[A-Za-z]+|[A-Za-z']))*(?:_\{?\w+\}?)?'?(?:\([A-Za-z](?:\s*,\s*[A-Za-z])*\))?\|?"
    r"|\(\s*[A-Za-z](?:_\{?\w+\}?)?(?:\s*,\s*[A-Za-z](?:_\{?\w+\}?)?)*\s*\)|[^\W\d_]+|"
)
_VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?")
_INDEX = re.compile(r"_\{?\w+\}?|(?<=[A-Za-z])\([\w =]+\)")  # of a_1; the argument of f(2) or P(X = 2)
_OPERATION = re.compile(r"\\(?:int|sum|prod|lim)(?![a-z])")
_CASES = re.compile(r"\\?\{?\s*\\begin\{cases\}(.*)\\end\{cases\}", re.DOTALL)
_CONDITION = re.compile(r"[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid(?![a-z])|\||:)(.*)", re.DOTALL)
_MEMBER = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?)\s*\\in(?![a-z])\s*")
_WORDS = re.compile(r"(?i:[a-z][a-z]{3,}(?:[ '-][a-z]+)*|yes|no|odd|even)|[A-Z]{2,}")  # of capitals alone: points, or an order
_FUNCTIONS = re.compile(
    r"sqrt|frac|sinh?|cosh?|tanh?|log|exp|infty|alpha|beta|theta|gamma|delta|lambda|arc|floor|ceil|binom|choose|mod", re.IGNORECASE
)
# 101_2 in base 2
_IN_BASE = re.compile(r"([0-9A-Fa-f]+)(?:_\{?\s*(\d{1,2})\s*\}?)?")
# 5:30 pm
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?\s*([ap])m", re.IGNORECASE)
_INFINITE = re.compile(r"([-+]?)\s*\\infty")
_MAX_DEPTH = 40


@dataclass(frozen=True, slots=True)
class Value:
    """One value; `equation` where the text relates two sides and the left one is no mere name."""

    text: str
    name: str = ""
    equation: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Several:
    """Values in a row. Order counts in a tuple or interval, not in a set, a union, or a list without brackets."""

    kind: Literal["tuple", "set", "list", "union"]
    items: tuple["Shape", ...]
    brackets: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple["Shape", ...], ...]
    name: str = ""


Shape = Value | Several | Matrix


def nesting_depth(text: str) -> int:
    """How deep brackets of all kinds are nested."""
    depth = deepest = 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        deepest = max(deepest, depth)
    return deepest


def read_shape(text: str) -> Shape:
    """The shape of a normalised answer.

    Raises: ValueError when brackets are nested more than 40 deep.
    """
    if (depth := nesting_depth(text)) > _MAX_DEPTH:
        raise ValueError(f"the answer nests brackets {depth} deep, more than {_MAX_DEPTH}")
    return _read(text)


def compare_shapes(found: Shape, expected: Shape, compare: CompareValues) -> bool | None:
    """Whether two answers are the same; None when a pair of values that decides it was neither equal nor unequal."""
    if found.name and expected.name and _bare(found.name) != _bare(expected.name):
        if isinstance(found, Value) and isinstance(expected, Value):
            return compare(f"{found.name}={found.text}", f"{expected.name}={expected.text}")
        return False
    found, expected = _single(found), _single(expected)
    if isinstance(found, Value) and isinstance(expected, Value):
        return _compare_values(found, expected, compare)
    if isinstance(found, Matrix) or isinstance(expected, Matrix):
        return _compare_matrices(_as_matrix(found), _as_matrix(expected), compare)
    if isinstance(found, Value) or isinstance(expected, Value):
        # One interval may be written as a union, a set as a formula: algebra of sets
        return None if any(_is_about_sets(shape) for shape in (found, expected)) else False
    return _compare_several(found, expected, compare)


def compare_exactly(found: str, expected: str) -> bool | None:
    """Two values by their text, as plain numbers, in their bases, as times of the day, or as words."""
    if _bare(found) == _bare(expected):
        return True
    if "_" in found + expected and (bases := _all_of(_IN_BASE, found, expected)):
        return _same_in_bases(bases[0], bases[1])
    if clocks := _all_of(_CLOCK, found, expected):
        times = [(int(hour), int(minute or 0), half.lower()) for hour, minute, half in (match.groups() for match in clocks)]
        return times[0] == times[1]
    a, b = read_quantity(found), read_quantity(expected)
    if a is not None and b is not None:
        return same_quantity(a, b)
    words = [_WORDS.fullmatch(text) is not None and _FUNCTIONS.search(text) is None for text in (found, expected)]
    infinite = [_INFINITE.fullmatch(text) for text in (found, expected)]
    if infinite[0] and infinite[1]:
        return (infinite[0].group(1) == "-") == (infinite[1].group(1) == "-")
    plain = (a is not None or words[0] or infinite[0] is not None, b is not None or words[1] or infinite[1] is not None)
    return False if all(plain) else None


def _read(text: str) -> Shape:
    text = text.strip()
    text = text if text.endswith("..") else text.removesuffix(".").strip()
    matrix = _MATRIX.fullmatch(text)
    if matrix and text.count(r"\begin") == 1:
        rows = [row for row in re.split(r"\\\\|\\cr(?![a-z])", matrix.group(2)) if row.strip() and row.strip() != r"\hline"]
        return Matrix(tuple(tuple(_read(cell) for cell in row.split("&")) for row in rows))
    cases = _CASES.fullmatch(text)
    if cases and "&" not in text:
        return Several("list", tuple(_read(row) for row in cases.group(1).split(r"\\") if row.strip()))
    if read_quantity(text) is not None:  # thousands, and units with "and" in their names, have commas and spaces of their own
        return Value(text)
    parts = _split(text, _SEPARATOR)
    if len(parts) > 1 and all(part.strip() for part in parts):
        return Several("list", tuple(_read(part) for part in parts))
    sides = _split(text, _EQUALS)
    if len(sides) > 1 and sides[-1].strip():
        return _read_equation(text, [side.strip() for side in sides])
    if member := _MEMBER.match(text):
        return _named(_read(text[member.end() :]), member.group(1))
    parts = _split(text, _UNION)
    if len(parts) > 1:
        return Several("union", tuple(_read(part) for part in parts))
    if (inside := _bracketed(text)) is not None:
        return _read_brackets(text, *inside)
    if interval := _read_inequality(text):
        return interval
    if text.count(r"\pm") == 1 and r"\mp" not in text:
        return Several("list", tuple(_read(text.replace(r"\pm", sign).lstrip("+ ")) for sign in ("+", "-")))
    return Value(text)


def _read_equation(text: str, sides: list[str]) -> Shape:
    if _NAME.fullmatch(sides[0]):
        return _named(_read(sides[-1]), sides[0])
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[1]) and read_quantity(sides[0]) is not None:  # 5 = x
        return _named(_read(sides[0]), sides[1])
    if _OPERATION.search(sides[0]):  # the integral that is asked for, and its value
        return _read(sides[-1])
    if re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", sides[0])) and len(sides) == 2:
        return Value(text, equation=(sides[0], sides[1]))
    return _read(sides[-1])  # 2 + 3 = 5


def _read_brackets(text: str, opening: str, content: str, closing: str) -> Shape:
    is_set = opening == r"\{"
    if is_set and re.search(r"\\mid|\||:", content):
        # A set by its condition: where that is an interval, the interval.
        condition = _CONDITION.fullmatch(content.strip())
        interval = _read(condition.group(1)) if condition else None
        return interval if isinstance(interval, Several) and interval.kind == "tuple" else Value(text)
    # Within brackets a comma parts: (1,234) is a pair.
    items = tuple(_read(part) for part in _split(content, _SEPARATOR) if part.strip())
    if len(items) == 1 and not is_set:
        return items[0]
    return Several("set" if is_set else "tuple", items, brackets=opening + closing)


def _read_inequality(text: str) -> Shape | None:
    """1 < x \\le 2 is the interval (1, 2], x > 1 is (1, \\infty)."""
    sides = [side.strip() for side in _split(text, _RELATION)]
    signs = _RELATION.findall(text)
    if len(sides) != len(signs) + 1 or not all(sides):
        return None
    less = [sign in ("<", r"\le") for sign in signs]
    if len(sides) == 2 and _NAME.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]):  # 1 < x
        sides, less = sides[::-1], [not less[0]]
    name = sides[1] if len(sides) == 3 else sides[0]
    if not name or not _NAME.fullmatch(name) or len(set(less)) > 1:
        return None
    strict = [sign in "<>" for sign in signs]
    if len(sides) == 2:
        bound = _read(sides[1])
        closed = "" if strict[0] else "="
        infinity = Value(r"-\infty" if less[0] else r"\infty")
        items, brackets = ((infinity, bound), "(" + "])"[not closed]) if less[0] else ((bound, infinity), "[("[not closed] + ")")
        return Several("tuple", items, brackets=brackets, name=name)
    if len(sides) == 3:
        low, high = (0, 2) if less[0] else (2, 0)
        strict = strict if less[0] else strict[::-1]
        brackets = "[("[strict[0]] + "])"[strict[1]]
        return Several("tuple", (_read(sides[low]), _read(sides[high])), brackets=brackets, name=name)
    return None


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Parts between separators that stand outside all brackets."""
    parts, start, depth, position = [], 0, 0, 0
    matches = {match.start(): match.end() for match in separator.finditer(text) if match.end() > match.start()}
    while position < len(text):
        if depth == 0 and position in matches:
            parts.append(text[start:position])
            start = position = matches[position]
            continue
        depth = max(0, depth + (text[position] in _OPENING) - (text[position] in _CLOSING))
        position += 1
    return [*parts, text[start:]]


def _bracketed(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content and closing bracket, when one pair encloses the whole text."""
    for opening in ("(", "[", r"\{", "{"):
        if text.startswith(opening):
            closing = next((end for end in (r"\}", ")", "]", "}") if text.endswith(end)), None)
            if closing is None or ("{" in opening) != ("}" in closing) or len(text) < len(opening) + len(closing):
                return None
            content = text[len(opening) : len(text) - len(closing)]
            depth = 0
            for character in content:
                depth += (character in _OPENING) - (character in _CLOSING)
                if depth < 0:
                    return None
            if opening == "{" and not re.search(r"[,;]", content):
                return (opening, content, closing) if depth == 0 else None
            return (r"\{" if "{" in opening else opening, content, r"\}" if "}" in closing else closing)
    return None


def _named(shape: Shape, name: str) -> Shape:
    """x = 5; with (x, y) = (1, 2) the elements have names too."""
    if isinstance(shape, Value):
        return Value(shape.text, name=name, equation=shape.equation)
    if isinstance(shape, Matrix):
        return Matrix(shape.rows, name=name)
    items, names = shape.items, [one.strip() for one in name.strip("()").split(",")]
    if name.startswith("(") and shape.kind == "tuple" and len(names) == len(items) > 1:
        items = tuple(_named(item, one) for item, one in zip(items, names, strict=True))
    return Several(shape.kind, items, brackets=shape.brackets, name=name)


def _single(shape: Shape) -> Shape:
    """The only element of a set or list of one; the set of a set, or of the empty set, is another thing."""
    if not isinstance(shape, Several) or len(shape.items) != 1:
        return shape
    (item,) = shape.items
    is_set = item == Value(r"\emptyset") or (isinstance(item, Several) and item.kind == "set")
    return shape if is_set else item


def _compare_values(found: Value, expected: Value, compare: CompareValues) -> bool | None:
    if (found.equation is None) == (expected.equation is None):
        return compare(found.text, expected.text)
    equation, other = (found, expected) if found.equation else (expected, found)
    assert equation.equation is not None
    if other.name:  # y = 2x + 1 and 2x - y + 1 = 0
        return compare(equation.text, f"{other.name}={other.text}")
    # m + n = 5 names what is asked for; x + 1 = 6 is a condition on x
    names_a_value = equation is found and not re.search(r"\d", _INDEX.sub("", equation.equation[0]))
    return compare(equation.equation[1], other.text) if names_a_value else False


def _compare_several(found: Several, expected: Several, compare: CompareValues) -> bool | None:
    kinds = {found.kind, expected.kind}
    if "union" in kinds:
        same = _compare_unordered(found.items, expected.items, compare) if kinds <= {"union", "list"} else False  # x < 1 or x > 2
        return same or None  # [0, 1] and [1, 2] make [0, 2]: algebra of sets
    if kinds == {"set", "tuple"} or len(found.items) != len(expected.items):
        return False
    if "set" in kinds and _num_sets(found) != _num_sets(expected):  # {{1}, {2}} and {1, 2}
        return False
    names = [[_bare(item.name) for item in several.items] for several in (found, expected)]
    if all(all(row) and len(set(row)) == len(row) for row in names):  # x = 1, y = 2
        if set(names[0]) != set(names[1]):
            return False
        of_name = dict(zip(names[0], found.items, strict=True))
        return _all(compare_shapes(of_name[name], item, compare) for name, item in zip(names[1], expected.items, strict=True))
    if "tuple" not in kinds:
        return _compare_unordered(found.items, expected.items, compare)
    # Two values in square brackets are an interval
    is_interval = len(found.items) == 2 and any("[" in one.brackets or "]" in one.brackets for one in (found, expected))
    if is_interval and found.brackets != expected.brackets:
        return False
    return _all(compare_shapes(a, b, compare) for a, b in zip(found.items, expected.items, strict=True))


def _num_sets(shape: Several) -> int:
    return sum(isinstance(item, Several) and item.kind == "set" for item in shape.items)


def _compare_unordered(found: Sequence[Shape], expected: Sequence[Shape], compare: CompareValues) -> bool | None:
    if len(found) != len(expected):
        return False
    left, unknown = list(expected), False
    for item in found:
        outcomes = [compare_shapes(item, other, compare) for other in left]
        if True in outcomes:
            del left[outcomes.index(True)]
        elif None in outcomes:
            unknown = True
        else:
            return False
    return None if unknown else True


def _compare_matrices(found: Matrix | None, expected: Matrix | None, compare: CompareValues) -> bool | None:
    if found is None or expected is None:
        return False
    if [len(row) for row in found.rows] != [len(row) for row in expected.rows]:
        return False
    cells = [(a, b) for rows in zip(found.rows, expected.rows, strict=True) for a, b in zip(*rows, strict=True)]
    return _all(compare_shapes(a, b, compare) for a, b in cells)


def _as_matrix(shape: Shape) -> Matrix | None:
    """[[1, 2], [3, 4]] is a matrix, (1, 2) a vector: one column."""
    if isinstance(shape, Matrix):
        return Matrix(tuple(zip(*shape.rows, strict=True))) if len(shape.rows) == 1 else shape
    if isinstance(shape, Several) and shape.kind in ("tuple", "list"):
        rows = [item.items if isinstance(item, Several) and item.kind == "tuple" else (item,) for item in shape.items]
        return Matrix(tuple(rows))
    return None


def _all(outcomes: Iterable[bool | None]) -> bool | None:
    unknown = False
    for outcome in outcomes:
        if outcome is False:
            return False
        unknown |= outcome is None
    return None if unknown else True


def _is_about_sets(shape: Shape) -> bool:
    if isinstance(shape, Value):
        return re.search(r"\\(?:cup|cap|setminus|mathbb|emptyset|in)(?![a-z])", shape.text) is not None
    return isinstance(shape, Several) and shape.kind == "union"


def _same_in_bases(found: re.Match[str], expected: re.Match[str]) -> bool:
    """Digits and base; like a unit, a base that only one of them gives does not part them."""
    for one in (found, expected):
        if one[2] is not None and not all(int(digit, 16) < int(one[2]) for digit in one[1]):
            return False
    same_digits = found[1].lstrip("0").casefold() == expected[1].lstrip("0").casefold()
    return same_digits and (found[2] == expected[2] or None in (found[2], expected[2]))


def _all_of(pattern: re.Pattern[str], *texts: str) -> list[re.Match[str]]:
    """The matches of all texts, none unless all match."""
    matches = [match for text in texts if (match := pattern.fullmatch(text.strip()))]
    return matches if len(matches) == len(texts) else []


def _bare(text: str) -> str:
    """Without case and spaces, but for those that part numbers."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).casefold()
