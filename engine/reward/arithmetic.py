"""Grading the toy task: the last `A:` of a response must be the right answer line, and nothing may follow it."""

from tandem.engine.types import Verdict


def grade_arithmetic(response_text: str, reference_answer: str) -> Verdict:
    """Correct when the text from its last `A:` on is exactly `A:<reference_answer>.`."""
    start = response_text.rfind("A:")
    if start < 0:
        return Verdict(correct=False, reason="no answer line A:….")
    line = response_text[start:]
    answer = line[2:].split(".")[0]
    if line == f"A:{reference_answer}.":
        return Verdict(correct=True, answer=answer)
    if answer == reference_answer:
        return Verdict(correct=False, answer=answer, reason="the answer line is not the end of the response")
    return Verdict(correct=False, answer=answer, reason=f"the answer is {reference_answer}")
