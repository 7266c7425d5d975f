"""Answers that are still a question: an operation that nobody carried out, or an expression that the question itself gives.

Both may equal the reference, and a policy finds out soon: the integral that is asked for is a right answer to itself.
"""

import functools
import re

from tandem.engine.reward.answers import Value, read_shape
from tandem.engine.reward.normalise import normalise

_MAX_QUESTION_CHARS = 10_000  # from its end, where what is asked stands
# No final answer needs one of these unless the reference has it too; 2^{10}, 5! and \log_2 8 are numbers.
_OPERATION = re.compile(
    r"\\(?:i{1,3}nt|oint|sum|prod|lim(?:sup|inf)?|max|min|sup|inf|gcd|lcm|[bp]?mod|det|partial|bigcup|bigcap)(?![a-z])|\\frac\s*\{\s*d\s*\w?\s*\}"
)
# Something to compute: a sum, a product, a power, a function. A fraction or a multiple of \pi is a number that may occur anywhere.
_COMPUTATION = re.compile(
    r"[+^!(]|(?<=[\w)}])\s*-|\\(?:cdot|times|div|sqrt|binom|log|ln|exp|l?floor|lceil|(?:arc)?(?:sin|cos|tan|cot|sec|csc))(?![a-z])"
)


def is_unevaluated(found: str, expected: str, question: str) -> bool:
    """Whether a normalised answer is an operation that the reference does not have, or a computation copied from the question.

    The texts differ; an answer that is written like the reference is right whatever it is.
    """
    if not set(_OPERATION.findall(found)) <= set(_OPERATION.findall(expected)):
        return True
    if not question or not _COMPUTATION.search(found) or not isinstance(read_shape(found), Value):
        return False
    written = r"\s*".join(re.escape(character) for character in found if not character.isspace())
    return re.search(rf"(?<![\w\\^_{{}}+*/.-]){written}(?![\w^_{{}}*/+])", _normalised(question[-_MAX_QUESTION_CHARS:])) is not None


@functools.lru_cache(maxsize=1024)
def _normalised(question: str) -> str:
    return normalise(question)
