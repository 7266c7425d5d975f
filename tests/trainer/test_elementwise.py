"""Norm, rotary embedding and SwiGLU against their definitions under autograd, in fp32 and bf16."""

from collections.abc import Callable

import pytest
import torch

from tandem.engine.trainer.elementwise import rms_norm, rope, swiglu

ANGLES = torch.linspace(0, 9, 7 * 4).view(7, 1, 4)
WEIGHT = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, WEIGHT.to(x.dtype), 1e-6)


def _exact_norm(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * WEIGHT


def _rope(x: torch.Tensor) -> torch.Tensor:
    return rope(x, ANGLES.cos(), ANGLES.sin())


def _exact_rope(x: torch.Tensor) -> torch.Tensor:
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(()).double(), ANGLES.double())
    return torch.cat([turned.real, turned.imag], -1)


def _exact_swiglu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x[..., :4]) * x[..., 4:]


@pytest.mark.parametrize(("own", "exact"), [(_norm, _exact_norm), (_rope, _exact_rope), (swiglu, _exact_swiglu)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_value_and_gradient(own: Callable, exact: Callable, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 8).to(dtype).requires_grad_()
    y = x.detach().double().requires_grad_()
    out, wanted = own(x), exact(y)
    grad = torch.randn(out.shape).to(dtype)
    pairs = [(out, wanted), (torch.autograd.grad(out, x, grad)[0], torch.autograd.grad(wanted, y, grad.double())[0])]
    for a, b in pairs:
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_the_weight_of_a_norm_gets_its_gradient() -> None:
    x, weight = torch.randn(5, 3, 8), WEIGHT.float().requires_grad_()
    exact = WEIGHT.clone().requires_grad_()
    grad = torch.randn(5, 3, 8)
    (own,) = torch.autograd.grad(rms_norm(x, weight, 1e-6), weight, grad)
    y = x.double()
    (wanted,) = torch.autograd.grad(y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact, exact, grad.double())
    assert torch.allclose(own.double(), wanted, atol=1e-5)
