"""One spelling for what LaTeX, Unicode and people write in many, without any change of value."""

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SYMBOLS = {
    **{"−": "-", "–": "-", "—": "-", "×": r" \times ", "⋅": r" \cdot ", "·": r" \cdot ", "∙": r" \cdot ", "÷": "/", "⁄": "/", "∕": "/"},
    **{"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "√": r"\sqrt", "°": r"^{\circ}", "℃": r"^{\circ} C"},
    **{
        "、": ",",
        "，": ",",
        "；": ";",
        "。": ".",
        "｛": "{",
        "｝": "}",
        "“": "",
        "”": "",
        "θ": r"\theta ",
        "α": r"\alpha ",
        "β": r"\beta ",
    },
}
_SYMBOL = re.compile("|".join(_SYMBOLS))
_NO_SPACE = r"\\[!,;: ]|~|\u00a0|\u202f|\u2009|\{,\}|,\\!"

_REPLACEMENTS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Thousands in LaTeX's and typographers' ways: 1{,}234  1,\!234  1\,234
        (rf"(?<=\d)(?:{_NO_SPACE})+(?=\d{{3}}(?!\d))", ""),
        (
            r"\\(?:displaystyle|textstyle|limits|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg|left|right|mleft|mright|middle)(?![a-z])",
            "",
        ),
        (r"\\(?:quad|qquad|hspace\*?\{[^{}]*\})|(?<!\\)\\[!,;: ]|~", " "),
        (r"\\(?:bf|rm|it|sf)(?![a-z])", ""),
        (r"\\(?:[dtcs]|nice)frac", r"\\frac"),
        (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
        (r"\\(?:text)?color\s*\{\w+\}|\\underline(?=\s*\{)", ""),
        (r"(?<![A-Za-z\\])(exp|ln|log|sin|cos|tan)(?=\s*\()", r"\\\1"),
        (r"(?i)(?<=\d)\s*([ap])\.?\s?m\b\.?", r" \1m"),
        (r"\\(?:leq|leqslant|leq?q)(?![a-z])", r"\\le"),
        (r"\\(?:geq|geqslant|geqq)(?![a-z])", r"\\ge"),
        (r"\\neq(?![a-z])", r"\\ne"),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\(?:lbrace|lbrack)(?![a-z])", lambda match: r"\{" if "brace" in match.group() else "["),
        (r"\\(?:rbrace|rbrack)(?![a-z])", lambda match: r"\}" if "brace" in match.group() else "]"),
        (r"\\langle(?![a-z])", "("),
        (r"\\rangle(?![a-z])", ")"),
        (r"\\(?:varnothing|\{\s*\\\})", r"\\emptyset"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-z])", " degrees "),
        (r"\\%", "%"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)(?!\d)", r"\1{\2}"),
        (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?<=\d)\s?(?:st|nd|rd|th)\b", ""),
        (r"\*\*", "^"),
        (r"(?<=[\w)}])\s*\*\s*(?=[\w({\\])", r" \\cdot "),
        (r"\^\s*\(\s*([-+]?\d+)\s*\)", r"^{\1}"),
        (r"\^\s*([-+]\d+|\d{2,})", r"^{\1}"),  # TeX would raise the first digit only; nobody means that
        (r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}", r"\\binom{\1}{\2}"),
        (r"\\\\\s*$", ""),
        (r"\s+", " "),
        (r"(?i)^\s*(?:the\s+)?(?:final\s+)?answers?\s*(?:is|are|:)\s*:?\s*(?=\S)", ""),
        (r"^\s*(?:\\approx|≈|approximately|about|약)(?![a-z])\s*", ""),
        (r"^\s*\](?=[^\[\]()]*,[^\[\]()]*[\[\]]\s*$)", "("),  # ]1, 2[ is (1, 2)
        (r"(?<=[^\[\]()])\[\s*$", ")"),
        # For any integer k
        (r"(?<=\S)\s*[,;(]\s*(?:where |for (?:any |all )?)?[a-z]\s*\\in\s*\\mathbb\s*\{?\s*[ZN]\s*\}?[^,;()]*\)?$", ""),
    )
)
_INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?(?!\d)")
_FONTS = "text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|bm|boldsymbol|[mh]box|f?box(?:ed)?"
_WRAPPED = re.compile(rf"\\(?:{_FONTS})\s*\{{([^{{}}]*)\}}")
_MATH_DELIMITERS = re.compile(r"(?<!\\)\\[\[\]()]")
_DOLLAR_PAIR = re.compile(r"(?<!\\)(\$\$?)(.+?)(?<!\\)\1")
# Powers of powers as programs write them, the highest two first: 2^3^4 is 2^{3^4}.
_NESTED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_TOWER = re.compile(rf"\^\s*(\w+|{_NESTED})\s*\^\s*(\w+|{_NESTED})(?!\s*\^)")
_MAX_TOWER = 4
# An answer letter before the answer itself: "(E) 27".
_CHOICE = re.compile(r"^\(\s*[A-J]\s*\)\s*(?=\S)(?!\(?[A-J]\)?$)")
# Thousands and decimals as they are written in Europe, where they cannot be read in another way: 1.234,5  1.234.567  1 234  1 234,5
_EUROPEAN = re.compile(
    r"([-+]?\s*(?:\\?\$|[€£¥₩₹])?\s*[1-9]\d{0,2})"
    r"(?:((?:\.\d{3})+),(\d+)|((?:\.\d{3}){2,})|((?:[ '’]\d{3})+)(?:[.,](\d+))?)((?![\d.,])[^\d\\^_+*/]*)"
)


def normalise(answer: str) -> str:
    """The answer in one spelling: no math delimiters, fonts, spacing commands or closing stop; Unicode symbols as LaTeX.

    Idempotent. The text has at most some thousand characters; the time is linear in them.
    """
    answer = _INVISIBLE.sub("", answer)
    answer = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}", answer)
    answer = re.sub(r"(?<=\d)([½¼¾⅓⅔⅕⅛])", r" \1", answer)
    answer = _SYMBOL.sub(lambda match: _SYMBOLS[match.group()], answer)
    answer = _SYMBOL.sub(lambda match: _SYMBOLS[match.group()], unicodedata.normalize("NFKC", answer))
    answer = _DOLLAR_PAIR.sub(r"\2", _MATH_DELIMITERS.sub("", answer))
    for _ in range(5):  # fonts within fonts
        unwrapped = _WRAPPED.sub(r" \1 ", answer)
        if unwrapped == answer:
            break
        answer = unwrapped
    for pattern, replacement in _REPLACEMENTS:
        answer = pattern.sub(replacement, answer)
    answer = _REPEATING.sub(_as_fraction, answer)
    for _ in range(_MAX_TOWER):
        answer, num_folded = _TOWER.subn(r"^{\1^\2}", answer)
        if not num_folded:
            break
    answer = _CHOICE.sub("", answer.strip(" \t*_`"))
    answer = answer.strip()
    answer = answer if answer.endswith("..") else answer.rstrip(".,;").strip()
    return _EUROPEAN.sub(_with_a_point, answer) if _EUROPEAN.fullmatch(answer) else answer


def _with_a_point(number: re.Match[str]) -> str:
    start, *groups, tail = number.groups("")
    dotted, decimals, dots, spaced, more_decimals = groups
    whole = re.sub(r"\D", "", dotted + dots + spaced)
    return start + whole + ("." if decimals or more_decimals else "") + decimals + more_decimals + tail


def _as_fraction(decimal: re.Match[str]) -> str:
    """0.1\\overline{6} is 15/90."""
    whole, start, period = decimal.groups()
    shift = 10 ** len(start)
    top = int(whole + start + period) - int((whole + start) or "0")
    return rf"\frac{{{top}}}{{{shift * (10 ** len(period) - 1)}}}"
