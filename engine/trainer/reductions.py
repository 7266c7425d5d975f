"""What the passes of a step send between ranks beside Megatron's own: sums from the last pipeline stage, and gradients."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads


def from_last_stage(x: torch.Tensor) -> None:
    """Overwrite x with the last pipeline stage's."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(x, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)


def sum_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's reductions without its division by tokens: the loss is already divided by the global normaliser."""
    finalize_model_grads(model, None, **kwargs)
