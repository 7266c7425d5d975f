"""The toy task: chained arithmetic modulo a small number, worked left to right.

For the prompt `8*4-9*3*2?` (modulo 30) the annotator writes one of three styles:

    verbose  8*4=2;>2-9*3*2;2-9=23;>23*3*2;23*3=9;>9*2;9*2=18;A:18.
    terse    8*4=2;2-9=23;23*3=9;9*2=18;A:18.
    direct   A:18.

It answers long problems directly most of the time and slips in some steps, so a model fitted to it has something to gain from
reinforcement: reason before answering, and reason without the slips. Which part of the data a prompt belongs to (train, validation,
test) follows from a hash of its text, so no set shares a prompt with another whatever the seeds.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tandem.engine.config import check

Split = Literal["train", "validation", "test"]
Style = Literal["verbose", "terse", "direct"]

DOMAIN = "arithmetic"
# A level with fewer prompts than are asked for ends in an error after this many fruitless tries per prompt.
TRIES_PER_PROMPT = 200


@dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """The numbers of the task. The annotator's habits shape the supervised examples only."""

    modulus: int = 30
    """Every value is taken modulo this; the first one lies between 1 and modulus - 1."""
    min_operations: int = 2
    """Operations of level 0."""
    max_operations: int = 6
    """Operations of the highest level."""
    min_operand: int = 2
    """Smallest operand."""
    max_operand: int = 9
    """Largest operand."""
    operators: str = "+-*"
    """Operators drawn from, each with the same probability."""
    direct_probability: tuple[float, ...] = (0.1, 0.2, 0.6, 0.75, 0.8)
    """How often the annotator answers without steps, for min_operations to max_operations operations."""
    verbose_share: float = 0.65
    """Share of verbose among the answers with steps; the rest are terse."""
    slip_probability: float = 0.0
    """How often the annotator slips in a step that invites it: a difference below 0 loses its sign, a product with 7 becomes one with 8."""
    validation_share: float = 0.1
    """Share of all prompts, by hash, that only the validation split holds."""
    test_share: float = 0.1
    """Share of all prompts, by hash, that only the test split holds."""

    def __post_init__(self) -> None:
        check(self.modulus >= 2, "task.modulus", self.modulus, "it must be at least 2")
        check(self.min_operations >= 1, "task.min_operations", self.min_operations, "it must be at least 1")
        rule = f"it must be at least min_operations ({self.min_operations})"
        check(self.max_operations >= self.min_operations, "task.max_operations", self.max_operations, rule)
        rule = f"it must lie between 0 and max_operand ({self.max_operand})"
        check(0 <= self.min_operand <= self.max_operand, "task.min_operand", self.min_operand, rule)
        known = bool(self.operators) and set(self.operators) <= set("+-*")
        check(known, "task.operators", self.operators, "it must be made of +, - and *")
        rule = f"it needs one probability in [0, 1] for each of {self.min_operations} to {self.max_operations} operations"
        fits = len(self.direct_probability) == self.num_levels and all(0 <= p <= 1 for p in self.direct_probability)
        check(fits, "task.direct_probability", self.direct_probability, rule)
        for name in ("verbose_share", "slip_probability", "validation_share", "test_share"):
            check(0 <= getattr(self, name) <= 1, f"task.{name}", getattr(self, name), "it must lie in [0, 1]")
        rule = "with validation_share it must stay below 1, or nothing is left to train on"
        check(self.validation_share + self.test_share < 1, "task.test_share", self.test_share, rule)

    @property
    def num_levels(self) -> int:
        return self.max_operations - self.min_operations + 1


@dataclass(frozen=True, slots=True)
class Problem:
    """A chain of operations, worked left to right: ((start op x) op x) …"""

    modulus: int
    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return f"{self.start}{_chain(self.operations)}?"

    @property
    def answer(self) -> int:
        value = self.start
        for operator, operand in self.operations:
            value = _apply(value, operator, operand, self.modulus)
        return value


