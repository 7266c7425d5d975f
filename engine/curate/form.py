"""Questions whose form lets a guess pass, or leaves nothing to compare: multiple choice, true or false, proofs (Kimi k1.5, 2.1).

Rules over the text and the reference, for English, Chinese and Korean; the tables below are all of them. A wrong exclusion costs one
prompt, a wrong inclusion rewards guessing: where both readings are likely, the prompt goes.
"""

import re
import unicodedata
from typing import Literal

Form = Literal["multiple_choice", "true_false", "proof"]

_FEWEST_OPTIONS = 3
_LOOK_BACK_CHARS = 200  # for an open parenthesis
_CIRCLED = "①②③④⑤"
_FEWEST_CIRCLED = 4  # two or three of them often number conditions or statements
# An option's label: (A) or A) in the line, A. or A: or A、 at its beginning. P(A) and f(A) are none, and lower-case letters number parts.
_LABEL = re.compile(
    r"(?<![A-Za-z0-9_)\]])\((?P<both>[A-H])\)|(?P<close>(?<![\w(])[A-H])\)|(?:^|\n)[ \t]*(?P<line>[A-H])[.:．：、][ \t]*(?=\S)"
)
_DRESSING = re.compile(r"\\(?:textbf|textrm|text|mathrm|mathbf|rm|bf|q?quad)(?![a-z])\s*|[{}$]|\\[()\[\]]")

_CHOICE_CUES = re.compile(
    r"\bwhich (?:one )?of (?:the following|these (?:statements|options|choices|answers))\b|\b(?:all|none|both) of the above\b"
    r"|(?:^|[.?!:;\n]\s*)(?:please )?(?:choose|select|pick|circle) (?:the |a |an |one |all |which )?"
    r"(?:\w+ ){0,2}?(?:answers?|options?|choices?|statements?|that apply)\b"
    r"|\bamong the following (?:options|choices|answers|statements)\b"
    r"|(?:下列|以下|下面)[^。？?!！\n]{0,40}?(?:的是|的有|哪[一些]?[个项种]?|者是)|选择题|单选|多选|[选項项]项中|四个选项|다음\s*중"
    r"|(?:고르|선택하)(?:시오|세요|십시오|면|라)|(?:옳은|옳지\s*않은|알맞은|적절한|틀린|올바른|맞는)\s*것(?:은|을|만)"
    r"|[<〈＜]\s*보기\s*[>〉＞]",
    re.IGNORECASE,
)
_LETTER_ANSWER = re.compile(r"\(?([A-H]|[①-⑤])[).]?")

_BOOLEAN_CUES = re.compile(
    r"\btrue\s*(?:or|/|\|)\s*false\b|\bT\s*/\s*F\b|\byes\s*(?:or|/)\s*no\b"
    r"|\b(?:is|are) the following (?:statements?|claims?|assertions?|equations?) (?:true|correct|valid)\b"
    r"|\b(?:state|decide|determine|say|tell|judge) (?:whether|if) (?:the |this |each |these )?(?:\w+ )?"
    r"(?:statements?|claims?|assertions?)\b"
    r"|判断题|判断(?:下列|以下|对错|正误|真假|正确)|对还是错|是否(?:正确|成立)|(?:正确|对|成立)吗|참(?:인지|과|\s*또는|\s*/)\s*거짓"
    r"|참\s*,\s*거짓|[OＯ○]\s*[/,]\s*[X×Ｘ]|맞으면|예\s*(?:또는|/)\s*아니",
    re.IGNORECASE,
)
_BOOLEAN_ANSWERS = frozenset(
    (
        *("true", "false", "yes", "no", "correct", "incorrect", "right", "wrong", "valid", "invalid", "o", "x", "√", "×", "✓", "✗"),
        *("참", "거짓", "예", "네", "아니오", "아니요", "맞다", "틀리다", "맞음", "틀림", "옳다", "옳지 않다", "그렇다", "아니다"),
        *("是", "否", "不是", "对", "错", "對", "錯", "正确", "错误", "不正确", "正確", "錯誤", "真", "假", "成立", "不成立"),
    )
)
# Also a variable, a direction, a count: only where the question asks for such an answer.
_NOT_BOOLEAN_ALONE = frozenset(("o", "x", "right", "真", "假", "no"))

