"""Grading mathematics: find the final answer of a response, and compare it with the reference.

Most answers are numbers and are compared here, exactly. What needs algebra goes to SymPy in a worker process with a deadline and a
memory limit; an answer that exceeds them is not graded. A rounded decimal is right only from six places on.
"""

import os
from concurrent.futures import Future

from tandem.engine.reward.answers import compare_exactly, compare_shapes, read_shape
from tandem.engine.reward.extract import MAX_ANSWER_CHARS, MAX_RESPONSE_CHARS, extract_answer
from tandem.engine.reward.normalise import normalise
from tandem.engine.reward.symbolic import load, same_answer
from tandem.engine.reward.unevaluated import is_unevaluated
from tandem.engine.reward.workers import WorkerError, WorkerPool
from tandem.engine.types import Verdict

# Parsing and comparing take tens of milliseconds; the rest is for a machine that does much else.
DEADLINE_S = 10.0
# SymPy and its parser occupy 300 MB of address space.
WORKER_BYTES = 1 << 30

# Of this process; starts its first worker when an answer needs one.
POOL = WorkerPool(min(4, os.cpu_count() or 1), deadline_s=DEADLINE_S, max_bytes=WORKER_BYTES, initialise=load)


def grade_math(
    response_text: str, reference_answer: str, *, is_complete: bool = True, question: str = "", pool: WorkerPool = POOL
) -> Verdict:
    """Compare the final answer of a response with the reference; waits for the result. See `submit_math`."""
    return submit_math(response_text, reference_answer, is_complete=is_complete, question=question, pool=pool).result()


def submit_math(
    response_text: str, reference_answer: str, *, is_complete: bool = True, question: str = "", pool: WorkerPool = POOL
) -> Future[Verdict]:
    """Compare the final answer of a response with the reference, in the background where it takes algebra.

    Args:
        response_text: its last MAX_RESPONSE_CHARS characters are read.
        reference_answer: LaTeX or plain text, the answer alone.
        is_complete: False for a response that was cut: an unmarked last number is then not its answer.
        question: where it is known, a computation that is copied from it is no answer, even if its value is the reference.
        pool: workers whose initialiser is `symbolic.load`.
    Returns: a future that never raises; it is done already unless the answer needs algebra. `graded=False` when the reference cannot
        be read, the answer is too long, too deep or too large to compute, the comparison passed its deadline, or a text longer than
        what is read shows no answer.
    """
    graded: Future[Verdict] = Future()
    graded.set_running_or_notify_cancel()  # it cannot be cancelled, so the pool's thread can always settle it
    answer = extract_answer(response_text, is_complete=is_complete)
    outcome = _compare_here(answer, response_text, reference_answer, question)
    if isinstance(outcome, Verdict) or answer is None:
        assert isinstance(outcome, Verdict)
        graded.set_result(outcome)
        return graded
    try:
        comparison = pool.submit(same_answer, *outcome)
    except WorkerError as error:
        graded.set_result(_not_graded(answer, str(error)))
        return graded
    comparison.add_done_callback(lambda done: graded.set_result(_verdict_of(done, answer, reference_answer)))
    return graded


def _compare_here(answer: str | None, response_text: str, reference_answer: str, question: str) -> Verdict | tuple[str, str]:
    """A verdict, or the two texts that a worker has to compare."""
    if answer is None:
        if len(response_text) > MAX_RESPONSE_CHARS:
            return _not_graded(None, f"no answer in the last {MAX_RESPONSE_CHARS} of {len(response_text)} characters")
        return Verdict(correct=False, reason="no final answer found")
    for name, text in (("answer", answer), ("reference", reference_answer)):
        if len(text) > MAX_ANSWER_CHARS:
            return _not_graded(answer[:MAX_ANSWER_CHARS], f"the {name} has {len(text)} characters, more than {MAX_ANSWER_CHARS}")
    found, expected = normalise(answer), normalise(reference_answer)
    if not expected:
        return _not_graded(answer, f"the reference {reference_answer!r} is empty")
    try:
        same = compare_shapes(read_shape(found), read_shape(expected), compare_exactly) if found else False
        if same is None and is_unevaluated(found, expected, question):
            return Verdict(correct=False, answer=answer, reason="the answer is still to be computed")
    except ValueError as error:  # nested too deep
        return _not_graded(answer, str(error))
    return (found, expected) if same is None else _graded(same, answer, reference_answer)


def _verdict_of(comparison: Future[bool], answer: str, reference_answer: str) -> Verdict:
    error = comparison.exception()
    if error is not None:
        return _not_graded(answer, str(error))
    return _graded(comparison.result(), answer, reference_answer)


def _graded(correct: bool, answer: str, reference_answer: str) -> Verdict:
    return Verdict(correct=correct, answer=answer, reason="" if correct else f"the answer is {reference_answer}")


def _not_graded(answer: str | None, reason: str) -> Verdict:
    return Verdict(correct=False, answer=answer, reason=reason, graded=False)
