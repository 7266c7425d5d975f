"""SwiGLU in few passes of plain torch. Shapes as in the package."""

import torch


def forward(x_T2F: torch.Tensor) -> torch.Tensor:
    """[T, F]."""
    gate, up = x_T2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def backward(grad_TF: torch.Tensor, x_T2F: torch.Tensor) -> torch.Tensor:
    """[T, 2F]."""
    gate, up = x_T2F.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_T2F = torch.empty_like(x_T2F)
    grad_gate, grad_up = grad_T2F.chunk(2, dim=-1)
    torch.mul(grad_TF, silu, out=grad_up)
    # silu' = sigmoid + silu (1 - sigmoid)
    slope = torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)
    torch.mul(slope.mul_(up), grad_TF, out=grad_gate)
    return grad_T2F
