"""Megatron's AdamW: building it, its learning rate, and starting it afresh."""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from tandem.engine.config import OptimizerConfig, TrainerConfig
from tandem.engine.trainer.adamw import fuse_step
from tandem.engine.trainer.layers import DTYPES


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `num_steps`.

    Rises linearly to lr over `warmup_steps` steps, and falls to min_lr at the last step, from the later of the warm-up's end and
    `decay_start` * num_steps on.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    start = max(config.warmup_steps, config.decay_start * num_steps)
    if config.decay_style == "constant" or step <= start:
        return config.lr
    done = min(1.0, (step - start) / max(1e-9, num_steps - 1 - start))
    left = 1.0 - done if config.decay_style == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def build_optimizer(trainer: TrainerConfig, chunks: list[DistributedDataParallel]) -> Any:
    """AdamW over the parameters of all chunks, its state filled with zeros."""
    config, dtype = trainer.optimizer, DTYPES[trainer.dtype]
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        use_distributed_optimizer=trainer.distributed_optimizer,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    optimizer = get_megatron_optimizer(megatron_config, chunks)  # pyright: ignore[reportArgumentType]
    fill_state(optimizer)
    for part in parts_of(optimizer):
        fuse_step(part)
    # Megatron marks the groups that are not decayed (norms, biases), but leaves it to a scheduler of its own to heed that.
    set_optimizer_config(optimizer, config)
    return optimizer


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers that Megatron chains (dense weights, experts), or the only one; a part without weights is left out."""
    parts = optimizer.chained_optimizers if hasattr(optimizer, "chained_optimizers") else [optimizer]
    return [part for part in parts if part.optimizer is not None]


def fill_state(optimizer: Any) -> None:
    """Give torch's AdamW the state that it would make in its first step; checkpoints are loaded into it."""
    for part in parts_of(optimizer):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    moments = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                    part.optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **moments}


def reset_state(optimizer: Any) -> None:
    """Fresh moments and step count, in the memory they have. Master weights stay."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0
            for parameter in group["params"]:
                for name, value in part.optimizer.state[parameter].items():
                    if torch.is_tensor(value) and name in ("step", "exp_avg", "exp_avg_sq"):
                        value.zero_()


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Learning rate of the steps from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_optimizer_config(optimizer: Any, config: OptimizerConfig) -> None:
    """Betas, eps, weight decay and clipping of the steps from now on; moments are kept."""
    for part in parts_of(optimizer):
        part.config.clip_grad = config.clip_grad
    optimizer.config.clip_grad = config.clip_grad
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (config.beta1, config.beta2), config.eps
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
