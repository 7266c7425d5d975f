"""A grader of the arithmetic domain whose work is done by killable workers, slowly or badly; its choice depends on the text alone."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future

from tandem.engine.reward.workers import WorkerPool
from tandem.engine.types import Prompt, Verdict


def share_of(text: str) -> float:
    """A number in [0, 1) that a response's text decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) / 2**32


class WorkerGrader:
    """Hands (text, answer) to `call` in a worker; what it returns is whether the response is right."""

    def __init__(self, pool: WorkerPool, call: Callable[[str, str], bool]) -> None:
        self.pool, self._call = pool, call

    def check(self, prompt: Prompt) -> None:
        if not prompt.answer:
            raise ValueError("it has no answer")

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Future[Verdict]:
        return self.when_done(self.pool.submit(self._call, text, prompt.answer), is_complete=is_complete)

    def when_done(self, call: Future[bool], *, is_complete: bool) -> Future[Verdict]:
        """The verdict of a call's result, ungraded when it comes to none."""
        graded: Future[Verdict] = Future()

        def settle(done: Future[bool]) -> None:
            error = done.exception()
            if error is None:
                graded.set_result(Verdict(correct=done.result() and is_complete))
            else:
                graded.set_result(Verdict(correct=False, reason=str(error), graded=False))

        call.add_done_callback(settle)
        return graded

    def close(self) -> None:
        self.pool.close()