# A sentence that orders a proof; "it can be shown that" and "he wants to prove that" order none.
_ORDER = r"(?:^|[.?!:;,\n)]\s*|\b(?:and|then|hence|please|now|or)\s+)"
_PROOF_CUES = re.compile(
    rf"{_ORDER}(?:dis)?prove(?:\s+(?:that|the|it|this|or disprove|by|your|for|there|if|\$)|\s*:)"
    rf"|{_ORDER}show\s+(?:that|there exists?|by induction)\b"
    r"|(?:^|[.?!:;\n)]\s*)(?:verify|demonstrate|establish)\s+that\b"
    r"|\b(?:give|write|provide|present|construct|complete|find)\s+(?:a|the|an?\s+\w+)\s+proof\b"
    r"|\buse\b[^.?!\n]{0,80}\bto\s+(?:prove|show|derive)\s+that\b"
    r"|求证|求證|试证|試證|(?:^|[。;:,.?\s)])(?:请|請|试|試|求|并|并且|因此)?(?:证明|證明)(?![书書人材了的过過])"
    r"|증명(?:하시오|하여라|하라|하세요|하십시오|해\s*보|해라|하고)|(?:임|음|함|됨|있음|없음)을\s*(?:보이|보여|증명)|보이시오|보여라",
    re.IGNORECASE,
)
_PROOF_ANSWERS = re.compile(
    r"(?:see |refer to )?(?:the )?(?:proof|solution|explanation)s?(?: (?:is )?(?:above|below|omitted|required))?|q\.?\s*e\.?\s*d\.?"
    r"|证明略|證明略|略|见解析|证明见解析|見解析|해설\s*참조|풀이\s*참조|증명\s*(?:참조|생략)|\\blacksquare|\\square|∎",
    re.IGNORECASE,
)


def excluded_form(question: str, answer: str) -> tuple[Form, str] | None:
    """The form for which a prompt is excluded and the words that show it, or None.

    Args:
        answer: the reference; a cue for true or false in the text does not count when it has a digit, because a story may speak of a quiz.
    """
    question, bare = unicodedata.normalize("NFKC", _circled_kept(question)), _bare(answer)
    if _PROOF_ANSWERS.fullmatch(bare):
        return "proof", f"the answer is {answer!r:.60}"
    if found := _PROOF_CUES.search(question):
        return "proof", _quoted(found)
    if letter := _LETTER_ANSWER.fullmatch(_bare(answer, casefold=False)):
        return "multiple_choice", f"the answer is the option {letter.group(1)}"
    if labels := _options(question):
        return "multiple_choice", f"options {labels}"
    boolean = _BOOLEAN_CUES.search(question)
    if bare in _BOOLEAN_ANSWERS and (boolean or bare not in _NOT_BOOLEAN_ALONE or (bare == "no" and _asks_yes_or_no(question))):
        return "true_false", f"the answer is {answer!r:.60}"
    if boolean and not any(character.isdigit() for character in bare):
        return "true_false", _quoted(boolean)
    if found := _CHOICE_CUES.search(question):
        return "multiple_choice", _quoted(found)
    return None


def _asks_yes_or_no(question: str) -> bool:
    return (
        re.search(r"(?:^|[.?!,\n]\s*)(?:is|are|was|were|do|does|did|can|could|will|would|has|have|should)\b[^.!?]*\?", question, re.I)
        is not None
    )


def _circled_kept(text: str) -> str:
    """NFKC turns ① into 1: a placeholder that it leaves alone."""
    return text.translate({ord(sign): f"\ue000{i}" for i, sign in enumerate(_CIRCLED)})


def _options(question: str) -> str:
    """The labels of a list of options, in their order from A (or ①) on; "" where there are too few."""
    circled = [i for i in range(len(_CIRCLED)) if f"\ue000{i}" in question]
    if len(circled) >= _FEWEST_CIRCLED and circled == list(range(len(circled))):
        return "".join(_CIRCLED[: len(circled)])
    plain, wanted = _DRESSING.sub(" ", question), "A"
    for found in _LABEL.finditer(plain):
        label = found.group("both") or found.group("close") or found.group("line")
        if label == wanted and not (found.group("close") and _is_inside_parentheses(plain, found.start())):
            wanted = chr(ord(wanted) + 1)
    num_options = ord(wanted) - ord("A")
    return "A-" + chr(ord(wanted) - 1) if num_options >= _FEWEST_OPTIONS else ""


def _is_inside_parentheses(text: str, end: int) -> bool:
    """Whether the ")" after `end` closes something of its own line: "(X, A)" is no label."""
    line = text[max(text.rfind("\n", 0, end) + 1, end - _LOOK_BACK_CHARS) : end]
    depth = 0
    for character in line:
        depth = max(0, depth + (character == "(") - (character == ")"))
    return depth > 0


def _bare(answer: str, *, casefold: bool = True) -> str:
    plain = _DRESSING.sub("", unicodedata.normalize("NFKC", answer) if answer.strip() not in _CIRCLED else answer)
    plain = re.sub(r"\s+", " ", plain).strip(" .。!:;\"'")
    return plain.casefold() if casefold else plain


def _quoted(found: re.Match[str]) -> str:
    return f'the question says "{" ".join(found.group().split()).lstrip(".,:;?!) ")}"'
