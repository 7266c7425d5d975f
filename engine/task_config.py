"""The fields of the generated toy tasks, one class for each. Part of `RunConfig` (engine/config.py)."""

from dataclasses import dataclass

from tandem.engine.model_config import check


@dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """The generated toy task (engine/data/arithmetic.py). The annotator's habits shape the supervised examples only."""

    modulus: int = 10
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
    slip_probability: float = 0.6
    """How often the annotator slips in a step that invites it: a difference below 0 loses its sign, a product with 7 becomes one with 8."""
    validation_share: float = 0.1
    """Share of all prompts, by hash, that only the validation split holds."""
    test_share: float = 0.1
    """Share of all prompts, by hash, that only the test split holds."""
    num_prompts: int = 2000
    """Prompts to train on."""
    num_sft_examples: int = 32_000
    """Supervised examples."""
    num_validation: int = 400
    """Prompts of the validation split."""
    num_test: int = 1000
    """Prompts of the test split."""

    def __post_init__(self) -> None:
        check(self.modulus >= 2, "data.task.modulus", self.modulus, "it must be at least 2")
        rule = f"it must lie between 0 and max_operand ({self.max_operand})"
        check(0 <= self.min_operand <= self.max_operand, "data.task.min_operand", self.min_operand, rule)
        known = bool(self.operators) and set(self.operators) <= set("+-*")
        check(known, "data.task.operators", self.operators, "it must be made of +, - and *")
        _check_common(self)
        rule = f"it needs one probability in [0, 1] for each of {self.min_operations} to {self.max_operations} operations"
        fits = len(self.direct_probability) == self.num_levels and all(0 <= p <= 1 for p in self.direct_probability)
        check(fits, "data.task.direct_probability", self.direct_probability, rule)
        check(0 <= self.verbose_share <= 1, "data.task.verbose_share", self.verbose_share, "it must lie in [0, 1]")

    @property
    def num_levels(self) -> int:
        """Curriculum levels: one per number of operations."""
        return self.max_operations - self.min_operations + 1


@dataclass(frozen=True, kw_only=True)
class ProgramTask:
    """The generated toy task of the code domain (engine/data/programs.py). The annotator's slips shape the supervised examples only."""

    min_operations: int = 2
    """Operations of level 0."""
    max_operations: int = 4
    """Operations of the highest level."""
    min_operand: int = 2
    """Smallest operand; at least 1, for some operations divide by it."""
    max_operand: int = 9
    """Largest operand."""
    slip_probability: float = 0.6
    """How often the annotator slips where a program invites it: no brackets around a sum that goes on, / instead of //."""
    num_inputs: int = 5
    """Hidden inputs of each prompt. They are lines of one test, so that grading a program is one run of the sandbox."""
    max_input: int = 99
    """Inputs lie between this and its negative."""
    validation_share: float = 0.1
    """Share of all prompts, by hash, that only the validation split holds."""
    test_share: float = 0.1
    """Share of all prompts, by hash, that only the test split holds."""
    num_prompts: int = 1200
    """Prompts to train on."""
    num_sft_examples: int = 12_000
    """Supervised examples."""
    num_validation: int = 150
    """Prompts of the validation split."""
    num_test: int = 300
    """Prompts of the test split."""

    def __post_init__(self) -> None:
        rule = f"it must lie between 1 and max_operand ({self.max_operand})"
        check(1 <= self.min_operand <= self.max_operand, "data.task.min_operand", self.min_operand, rule)
        _check_common(self)
        check(self.max_input >= 1, "data.task.max_input", self.max_input, "it must be at least 1")
        rule = f"it must lie between 1 and {2 * self.max_input + 1}, the integers that max_input allows"
        check(1 <= self.num_inputs <= 2 * self.max_input + 1, "data.task.num_inputs", self.num_inputs, rule)

    @property
    def num_levels(self) -> int:
        """Curriculum levels: one per number of operations."""
        return self.max_operations - self.min_operations + 1


def _check_common(task: ArithmeticTask | ProgramTask) -> None:
    check(task.min_operations >= 1, "data.task.min_operations", task.min_operations, "it must be at least 1")
    rule = f"it must be at least min_operations ({task.min_operations})"
    check(task.max_operations >= task.min_operations, "data.task.max_operations", task.max_operations, rule)
    for name in ("slip_probability", "validation_share", "test_share"):
        check(0 <= getattr(task, name) <= 1, f"data.task.{name}", getattr(task, name), "it must lie in [0, 1]")
    rule = "with validation_share it must stay below 1, or nothing is left to train on"
    check(task.validation_share + task.test_share < 1, "data.task.test_share", task.test_share, rule)
    for name in ("num_prompts", "num_sft_examples", "num_validation", "num_test"):
        check(getattr(task, name) >= 1, f"data.task.{name}", getattr(task, name), "it must be at least 1")
