"""Finding the final answer in a response.

In this order: the last \\boxed{…} whose braces close and that is not empty; the last "#### …"; the last "answer is …" in English, Korean
or Chinese; and, in a response that ended by itself, the last number or formula. Only what follows the last </think>
counts. Every search takes linear time: repetitions are bounded.
"""

import re
from collections.abc import Iterator

# An answer may be a large matrix; what is longer is text.
MAX_ANSWER_CHARS = 1_000
# Read from the end. More than 128k tokens of prose have; a pass over it takes a tenth of a second.
MAX_RESPONSE_CHARS = 500_000
# An answer without any mark stands in the last sentences.
_UNMARKED_CHARS = 2_000

_END_OF_REASONING = "</think>"
_BRACES = re.compile(r"\\(?:f|frame)?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)
# $x = -\boxed{5}$, and no dash in a sentence
_NEGATIVE_BOX = re.compile(r"(?:^|[=$(\[])\s{0,5}[-−]\\(?:f|frame)?box(?:ed)?\s{0,40}\{$")
_BARE_BOX = re.compile(r"\\boxed\s*([-+]?[\w.,/]{1,100})")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_PHRASES = re.compile(
    r"""\banswers?\b(?:[ \t]+(?:to|for|of)\b[^\n.:=]{1,80}?)?[*_ \t]*
            (?:\bis\b|\bare\b|\bwas\b|\b(?:will|would|should|must)[ ]be\b|\bequals\b|[:：=]|\n)
      | (?:정답|해답|답)[*_ \t]*(?:은|는|이|[:：=])
      | (?:答案|答案應|答案应)[^\n。，,：:=是为為]{0,20}?(?:是|为|為|等于|等於|[:：=])
      | 答案选|答案選|故选|故選
      | 答[:：]""",
    re.VERBOSE | re.IGNORECASE,
)
_DECORATION = re.compile(r"[\s*_:：=#>]*")
# What follows "the answer is" without being one.
_NO_ANSWER = re.compile(
    r"(?:correct|right|wrong|incorrect|clear|obvious|simple|verified|consistent|reasonable|the same|as follows|below|above|not\b|"
    r"맞|옳|틀|正确|正確|错|錯|对的|對的)",
    re.IGNORECASE,
)
# Says what the answer is not.
_DENIAL = re.compile(
    r"\banswers?\b[^\n.]{0,80}?\b(?:is|are|was|can|could|would|should|must|will|does|do)(?:n?['’]t|not|[ \t]+not)\b"
    r"(?:[^\n.;]|\.(?=\d)){0,200}"
    r"|答案[^\n。]{0,20}?(?:不是|并非|並非|不等于)[^\n。，,]{0,200}|(?:정답|해답|답)[^\n.]{0,100}?(?:아니|아닙)[^\n.]{0,20}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|[。；]|\n")
_CLAUSE = re.compile(
    r",\s+not\b|,?\s+(?:because|since|which|where|when|so|thus|therefore|hence|after|as)\b|，|因为|因為|이므로", re.IGNORECASE
)
# Math in text, as Markdown readers find it: no space just within the dollars, no digit after them. Lengths are bounded.
_MATH = re.compile(
    r"\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)|(?<![\\$])\$(?![\s$])([^$\n]{0,1000}?[^\s\\$])\$(?!\d)", re.DOTALL
)
_OR_ELSE = re.compile(r"\W{0,3}(?:or|alternatively|또는|或)\b[^\n]{0,40}", re.IGNORECASE)
_CONNECTIVE = re.compile(r"\s*(?:,|，|、|;)?\s*(?:and|or|&|和|或者?|및|와|과|또는|그리고)?\s*")
_KOREAN_ENDING = re.compile(r"\s*(?:입니다|이다|이에요|예요|이 된다|가 된다|이 됩니다|가 됩니다|됩니다|이며)[.!]?\s*$")
_NUMBER = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_LAST_NUMBER = re.compile(rf"(?<![A-Za-z0-9_.])[-+−]?(?:[$€£¥₩]\s?)?(?:{_NUMBER}|\.\d+)(?:\s?/\s?{_NUMBER})?\s?%?")
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\w)?")


