"""Block-fp8 weights for SGLang on a CPU of any kind, where its own code needs AMX: they are multiplied as the numbers that they stand for.

SGLang loads this through its entry point `sglang.srt.plugins` where a server is started with such weights (rollout.quantization).
Activations stay in the model's dtype, as on CPUs with AMX; SGLang's kernels for GPUs quantise those too.
"""

from types import SimpleNamespace
from typing import Any

import torch

from tandem.kernels.block_fp8 import dequantise


def load() -> None:
    """Replace what follows the loading of fp8 layers, and their forward."""
    import sglang.srt.layers.quantization.fp8 as fp8  # pyright: ignore[reportMissingImports]

    fp8.dispatch_w8a8_block_fp8_linear = no_kernel
    fp8.Fp8LinearMethod.process_weights_after_loading = keep
    fp8.Fp8LinearMethod.apply = linear
    fp8.Fp8MoEMethod.process_weights_after_loading = keep
    fp8.Fp8MoEMethod.apply = experts
    of_gpus = fp8.Fp8Config.get_supported_act_dtypes()
    fp8.Fp8Config.get_supported_act_dtypes = classmethod(lambda _: [*of_gpus, torch.float32])


def keep(method: Any, layer: torch.nn.Module) -> None:
    """Leave a layer's weights as they were loaded."""


def no_kernel(*_: Any, **__: Any) -> None:
    """The choice of a kernel for block-fp8, which `linear` takes the place of."""


def linear(method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Replaces Fp8LinearMethod.apply."""
    weight = dequantise(layer.weight, layer.weight_scale_inv)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def experts(method: Any, layer: Any, dispatch_output: Any) -> Any:
    """Replaces Fp8MoEMethod.apply: SGLang's own plain torch, which asks for the weights of one expert after the other."""
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native  # pyright: ignore[reportMissingImports]
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput  # pyright: ignore[reportMissingImports]

    x = dispatch_output.hidden_states
    weights = SimpleNamespace(
        num_experts=layer.num_experts,
        w13_weight=Experts(layer.w13_weight, layer.w13_weight_scale_inv, x.dtype),
        w2_weight=Experts(layer.w2_weight, layer.w2_weight_scale_inv, x.dtype),
    )
    return StandardCombineInput(hidden_states=moe_forward_native(weights, x, dispatch_output.topk_output, method.moe_runner_config))


class Experts:
    """[experts, M, N], dequantised one by one as they are asked for."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        self._weight, self._scale, self._dtype = weight, scale, dtype

    def __getitem__(self, index: int) -> torch.Tensor:
        return dequantise(self._weight[index], self._scale[index]).to(self._dtype)
