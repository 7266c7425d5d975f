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
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tandem.engine.config import ArithmeticTask
from tandem.engine.data.jsonl import write_jsonl

Split = Literal["train", "validation", "test"]
Style = Literal["verbose", "terse", "direct"]

DOMAIN = "arithmetic"
# A level with fewer prompts than are asked for ends in an error after this many fruitless tries per prompt.
TRIES_PER_PROMPT = 200


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
    """`n` supervised examples of the train split, drawn independently: records as `load_sft` reads them (prompt, response)."""
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


def write_task(task: ArithmeticTask, folder: str | Path, *, seed: int) -> None:
    """Write prompts.jsonl, sft.jsonl, validation.jsonl and eval.jsonl (the test split) into `folder`.

    They have the form of a user's own files, which can take their place. Validation and test prompts do not depend on
    the seed: all runs of a task are compared on the same ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "prompts.jsonl", prompts(task, task.num_prompts, seed))
    write_jsonl(folder / "sft.jsonl", sft_examples(task, task.num_sft_examples, seed))
    write_jsonl(folder / "validation.jsonl", prompts(task, task.num_validation, 0, "validation"))
    write_jsonl(folder / "eval.jsonl", prompts(task, task.num_test, 0, "test"))


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
            return (operand - value) % task.modulus
        if operator == "*" and operand == 7:
            return _apply(value, "*", 8, task.modulus)
    return _apply(value, operator, operand, task.modulus)


def _apply(value: int, operator: str, operand: int, modulus: int) -> int:
    if operator == "+":
        return (value + operand) % modulus
    return (value - operand if operator == "-" else value * operand) % modulus


def _chain(operations: tuple[tuple[str, int], ...]) -> str:
    return "".join(f"{operator}{operand}" for operator, operand in operations)
