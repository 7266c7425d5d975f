"""What a prompt is about: its domain, which chooses the grader, and its discipline. A field that the file gives wins over both rules.

Discipline: the one of whose pattern the most different words are found wins, the earlier one where two are equal; four everyday words of
arithmetic outweigh a single other one; `other` where none is found. The tables are coarse on purpose: they balance a prompt set and
select parts of it, they grade nothing.
"""

import re
from collections.abc import Mapping
from typing import Any

OTHER = "other"

# In order of precedence: a triangle in a question about probability counts for geometry only with more words of its own.
_WORDS: dict[str, str] = {
    "calculus": (
        r"derivatives?|differentiab\w*|integrals?|integrate\w*|antiderivative|limits? (?:of|as)|\\int(?![a-z])|\\lim(?![a-z])"
        r"|taylor|converges?|diverges?|d/dx|\\frac\{d\w*\}\{d\w+\}|gradient|tangent line|导数|积分|極限|极限|微分|미분|적분|극한"
        r"|도함수"
    ),
    "linear_algebra": (
        r"matri(?:x|ces)|determinants?|eigenvalues?|eigenvectors?|vector spaces?|linear transformations?|pmatrix|bmatrix|行列式"
        r"|矩阵|특성값|행렬"
    ),
    "probability": (
        r"probabilit\w*|expected value|expectation|random(?:ly)?|dice|die|coin (?:flips?|toss\w*)|fair coin|independent events"
        r"|概率|期望|随机|확률|기댓값|주사위|동전"
    ),
    "statistics": (
        r"median|variance|standard deviation|mean (?:of|is)|histogram|quartiles?|percentile|平均数|方差|中位数|표준편차|중앙값"
        r"|분산"
    ),
    "combinatorics": (
        r"how many (?:different |distinct )?(?:ways|arrangements|(?:nonempty )?subsets|sequences|permutations|combinations|paths|colorings)"
        r"|number of ways|permutations?|combinations?|arrangements?|binom\w*|pigeonhole|choose \d+|distinct ways|排列|组合"
        r"|多少种|경우의 수|순열|조합"
    ),
    "number_theory": (
        r"prime(?:s| numbers?| factors?)?|divisible|divisors?|divides|remainders?|modulo|\\?pmod|\bmod\b|gcd|lcm|greatest common"
        r"|least common multiple|coprime|relatively prime|integers?|digits?|perfect squares?|base[- ]\d+|整除|质数|素数|余数"
        r"|公约数|公倍数|整数|소수|약수|배수|나머지|정수|자연수"
    ),
    "geometry": (
        r"triangles?|circles?|angles?|polygons?|rectangles?|squares? with|side length|perimeter|circumference|radius|diameter"
        r"|hypotenuse|quadrilaterals?|pentagons?|hexagons?|trapezoids?|parallelograms?|rhombus|cubes?|spheres?|cylinders?|cones?"
        r"|pyramids?|prisms?|tangent to|perpendicular|parallel lines|midpoint|bisector|areas?|coordinate plane|vertices|vertex"
        r"|circumcircle|incircle|collinear|\\angle|\\triangle|slopes?|三角形|圆|角|平行|垂直|面积|体积|四边形|삼각형|원의|각의"
        r"|넓이|부피|사각형|평행|수직"
    ),
    "trigonometry": r"\\?sin(?![a-z])|\\?cos(?![a-z])|\\?tan(?![a-z])|sine|cosine|trigonometr\w*|三角函数|삼각함수",
    "algebra": (
        r"equations?|polynomials?|roots? of|solve for|quadratic|cubic|linear|functions?|inequalit\w*|variables?|expressions?"
        r"|simplify|factor(?:ed|ise|ize|ing)?|sequence|arithmetic progression|geometric progression|logarithms?|\\?log(?![a-z])"
        r"|exponents?|coefficients?|complex numbers?|real numbers?|x\s*[=+^-]|[-+=]\s*\d*x\b|方程|函数|多项式|不等式|数列|방정식"
        r"|함수|다항식|부등식|수열"
    ),
    "physics": (
        r"velocity|acceleration|newtons?|joules?|kinetic|momentum|friction|electric (?:field|charge)|voltage|circuit|resistors?"
        r"|ohms?|gravitational|wavelength|photon|magnetic|projectile|thermodynamic\w*|速度|加速度|电压|电阻|动能|速率|가속도"
        r"|전압|저항|운동량"
    ),
    "chemistry": r"moles?|molar(?:ity)?|chemical|reaction|titrat\w*|atoms?|molecules?|oxid\w*|\bpH\b|acids?|化学|摩尔|反应|화학|몰|반응",
    "biology": r"dna|rna|proteins?|genes?|species|enzymes?|photosynthesis|organisms?|chromosomes?|细胞|基因|蛋白|세포|유전자|단백질",
    "programming": (
        r"write a (?:function|program)|implement|def \w+\(|python|javascript|c\+\+|array|stdin|algorithm|编写|程序|프로그램"
        r"|알고리즘"
    ),
    "arithmetic": (
        r"how (?:many|much)|total|altogether|each|costs?|dollars?|cents?|\$\d+|twice|half|times as|more than|fewer|left"
        r"|remain\w*|per|sold?|buys?|bought|earns?|paid|pays?|percent|%|hours?|minutes?|days?|weeks?|一共|多少|每|모두|얼마|몇"
    ),
}
_PATTERNS = {name: re.compile(rf"(?<![a-z])(?:{words})(?![a-z])", re.IGNORECASE) for name, words in _WORDS.items()}
DISCIPLINES = (*_PATTERNS, OTHER)
# Everyday words, which stand in questions of every kind: they decide where nothing else is found, or so many against a single word.
_EVERYDAY, _MANY_EVERYDAY = "arithmetic", 4

