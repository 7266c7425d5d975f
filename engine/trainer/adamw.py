"""The step of Megatron's AdamW in one pass over memory: moments, master weights and the model's own weights together.

The optimizer stays torch's, with its parameter groups and its state (exp_avg, exp_avg_sq, step), so that resets and checkpoints know
nothing of this. `tandem.kernels.adamw` computes: one Triton launch for each parameter group on a GPU, torch's operations on a CPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from tandem.kernels.adamw import FusedAdamW, Tensors


def fuse_step(part: Any) -> None:
    """Let one of Megatron's optimizers step with the kernel. Another AdamW than torch's (apex's, Transformer Engine's) is left alone.

    Args:
        part: one of `parts_of`: a DistributedOptimizer, a Float16OptimizerWithFloat16Params or an FP32Optimizer.
    """
    if isinstance(part.optimizer, torch.optim.AdamW):
        part.optimizer.step = FusedStep(part)  # pyright: ignore[reportAttributeAccessIssue]
        part._copy_main_params_to_model_params = _nothing  # the step has written them


class FusedStep:
    """Takes the place of torch.optim.AdamW.step."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self._kernels: list[FusedAdamW] = []

    @torch.no_grad()
    def __call__(self) -> None:
        """One step of all parameters that have a gradient. `fill_state` must have made their state."""
        optimizer = self._part.optimizer
        copies = {id(main): copy for main, copy in _model_weights(self._part)}
        self._kernels += [FusedAdamW() for _ in optimizer.param_groups[len(self._kernels) :]]
        for group, kernel in zip(optimizer.param_groups, self._kernels, strict=True):
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not stepped:
                continue
            states = [optimizer.state[parameter] for parameter in stepped]
            # One count for each parameter, as torch keeps it. They lie on the CPU: reading them waits for no GPU.
            counts = {int(state["step"].add_(1)) for state in states}
            assert len(counts) == 1, f"the parameters of one group have done {counts} steps"
            kernel.step(
                [
                    Tensors(parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"], copies.get(id(parameter)))
                    for parameter, state in zip(stepped, states, strict=True)
                ],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                num_steps=counts.pop(),
            )


def _model_weights(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every master weight beside the part of the model's weight that it is of. fp32 weights are their own masters, and left out.

    Looked up in every step: a model's weights may move in memory.
    """
    if isinstance(part, DistributedOptimizer):
        for models, mains in zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True):
            for model, main in zip(models, mains, strict=True):
                held = part._get_model_param_range_map(model)["param"]
                yield main, model.detach().view(-1)[held.start : held.end]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from ((main, model.detach()) for model, main in zip(models, mains, strict=True))


def _nothing() -> None: ...
