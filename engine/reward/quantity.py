"""Plain numbers, exactly: fractions, mixed numbers, thousands, powers of ten, percentages, currencies and units of measure."""

import re
from dataclasses import dataclass
from fractions import Fraction

# A decimal may stand for a value that has no end only when it has this many places; it must then be the value, rounded.
MIN_PLACES = 6
MIN_DIGITS = 3  # and more of these after leading zeros

# 1,234,567 and, in India, 12,34,567
_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|[1-9]\d?(?:,\d{2})+,\d{3}(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_QUANTITY = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?P<currency>(?:US|HK|NT)?\\?\$|[€£¥₩₹]|USD|Rs\.?)?\s*(?P<inner_sign>[-+]?)\s*
      (?: \\frac\{{\s*(?P<top>[-+]?\s*{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>[-+]?\s*{_DECIMAL})\s*\}}
        | (?P<whole>\d+)\s*(?:\\frac\{{(?P<mixed_top>\d+)\}}\{{(?P<mixed_bottom>\d+)\}}|[ ](?P<plain_top>\d+)/(?P<plain_bottom>\d+))
        | (?P<number>{_DECIMAL}) (?: \s*/\s*(?P<over>{_DECIMAL}) | [eE](?P<exponent>[-+]?\d{{1,3}})(?!\d) )?
          (?: \s*(?:\\times|\\cdot|x)\s*10\^(?:\{{\s*(?P<power>[-+]?\d{{1,3}})\s*\}}|(?P<digit_power>\d)(?!\d)) )?
      )\s*(?P<tail>.*)""",
    re.VERBOSE | re.DOTALL,
)
_MAGNITUDES = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"百": 10**2, "千": 10**3, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8, "백": 10**2, "천": 10**3, "만": 10**4, "억": 10**8},
}
_PERCENT = re.compile(r"(?:%|percent(?:age)?(?: points?)?|pct|퍼센트|프로)(?:\s+off?\b[a-z\s]*)?", re.IGNORECASE)
_MAGNITUDE = re.compile(rf"({'|'.join(_MAGNITUDES)})(?![a-z])\s*", re.IGNORECASE)

# name → (dimension, size in the dimension's first unit). Other words after a number count things and are not compared.
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(size))
    for dimension, sizes in {
        "length": {
            **{
                "m meter metre 米 미터": "1",
                "mm millimeter millimetre 毫米": "1/1000",
                "cm centimeter centimetre 厘米 公分 센티미터": "1/100",
            },
            **{"dm decimeter": "1/10", "km kilometer kilometre 千米 公里 킬로미터": "1000", "mi mile 英里": "1609.344"},
            **{"in inch inches": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144"},
        },
        "time": {
            "s sec second 秒 초": "1",
            "min minute 分钟 分鐘 분": "60",
            "h hr hour 小时 小時 시간": "3600",
            "day 天 일": "86400",
            "ms": "1/1000",
        },
        "mass": {
            "g gram gm 克 그램": "1",
            "kg kilogram 千克 公斤 킬로그램": "1000",
            "mg milligram": "1/1000",
            "lb pound": "453.59237",
            "oz ounce": "28.349523125",
        },
        "volume": {"L l liter litre 升 리터": "1", "mL ml milliliter millilitre 毫升": "1/1000"},
        "angle": {"degree deg 度 도": "1"},
        "celsius": {"celsius centigrade": "1"},
        "fahrenheit": {"fahrenheit": "1"},
        "morning": {"am": "1"},
        "afternoon": {"pm": "1"},
        "radian": {"rad radian": "1"},
        "dollar": {"dollar \\$ $ USD US$ US\\$": "1", "cent ¢": "1/100"},
        "euro": {"€ euro EUR": "1"},
        "sterling": {"£ GBP": "1", "pence penny": "1/100"},
        "yuan": {"¥ yuan rmb CNY 元": "1"},
        "yen": {"yen JPY": "1"},
        "won": {"₩ won KRW 원": "1"},
        "rupee": {"₹ rupee Rs Rs.": "1"},
    }.items()
    for names, size in sizes.items()
    for name in names.split()
}
_DEGREES = re.compile(r"degrees?\s+(?:C|F|(?=celsius|centigrade|fahrenheit))", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+|[$€£¥₩₹¢]")
_POWER = re.compile(r"\s*\^?\s*\{?\s*([23])\s*\}?")
# Words that change a number, or deny it, rather than say what is counted: wherever they stand, or right after the number.
_NO_UNIT = re.compile(
    r"\b(?:minus|plus|modulo|squared|cubed|factorial|(?:hal[fv]|third|fourth|quarter|fifth|tenth)\w*|below|above|negative|is|isn|are|aren|was|"
    r"not|no|never|wrong|false|if|otherwise|else|unless|except|or|but|maybe|perhaps|possibly|either|neither|nor|than|because|since|then|given|"
    r"at (?:least|most)|d[xyt])\b"
    r"|^(?:mod|base|choose|over|times(?! (?:as|more|the|a|per)\b|$)|versus|vs|in|at|to|for|so|as|by|on|from|with|without|through|until|"
    r"between|when|where|under|remainder|prime)\b"
    r"|以[上下]|[不没多又非至到或]|左右|大于|小于|이상|이하|미만|초과|보다|아니|아닙|아닌|정도",
    re.IGNORECASE,
)
# What cannot be a unit makes the whole text no quantity: "5 + x", "2 and 3".
_UNIT_TEXT = re.compile(r"(?!(?:and|or)\b|和|或|또는|그리고|및)(?:[^\W\d_]+(?:\^?\{?[23]\}?)?[\s./-]*)+")


# 3 hours and 20 minutes
_IN_PARTS = re.compile(rf"({_DECIMAL})\s*([^\W\d_]+)\s*,?\s*(?:and\s+)?({_DECIMAL})\s*([^\W\d_]+)")


@dataclass(frozen=True, slots=True)
class Quantity:
    """`unit` is None for a bare number and for things that are merely counted."""

    value: Fraction
    places: int | None  # decimals written, None for whole numbers and fractions
    is_percent: bool
    unit: tuple[str, Fraction] | None  # dimension, and size in the dimension's first unit


def read_quantity(text: str) -> Quantity | None:
    """What a normalised text says when it is one number, perhaps with a unit; None for anything else.

    Powers of ten have at most three digits, so that no value is large.
    """
    if in_parts := _IN_PARTS.fullmatch(text.strip()):
        return _sum_of(*in_parts.groups())
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    value = _value(match)
    if value is None:
        return None
    tail = match["tail"].strip()
    magnitude = _MAGNITUDE.match(tail)
    while magnitude:
        value *= _MAGNITUDES[magnitude.group(1).lower()]
        tail = tail[magnitude.end() :]
        magnitude = _MAGNITUDE.match(tail)
    is_percent = _PERCENT.fullmatch(tail) is not None
    unit = _UNITS.get(match["currency"]) if match["currency"] else None
    if tail and not is_percent:
        spaced = match["tail"] is not None and match.start("tail") > 0 and text.strip()[match.start("tail") - 1] == " "
        known = read_unit(tail)
        if known is None and not counts_things(f" {tail}" if spaced else tail):
            return None
        if known is not None and len(tail) == 1 and tail.isascii() and tail.isalpha() and not spaced:
            return None  # 5m is five times m, 5 m are metres
        unit = unit or known
    number = match["number"]
    places = len(number.partition(".")[2]) if number and "." in number and not match["over"] else None
    return Quantity(value, places, is_percent, unit)


def same_quantity(a: Quantity, b: Quantity) -> bool:
    """Whether both say the same. A percent sign or a unit that only one of them has does not part them; two units must fit."""
    if a.unit is not None and b.unit is not None:
        if {a.unit[0], b.unit[0]} in ({"angle", "celsius"}, {"angle", "fahrenheit"}):
            return same_value(a.value, a.places, b.value, b.places)
        if a.unit[0] != b.unit[0]:
            return False
        return same_value(a.value * a.unit[1], a.places, b.value * b.unit[1], b.places)
    if a.is_percent != b.is_percent:
        percent, plain = (a, b) if a.is_percent else (b, a)
        return plain.value in (percent.value, percent.value / 100)
    return same_value(a.value, a.places, b.value, b.places)


def same_value(a: Fraction, a_places: int | None, b: Fraction, b_places: int | None) -> bool:
    """Exactly equal, or one is a decimal of at least MIN_PLACES places, most of them after its zeros, and the other rounds to it."""
    if a == b:
        return True
    if (a_places is None) == (b_places is None):
        return False
    decimal, places = (a, a_places) if a_places is not None else (b, b_places)
    assert places is not None
    is_long = places >= MIN_PLACES and abs(decimal) * 10**places >= 10**MIN_DIGITS  # 0.000000 is no rounding of 10^-9
    return is_long and abs(a - b) <= Fraction(1, 2 * 10**places)


def read_unit(text: str) -> tuple[str, Fraction] | None:
    """Dimension and size of a unit of measure: cm, square meters, cm^2, km/h, dollars per day; None for unknown words."""
    text = _DEGREES.sub(lambda match: {"C": "celsius", "F": "fahrenheit"}.get(match.group()[-1].upper(), ""), text.strip())
    top, *bottom = re.split(r"\s*/\s*|\s+per\s+|\s+an?\s+", text, maxsplit=1)
    first = _simple_unit(top)
    if first is None:
        return None
    second = _simple_unit(bottom[0]) if bottom else None
    return first if second is None else (f"{first[0]}/{second[0]}", first[1] / second[1])


def _sum_of(large: str, large_unit: str, small: str, small_unit: str) -> Quantity | None:
    first, second = read_unit(large_unit), read_unit(small_unit)
    if first is None or second is None or first[0] != second[0] or first[1] <= second[1]:
        return None
    value = Fraction(large.replace(",", "")) + Fraction(small.replace(",", "")) * second[1] / first[1]
    return Quantity(value, None, False, first)


def _simple_unit(text: str) -> tuple[str, Fraction] | None:
    prefix = re.match(r"(?:(square|sq\.?|平方|제곱)|(cubic|cu\.?|立方|세제곱))\s*", text)
    power = 1 if prefix is None else 2 if prefix.group(1) else 3
    text = text[prefix.end() :] if prefix else text
    word = _WORD.match(text)
    if word is None:
        return None
    written = _POWER.match(text, word.end())
    rest = text[(written or word).end() :].strip(" .")
    if rest and counts_things(f" {rest}") is False:  # 5 in 6; 5 m long is a length
        return None
    name = word.group()
    for candidate in (name, name.lower(), name.lower().removesuffix("s"), name.lower().removesuffix("es")):
        if candidate in _UNITS and (len(name) > 2 or candidate == name):
            dimension, size = _UNITS[candidate]
            power = int(written.group(1)) if written else power
            return (dimension if power == 1 else f"{dimension}^{power}", size**power)
    return None


def counts_things(text: str) -> bool:
    """Whether what follows a number only says what is counted: apples, 个, 명, students per class.

    A lone letter is a variable; so are letters that stick to the number. Words such as minus, dozen, below or not change it.
    """
    tail = text.strip()
    if _NO_UNIT.search(tail) or not _UNIT_TEXT.fullmatch(tail):
        return False
    if not tail[0].isascii():
        return True
    return text[0] == " " and "^" not in tail and len(re.findall(r"[A-Za-z]+", tail)[0]) > 1


def _value(match: re.Match[str]) -> Fraction | None:
    def number(name: str) -> Fraction:
        return Fraction(match[name].replace(",", "").replace(" ", ""))

    if match["top"]:
        top, bottom = number("top"), number("bottom")
    elif match["whole"]:
        part = "mixed" if match["mixed_top"] else "plain"
        top, bottom = number("whole") * number(f"{part}_bottom") + number(f"{part}_top"), number(f"{part}_bottom")
    else:
        top, bottom = number("number"), number("over") if match["over"] else Fraction(1)
        exponent = int(match["exponent"] or 0) + int(match["power"] or match["digit_power"] or 0)
        top *= Fraction(10) ** exponent
    if bottom == 0:
        return None
    return -top / bottom if "-" in (match["sign"], match["inner_sign"]) else top / bottom