# What contests add for an answer that is a whole number; it says nothing about the question.
_ANSWER_FORM = re.compile(r"(?:where|for)\b[^.]{0,80}\brelatively prime\b[^.]*|\bfind \$?m\s*\+\s*n\$?", re.IGNORECASE)

_WORDS_ONLY = re.compile(r"[^\W\d_]+(?:[\s,;'’.-]+[^\W\d_]+)*[\s.]*")
_MATHEMATICAL_WORDS = frozenset(
    (
        "pi",
        "sqrt",
        "infinity",
        "inf",
        "sin",
        "cos",
        "tan",
        "log",
        "ln",
        "none",
        "undefined",
        "empty",
        "set",
        "odd",
        "even",
        "no",
        "solution",
    )
)


def domain_of(record: Mapping[str, Any], answer: str, default: str) -> str:
    """`code` for a prompt with `grading.tests`; `k12` for an answer in words that are not mathematics; otherwise the default.

    A domain that the record names is not looked at here: it wins.
    """
    grading = record.get("grading")
    if isinstance(grading, Mapping):
        if "tests" in grading:
            return "code"
        if "type" in grading:
            return "k12"
    words = set(re.findall(r"\w+", answer.casefold()))
    is_word = any(len(word) > 2 or not word.isascii() for word in words)  # x, or xy, is a variable or a product
    return "k12" if is_word and _WORDS_ONLY.fullmatch(answer.strip()) and not _MATHEMATICAL_WORDS & words else default


def discipline_of(question: str) -> str:
    """One of DISCIPLINES."""
    question = _ANSWER_FORM.sub("", question)
    counts = {name: len({found.group().casefold() for found in pattern.finditer(question)}) for name, pattern in _PATTERNS.items()}
    everyday = counts.pop(_EVERYDAY)
    best = max(counts, key=lambda name: counts[name])
    if counts[best] > 1 or (counts[best] == 1 and everyday < _MANY_EVERYDAY):
        return best
    return _EVERYDAY if everyday else OTHER
