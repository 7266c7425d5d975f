"""What a process that computes is told once: the first message to the embedded engine's worker."""

from dataclasses import dataclass

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.config import RolloutConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """The model's sizes, and how to generate with it."""

    architecture: Architecture
    config: RolloutConfig
    dtype: torch.dtype
    context_length: int
    stop_token_ids: tuple[int, ...]
    num_threads: int