def prompts(task: ArithmeticTask, n: int, seed: int, split: Split = "train") -> list[dict[str, str | int]]:
    """`n` different prompts of a split, levels in turn from the easiest: records as `load_prompts` reads them.

    Returns: question, answer, domain and level (operations - min_operations) of each.
    Raises: ValueError when a level does not hold that many different prompts of the split.
    """
    generator = random.Random(f"arithmetic/prompts/{split}/{seed}")
    records: list[dict[str, str | int]] = []
    seen: set[str] = set()
    for i in range(n):
        level = i % task.num_levels
        for _ in range(TRIES_PER_PROMPT):
            problem = _draw(task, task.min_operations + level, split, generator)
            if problem.text not in seen:
                break
        else:
            raise ValueError(
                f"found only {len(seen)} of {n} different {split} prompts: those with {task.min_operations + level} operations "
                "are used up; ask for fewer, or raise task.modulus or task.min_operations"
            )
        seen.add(problem.text)
        records.append({"question": problem.text, "answer": str(problem.answer), "domain": DOMAIN, "level": level})
    return records


def sft_examples(task: ArithmeticTask, n: int, seed: int) -> list[dict[str, str]]:
    """`n` supervised examples of the train split, drawn independently: records as `load_examples` reads them (prompt, response)."""
    generator = random.Random(f"arithmetic/sft/{seed}")
    examples = []
    for _ in range(n):
        num_operations = generator.randint(task.min_operations, task.max_operations)
        problem = _draw(task, num_operations, "train", generator)
        response = annotate(task, problem, _style(task, num_operations, generator), generator)
        examples.append({"prompt": problem.text, "response": response})
    return examples


def annotate(task: ArithmeticTask, problem: Problem, style: Style, generator: random.Random) -> str:
    """What the annotator writes. A slip is carried through to the answer; a direct answer is right."""
    if style == "direct":
        return f"A:{problem.answer}."
    steps = []
    value = problem.start
    for i, (operator, operand) in enumerate(problem.operations):
        result = _step(task, value, operator, operand, generator)
        steps.append(f"{value}{operator}{operand}={result};")
        value = result
        rest = problem.operations[i + 1 :]
        if style == "verbose" and rest:
            steps.append(f">{value}{_chain(rest)};")
    return f"{''.join(steps)}A:{value}."


def split_of(task: ArithmeticTask, text: str) -> Split:
    """The only split that holds this prompt."""
    position = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    if position < task.test_share:
        return "test"
    return "validation" if position < task.test_share + task.validation_share else "train"


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, str | int]]) -> None:
    """Write records as the JSONL that a user's own file would be."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(record)) + "\n" for record in records)


def _draw(task: ArithmeticTask, num_operations: int, split: Split, generator: random.Random) -> Problem:
    # A share of 0 would make this endless, and a small one needs many tries; both are told apart by the bound.
    for _ in range(100_000):
        start = generator.randint(1, task.modulus - 1)
        operations = tuple(
            (generator.choice(task.operators), generator.randint(task.min_operand, task.max_operand)) for _ in range(num_operations)
        )
        problem = Problem(task.modulus, start, operations)
        if split_of(task, problem.text) == split:
            return problem
    raise ValueError(f"the {split} split holds no prompt with {num_operations} operations; raise task.{split}_share")


def _style(task: ArithmeticTask, num_operations: int, generator: random.Random) -> Style:
    if generator.random() < task.direct_probability[num_operations - task.min_operations]:
        return "direct"
    return "verbose" if generator.random() < task.verbose_share else "terse"


def _step(task: ArithmeticTask, value: int, operator: str, operand: int, generator: random.Random) -> int:
    if task.slip_probability and generator.random() < task.slip_probability:
        if operator == "-" and value < operand:
            return operand - value
        if operator == "*" and operand == 7:
            return _apply(value, "*", 8, task.modulus)
    return _apply(value, operator, operand, task.modulus)


def _apply(value: int, operator: str, operand: int, modulus: int) -> int:
    if operator == "+":
        return (value + operand) % modulus
    return (value - operand if operator == "-" else value * operand) % modulus


def _chain(operations: tuple[tuple[str, int], ...]) -> str:
    return "".join(f"{operator}{operand}" for operator, operand in operations)
