"""How a model did on a prompt, and the curriculum level that follows."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Counts over the responses to one prompt."""

    num_samples: int
    num_graded: int
    num_correct: int

    @property
    def is_reliable(self) -> bool:
        """At least half of the responses could be graded."""
        return 2 * self.num_graded >= self.num_samples

    @property
    def pass_rate(self) -> float:
        """Of the graded responses; there must be one."""
        return self.num_correct / self.num_graded


def level_of(pass_rate: float, bounds: Sequence[float]) -> int:
    """Curriculum level from the pass rate: the number of bounds that it stays below; 0 is the easiest."""
    return sum(pass_rate < bound for bound in bounds)