def extract_answer(response_text: str, *, is_complete: bool = True) -> str | None:
    """The final answer as it is written, or None.

    Args:
        response_text: only its last MAX_RESPONSE_CHARS characters are read.
        is_complete: False for a response that was cut: an unmarked number is then not its answer.
    Returns: text of any length; more than MAX_ANSWER_CHARS is no answer that can be compared.
    """
    text = response_text[-MAX_RESPONSE_CHARS:].rpartition(_END_OF_REASONING)[2]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    hashes = _last(_HASHES.finditer(text))
    if hashes is not None:
        return _statement(hashes.group(1))
    text = _DENIAL.sub(" ", text)
    phrases = [match.end() for match in _PHRASES.finditer(text)]
    for end in reversed(phrases[-20:]):
        start = _DECORATION.match(text, end)
        assert start is not None, "the pattern matches the empty text"
        said = text[start.end() : start.end() + 2 * MAX_ANSWER_CHARS]
        if said and not _NO_ANSWER.match(said):
            return _statement(said)
    return _last_unmarked(text[-_UNMARKED_CHARS:]) if is_complete else None


def _last_boxed(text: str) -> str | None:
    """Content of the last box (the one that begins last) whose braces close; escaped braces do not count."""
    opened: list[int] = []  # where each open brace's content begins; -1 for one that is no box
    last_start, content, is_negative = -1, "", False
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = opened.pop() if opened else -1
            if start > last_start and (inside := text[start : match.start()].strip()):
                last_start, content = start, inside
                is_negative = _NEGATIVE_BOX.search(text, max(0, start - 60), start) is not None
        elif token == "{":
            opened.append(-1)
        elif token[-1] == "{" and token != r"\{":
            opened.append(match.end())
    bare = _last(_BARE_BOX.finditer(text))
    if bare is not None and bare.start() > last_start:
        return bare.group(1).rstrip(".,")
    if last_start < 0:
        return None
    return f"-({content})" if is_negative else content


def _statement(said: str) -> str:
    """The answer that begins a text: a formula, formulas in a row, or a number with its unit; else the sentence."""
    if said.startswith(("$$", r"\[")) and (shown := _MATH.match(said)):
        return _content(shown)
    said = _DECORATION.sub("", said, count=1) if said[:1] in "*_" else said
    end = _SENTENCE_END.search(said)
    sentence = _KOREAN_ENDING.sub("", said[: end.start()] if end else said).strip(" \t*_`")
    formulas = list(_MATH.finditer(sentence))
    if formulas and not any(character.isdigit() for character in sentence[: formulas[0].start()]):
        return _row_of(formulas, sentence)
    clause = _CLAUSE.search(sentence)
    return sentence[: clause.start()].strip() if clause else sentence


def _row_of(formulas: list[re.Match[str]], sentence: str) -> str:
    """The first formula and those that only "and", "or" or a comma parts from it, with the unit after them."""
    row = [_content(formulas[0])]
    end = formulas[0].end()
    for formula in formulas[1:]:
        between = sentence[end : formula.start()]
        if not _CONNECTIVE.fullmatch(between) and not _OR_ELSE.fullmatch(between):
            break
        row.append(_content(formula))
        end = formula.end()
    if len(row) > 1:
        return ", ".join(row)
    unit = re.match(r"\s*(?:\\?%|[A-Za-z]+(?:/[A-Za-z]+)?(?:\^?\d)?(?=\s|$)|[°℃]C?)", sentence[end:])
    return row[0] + (f" {unit.group().strip()}" if unit and unit.group().strip() not in ("and", "or") else "")


def _last_unmarked(text: str) -> str | None:
    """The last formula that is more than a variable, or the last number outside formulas, whichever comes later."""
    found, end = None, 0
    for formula in _MATH.finditer(text):
        content = _content(formula)
        if not _VARIABLE.fullmatch(content):
            found, end = content, formula.end()
    number = _last(_LAST_NUMBER.finditer(text, end))
    return number.group().strip() if number else found


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    last = None
    for last in matches:  # noqa: B007
        pass
    return last
