"""The small modules in Megatron's layers: norm, activation, a matrix that is not split, and the residual sum."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from tandem.kernels.norm import rms_norm
from tandem.kernels.swiglu import swiglu


class Norm(torch.nn.Module):
    """RMSNorm that tells Megatron to sum its gradient over the tensor-parallel ranks when they split the tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class WholeLinear(torch.nn.Module):
    """A matrix that every tensor-parallel rank holds whole, with the same mark as `Norm`'s weight."""

    def __init__(self, config: TransformerConfig, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        weight = torch.empty(num_outputs, num_inputs, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class ScoreHead(torch.nn.Module):
    """The output layer of a reward model: one number per token, in fp32. Every tensor-parallel rank holds it whole.

    It sees all tokens on each of them, so its gradient is whole everywhere and carries no mark for Megatron to sum.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))

    def forward(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden_MH.float(), self.weight.float())[:, 0]


class SwiGLU(MegatronModule):
    """silu(gate) * up, where [gate, up] is the input's last axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x)


def residual_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """Megatron's bias-dropout-add where there is neither bias nor dropout."""

    def add(x_and_bias: tuple[torch.Tensor, None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        return residual + x_and_bias[0]

    return add
