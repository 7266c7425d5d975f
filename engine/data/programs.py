"""The toy task of the code domain: programs of one line, graded by running them.

The prompt `add 3, mul 2, div 4.` asks for a program that works these operations from left to right on every integer of its input,
one a line. Division rounds down. A right program is

    for x in open(0):print((int(x)+3)*2//4)

The annotator slips where a program invites it: it forgets the brackets around a sum that goes on (`int(x)+3*2`), or divides by `/`,
which prints `5.0`. Such programs run, and fail the hidden tests, so a model fitted to them has something to gain from reinforcement.
Which part of the data a prompt belongs to follows from its text (`data/generated.py`).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem.engine.config import ProgramTask
from tandem.engine.data.generated import Split, draw_different, draw_of_split

DOMAIN = "code"
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "//", "mod": "%"}
APPLY: dict[str, Callable[[int, int], int]] = {
    "add": lambda value, operand: value + operand,
    "sub": lambda value, operand: value - operand,
    "mul": lambda value, operand: value * operand,
    "div": lambda value, operand: value // operand,
    "mod": lambda value, operand: value % operand,
}


@dataclass(frozen=True, slots=True)
class ProgramProblem:
    """Operations to be worked from left to right: (word, operand) of each."""

    operations: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return ", ".join(f"{word} {operand}" for word, operand in self.operations) + "."

    def output(self, value: int) -> int:
        """What a right program prints for this input."""
        for word, operand in self.operations:
            value = APPLY[word](value, operand)
        return value


def prompts(task: ProgramTask, n: int, seed: int, split: Split = "train") -> list[dict[str, Any]]:
    """`n` different prompts of a split, levels in turn from the easiest: records as `load_prompts` reads them.

    Returns: question, domain, level (operations - min_operations) and grading (the hidden test) of each.
    Raises: ValueError when a level does not hold that many different prompts of the split.
    """
    generator = random.Random(f"programs/prompts/{split}/{seed}")
    drawn = draw_different(
        task,
        n,
        split,
        lambda num_operations: _draw(task, num_operations, split, generator),
        "task.max_operand or task.min_operations",
    )
    return [
        {"question": problem.text, "domain": DOMAIN, "level": level, "grading": {"tests": [hidden_test(task, problem)]}}
        for level, problem in drawn
    ]


def sft_examples(task: ProgramTask, n: int, seed: int) -> list[dict[str, str]]:
    """`n` supervised examples of the train split, drawn independently: records as `load_sft` reads them (prompt, response)."""
    generator = random.Random(f"programs/sft/{seed}")
    examples = []
    for _ in range(n):
        problem = _draw(task, generator.randint(task.min_operations, task.max_operations), "train", generator)
        examples.append({"prompt": problem.text, "response": annotate(problem, task.slip_probability, generator)})
    return examples


def annotate(problem: ProgramProblem, slip_probability: float, generator: random.Random) -> str:
    """The program that the annotator writes; a right one if it never slips."""
    expression, is_sum = "int(x)", False
    for word, operand in problem.operations:
        operator = OPERATORS[word]
        if word in ("add", "sub"):
            is_sum = True
        else:
            if operator == "//" and generator.random() < slip_probability:
                operator = "/"
            if is_sum and generator.random() >= slip_probability:
                expression, is_sum = f"({expression})", False
        expression += f"{operator}{operand}"
    return f"for x in open(0):print({expression})"


def hidden_test(task: ProgramTask, problem: ProgramProblem) -> dict[str, str]:
    """Different inputs, one a line, and the lines that a right program prints. The same whenever the prompt is drawn."""
    generator = random.Random(f"programs/inputs/{problem.text}")
    inputs = generator.sample(range(-task.max_input, task.max_input + 1), task.num_inputs)
    return {
        "stdin": "".join(f"{value}\n" for value in inputs),
        "expected": "".join(f"{problem.output(value)}\n" for value in inputs),
    }


def _draw(task: ProgramTask, num_operations: int, split: Split, generator: random.Random) -> ProgramProblem:
    def draw() -> ProgramProblem:
        return ProgramProblem(
            tuple(
                (generator.choice(tuple(OPERATORS)), generator.randint(task.min_operand, task.max_operand)) for _ in range(num_operations)
            )
        )

    return draw_of_split(task, num_operations, split, draw)
