"""What the generators of toy tasks have in common: which part of the data a prompt belongs to, and drawing different ones."""

import hashlib
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

from tandem.engine.config import ArithmeticTask, ProgramTask

Task = ArithmeticTask | ProgramTask
Split = Literal["train", "validation", "test"]

# A level with fewer prompts than are asked for ends in an error after this many fruitless tries per prompt.
TRIES_PER_PROMPT = 200


class Problem(Protocol):
    @property
    def text(self) -> str:
        """The prompt."""
        ...


P = TypeVar("P", bound=Problem)


def split_of(task: Task, text: str) -> Split:
    """The only split that holds this prompt, by a hash of its text: no set shares a prompt with another whatever the seeds."""
    position = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    if position < task.test_share:
        return "test"
    return "validation" if position < task.test_share + task.validation_share else "train"


def draw_of_split(task: Task, num_operations: int, split: Split, draw: Callable[[], P]) -> P:
    """The first problem of the split that `draw` makes. Raises: ValueError when the split has none."""
    # A share of 0 would make this endless, and a small one needs many tries; both are told apart by the bound.
    for _ in range(100_000):
        problem = draw()
        if split_of(task, problem.text) == split:
            return problem
    raise ValueError(f"the {split} split holds no prompt with {num_operations} operations; raise task.{split}_share")


def draw_different(task: Task, n: int, split: Split, draw: Callable[[int], P], remedy: str) -> list[tuple[int, P]]:
    """`n` different problems, levels in turn from the easiest: (level, problem) of each.

    Args:
        draw: makes a problem of the split with so many operations.
        remedy: the fields to raise when there are too few.
    Raises: ValueError when a level does not hold that many different prompts of the split.
    """
    drawn: list[tuple[int, P]] = []
    seen: set[str] = set()
    for i in range(n):
        level = i % task.num_levels
        num_operations = task.min_operations + level
        for _ in range(TRIES_PER_PROMPT):
            problem = draw(num_operations)
            if problem.text not in seen:
                break
        else:
            raise ValueError(
                f"found only {len(seen)} of {n} different {split} prompts: those with {num_operations} operations "
                f"are used up; ask for fewer, or raise {remedy}"
            )
        seen.add(problem.text)
        drawn.append((level, problem))
    return drawn
