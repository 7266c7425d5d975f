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


def weighted_forward(x_T2F: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """[T, F]."""
    return forward(x_T2F.float()).mul_(weights_T[:, None]).to(x_T2F.dtype)


def weighted_backward(grad_TF: torch.Tensor, x_T2F: torch.Tensor, weights_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of the weights."""
    grad_TF, x32_T2F = grad_TF.float(), x_T2F.float()
    grad_weights_T = torch.linalg.vecdot(grad_TF, forward(x32_T2F))
    return backward(grad_TF * weights_T[:, None], x32_T2F).to(x_T2F.dtype), grad_weights_T
