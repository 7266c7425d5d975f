"""SwiGLU in Triton, in fp32 between load and store. Shapes as in the package, with the leading axes flattened to T rows."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

TILE = 2048  # elements of a row that one program computes


@triton.jit
def _gate_and_up(x, row, column, inside, F):
    gate = tl.load(x + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    return gate, tl.load(x + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(x, weights, out, F, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < F
    gate, up = _gate_and_up(x, row, column, inside, F)
    product = gate * tl.sigmoid(gate) * up
    if weights is not None:
        product *= tl.load(weights + row)
    tl.store(out + row * F + column, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_tile(grad, x, grad_x, weight, row, column, F):
    """Gradients of the gate and of the upper half. Returns: what the tile gives to the weight's gradient, element by element."""
    inside = column < F
    gate, up = _gate_and_up(x, row, column, inside, F)
    above = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    to_weight = above * silu * up
    above *= weight
    to_gate = above * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(grad_x + row * 2 * F + column, to_gate.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_x + row * 2 * F + F + column, (above * silu).to(grad_x.dtype.element_ty), mask=inside)
    return to_weight


@triton.jit
def _backward_kernel(grad, x, grad_x, F, TILE: tl.constexpr):
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    _backward_tile(grad, x, grad_x, 1.0, tl.program_id(0).to(tl.int64), column, F)


@triton.jit
def _weighted_backward_kernel(grad, x, weights, grad_x, grad_weights, F, TILE: tl.constexpr):
    """One program for a row: it sums the weight's gradient."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    dot = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, F, TILE):
        dot += _backward_tile(grad, x, grad_x, weight, row, start + tl.arange(0, TILE), F)
    tl.store(grad_weights + row, tl.sum(dot, 0))


def _grid(x_T2F: torch.Tensor, width: int) -> tuple[int, int]:
    return x_T2F.numel() // (2 * width), -(-width // TILE)


def _forward(x_T2F: torch.Tensor, weights_T: torch.Tensor | None) -> torch.Tensor:
    x_T2F = x_T2F.contiguous()
    width = x_T2F.shape[-1] // 2
    out_TF = x_T2F.new_empty((*x_T2F.shape[:-1], width))
    if out_TF.numel():
        _forward_kernel[_grid(x_T2F, width)](x_T2F, weights_T, out_TF, width, TILE=TILE)
    return out_TF


def forward(x_T2F: torch.Tensor) -> torch.Tensor:
    """[T, F]."""
    return _forward(x_T2F, None)


def weighted_forward(x_T2F: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """[T, F]."""
    return _forward(x_T2F, weights_T.contiguous())


def backward(grad_TF: torch.Tensor, x_T2F: torch.Tensor) -> torch.Tensor:
    """[T, 2F]."""
    x_T2F = x_T2F.contiguous()
    width = x_T2F.shape[-1] // 2
    grad_T2F = torch.empty_like(x_T2F)
    if grad_T2F.numel():
        _backward_kernel[_grid(x_T2F, width)](grad_TF.contiguous(), x_T2F, grad_T2F, width, TILE=TILE)
    return grad_T2F


def weighted_backward(grad_TF: torch.Tensor, x_T2F: torch.Tensor, weights_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of the weights."""
    x_T2F = x_T2F.contiguous()
    grad_T2F, grad_weights_T = torch.empty_like(x_T2F), torch.zeros_like(weights_T)
    if grad_T2F.numel():
        tile = min(TILE, max(32, triton.next_power_of_2(x_T2F.shape[-1] // 2)))
        _weighted_backward_kernel[(len(x_T2F),)](
            grad_TF.contiguous(), x_T2F, weights_T.contiguous(), grad_T2F, grad_weights_T, x_T2F.shape[-1] // 2, TILE=tile
        )
    return grad_T2F, grad_weights_T
