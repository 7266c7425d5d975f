"""Repairs of megatron-core 0.16.1 where Transformer Engine is not installed, on any device.

Megatron is developed with Transformer Engine; two of its code paths do not hold without it. `install` does nothing with it.
"""

import importlib.util
from typing import Any

import torch


def install() -> None:
    """Repair megatron-core. Calling it again changes nothing."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    import megatron.core.transformer.moe.moe_utils as moe_utils

    moe_utils_any: Any = moe_utils
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils_any.te_general_gemm = None  # the router asks whether it is None, but the failed import never defined it
    _keep_adam_step()


def _keep_adam_step() -> None:
    """torch's AdamW counts its steps per parameter, which fused Adams do not: keep the count when a checkpoint is loaded.

    The distributed optimizer copies the loaded tensors over the state and fails on a key that it did not load.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if original.__module__ == __name__:
        return

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None) if "step" not in tensors else None
        original(self, model_param, tensors)
        if step is not None:
            state["step"] = step.clone()  # load_state_dict shares one tensor between all parameters

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
