"""Which prompts are drawn: a curriculum over levels, and priority to what the policy does not solve yet (2.3.4)."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.engine.config import SamplingConfig
from tandem.engine.types import Prompt

# Stands for a priority of 0: such a prompt comes after all others but still in random order.
LEAST_PRIORITY = 1e-12


class PromptSampler:
    """Draws prompts without replacement, P(i) ∝ 1 - s_i + floor with s_i the running success rate (0 while unseen).

    What is drawn depends on the seed, the number of earlier draws, the step, what is excluded and the observed success rates,
    and on nothing else. One draw over a million prompts takes tens of milliseconds.
    """

    def __init__(self, config: SamplingConfig, prompts: Sequence[Prompt], *, seed: int) -> None:
        """Raises: ValueError without prompts, for two with one id, and for a negative seed."""
        if not prompts:
            raise ValueError("the sampler got no prompts; it needs at least one")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        self.config = config
        self.prompts = prompts
        self._seed = seed
        self._index = {prompt.id: i for i, prompt in enumerate(prompts)}
        if len(self._index) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts share {len(self._index)} ids; ids must differ")
        self._levels = np.array([prompt.level for prompt in prompts], dtype=np.int64)
        self._success = np.zeros(len(prompts))
        self._seen = np.zeros(len(prompts), dtype=np.bool_)
        self._num_draws = 0
        self.num_drawn = 0  # prompts, over all draws of the run

    def draw(self, n: int, *, step: int, exclude: Collection[str] = ()) -> list[Prompt]:
        """`n` prompts for iteration `step`.

        Args:
            exclude: ids that are in flight from earlier iterations. They are left out as long as any other prompt is allowed.
        Returns: n prompts in the order drawn. No prompt comes twice unless n exceeds the number that may be drawn; then all of
            them come once, in random order, before any comes again.
        """
        generator = np.random.default_rng([self._seed, self._num_draws])
        self._num_draws += 1
        self.num_drawn += n
        candidates = self._allowed(step, exclude)
        drawn: list[int] = []
        while len(drawn) < n:
            drawn += self._weighted(candidates, n - len(drawn), generator).tolist()
        return [self.prompts[i] for i in drawn]

    def highest_level(self, step: int) -> float:
        """The highest level that iteration `step` allows: linear in the step from the lowest to the highest there is."""
        lowest, highest = int(self._levels.min()), int(self._levels.max())
        if self.config.curriculum_steps == 0:
            return highest
        return lowest + (highest - lowest) * min(1.0, step / self.config.curriculum_steps)

    def observe(self, prompt_id: str, success_rate: float) -> None:
        """Move a prompt's running success rate; the first observation replaces the initial 0.

        Raises: ValueError for an unknown prompt or a rate outside [0, 1].
        """
        if prompt_id not in self._index:
            raise ValueError(f"prompt {prompt_id!r} is not one of the sampler's {len(self.prompts)}")
        if not 0 <= success_rate <= 1:
            raise ValueError(f"success rate of prompt {prompt_id!r} is {success_rate}; it must lie in [0, 1]")
        i = self._index[prompt_id]
        weight = self.config.success_decay if self._seen[i] else 1.0
        self._success[i] += weight * (success_rate - self._success[i])
        self._seen[i] = True

    def success_rate(self, prompt_id: str) -> float | None:
        """The running success rate, None while unseen."""
        i = self._index[prompt_id]
        return float(self._success[i]) if self._seen[i] else None

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as JSON scalars and lists, with a fingerprint of the prompts."""
        seen = np.flatnonzero(self._seen)
        return {
            "prompts": self._fingerprint(),
            "seed": self._seed,
            "num_draws": self._num_draws,
            "num_drawn": self.num_drawn,
            "seen": seen.tolist(),
            "success_rates": self._success[seen].tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises: ValueError if the prompts (ids, order, levels) or the seed differ."""
        if state["prompts"] != self._fingerprint():
            raise ValueError(
                f"the saved sampler state belongs to other prompts than these {len(self.prompts)}; resume with the file it was saved with"
            )
        if state["seed"] != self._seed:
            raise ValueError(f"the saved sampler state has seed {state['seed']}, this run has {self._seed}; resume with the same seed")
        self._num_draws, self.num_drawn = state["num_draws"], state["num_drawn"]
        self._seen[:] = False
        self._success[:] = 0
        self._seen[state["seen"]] = True
        self._success[state["seen"]] = state["success_rates"]

    def _allowed(self, step: int, exclude: Collection[str]) -> NDArray[np.int64]:
        allowed = self._levels <= self.highest_level(step)
        free = allowed.copy()
        free[[self._index[prompt_id] for prompt_id in exclude if prompt_id in self._index]] = False
        return np.flatnonzero(free if free.any() else allowed)

    def _weighted(self, candidates: NDArray[np.int64], n: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Up to n of the candidates, weighted without replacement: the smallest of independent exponentials over the weights."""
        keys = generator.standard_exponential(len(candidates))
        if self.config.prioritised:
            priority = 1 - self._success[candidates] + self.config.priority_floor
            keys /= np.maximum(priority, LEAST_PRIORITY)
        if n < len(candidates):
            nearest = np.argpartition(keys, n)[:n]
            candidates, keys = candidates[nearest], keys[nearest]
        return candidates[np.argsort(keys, kind="stable")]

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(f"{len(prompt.id)}:{prompt.id}:{prompt.level};".encode())
        return digest.hexdigest()
