"""The toy task: chained arithmetic modulo a small number, worked left to right.

For the prompt `8*4-9*3*2?` (modulo 30) the annotator writes one of three styles:

    verbose  8*4=2;>2-9*3*2;2-9=23;>23*3*2;23*3=9;>9*2;9*2=18;A:18.
    terse    8*4=2;2-9=23;23*3=9;9*2=18;A:18.
    direct   A:18.

It answers long problems directly most of the time and slips in some steps, so a model fitted to it has something to gain from
reinforcement: reason before answering, and reason without the slips. Which part of the data a prompt belongs to (train, validation,
test) follows from its text (`data/generated.py`).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tandem.engine.config import ArithmeticTask
from tandem.engine.data.generated import Split, draw_different, draw_of_split

Style = Literal["verbose", "terse", "direct"]

DOMAIN = "arithmetic"


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
    drawn = draw_different(
        task,
        n,
        split,
        lambda num_operations: _draw(task, num_operations, split, generator),
        "task.modulus or task.min_operations",
    )
    return [{"question": problem.text, "answer": str(problem.answer), "domain": DOMAIN, "level": level} for level, problem in drawn]


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


def preference_pairs(task: ArithmeticTask, n: int, seed: int, split: Split = "train") -> list[dict[str, str]]:
    """`n` pairs of a split, drawn independently: records as `load_preferences` reads them (prompt, chosen, rejected).

    Both responses are in one style. The rejected one has the result of one operation wrong and goes on with that; a direct answer that
    of the last one.
    """
    generator = random.Random(f"arithmetic/preferences/{split}/{seed}")
    records = []
    for _ in range(n):
        num_operations = generator.randint(task.min_operations, task.max_operations)
        problem = _draw(task, num_operations, split, generator)
        style = _style(task, num_operations, generator)
        wrong = num_operations - 1 if style == "direct" else generator.randrange(num_operations)
        error = generator.randrange(1, task.modulus)
        chosen, rejected = (_write(problem, style, _results(task, wrong, off)) for off in (0, error))
        records.append({"prompt": problem.text, "chosen": chosen, "rejected": rejected})
    return records


def _results(task: ArithmeticTask, wrong: int, error: int) -> Callable[[int, int, str, int], int]:
    """For `_write`: the right results, but for that of operation `wrong`, which is `error` too much."""
    return lambda i, value, operator, operand: (_apply(value, operator, operand, task.modulus) + error * (i == wrong)) % task.modulus


def annotate(task: ArithmeticTask, problem: Problem, style: Style, generator: random.Random) -> str:
    """What the annotator writes. A slip is carried through to the answer; a direct answer is right."""
    if style == "direct":
        return f"A:{problem.answer}."
    return _write(problem, style, lambda i, value, operator, operand: _step(task, value, operator, operand, generator))


def _write(problem: Problem, style: Style, result_of: Callable[[int, int, str, int], int]) -> str:
    """The response in which operation i on a value has the result that `result_of` gives it."""
    steps = []
    value = problem.start
    for i, (operator, operand) in enumerate(problem.operations):
        result = result_of(i, value, operator, operand)
        steps.append(f"{value}{operator}{operand}={result};")
        value = result
        rest = problem.operations[i + 1 :]
        if style == "verbose" and rest:
            steps.append(f">{value}{_chain(rest)};")
    return f"{'' if style == 'direct' else ''.join(steps)}A:{value}."


def _draw(task: ArithmeticTask, num_operations: int, split: Split, generator: random.Random) -> Problem:
    def draw() -> Problem:
        start = generator.randint(1, task.modulus - 1)
        operations = tuple(
            (generator.choice(task.operators), generator.randint(task.min_operand, task.max_operand)) for _ in range(num_operations)
        )
        return Problem(task.modulus, start, operations)

    return draw_of_split(task, num_operations, split, draw)


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
