"""RMSNorm, SwiGLU and rotary embedding against their definitions under autograd in fp64, in plain torch and in Triton."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.kernels import backend
from tandem.kernels.norm import rms_norm
from tandem.kernels.rope import interleaved_rope, rope
from tandem.kernels.swiglu import swiglu, weighted_swiglu

BACKENDS: list[Any] = ["reference", "triton"]
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)]
EPS = 1e-6


def weight_of(width: int) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, width, dtype=torch.float64, device=DEVICE)


def angles_of(num_tokens: int, half: int) -> torch.Tensor:
    return torch.arange(num_tokens, device=DEVICE)[:, None, None] * torch.linspace(1, 1e-4, half, device=DEVICE)


def own_norm(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight_of(x.shape[-1]).float(), EPS)


def exact_norm(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight_of(x.shape[-1])


def own_rope(x: torch.Tensor) -> torch.Tensor:
    angles = angles_of(x.shape[0], x.shape[-1] // 2)
    return rope(x, angles.cos(), angles.sin())


def exact_rope(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    angles = angles_of(x.shape[0], half).double()
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def own_interleaved(x: torch.Tensor) -> torch.Tensor:
    angles = angles_of(x.shape[0], x.shape[-1] // 2)
    return interleaved_rope(x, angles.cos(), angles.sin())


def exact_interleaved(x: torch.Tensor) -> torch.Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    return exact_rope(torch.cat([pairs[..., 0], pairs[..., 1]], -1))


def exact_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


FUNCTIONS = {
    "norm": (own_norm, exact_norm),
    "swiglu": (swiglu, exact_swiglu),
    "rope": (own_rope, exact_rope),
    "interleaved": (own_interleaved, exact_interleaved),
}
SHAPES = [(7, 3, 8), (1, 1, 2), (9, 5, 96), (3, 17, 130), (2, 1, 4098), (0, 4, 64)]


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, name: str, choice: Any) -> None:
    own, exact = FUNCTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    with backend.chosen(choice):
        compare(own, exact, x, tolerance)


def compare(own: Callable, exact: Callable, x: torch.Tensor, tolerance: float) -> None:
    y = x.detach().double().requires_grad_()
    out, wanted = own(x), exact(y)
    grad = torch.randn_like(out)
    found_grad, wanted_grad = torch.autograd.grad(out, x, grad)[0], torch.autograd.grad(wanted, y, grad.double())[0]
    for found, right in ((out, wanted), (found_grad, wanted_grad)):
        assert found.dtype == x.dtype
        assert found.shape == right.shape
        assert (found.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("choice", BACKENDS)
def test_strided_views_of_one_projection(choice: Any) -> None:
    """Queries and keys are views of one tensor; so are gate and up of experts."""
    torch.manual_seed(1)
    x = torch.randn(9, 6, 32, device=DEVICE, requires_grad=True)
    with backend.chosen(choice):
        for name in ("norm", "rope", "swiglu"):
            own, exact = FUNCTIONS[name]
            found = own(x[:, 2:5])
            (grad,) = torch.autograd.grad(found.square().sum(), x)
            y = x.detach().double().requires_grad_()
            wanted = exact(y[:, 2:5])
            (right,) = torch.autograd.grad(wanted.square().sum(), y)
            assert torch.allclose(found.double(), wanted, atol=1e-5)
            assert torch.allclose(grad.double(), right, atol=1e-4)


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_the_weight_of_a_norm_gets_its_gradient_and_always_the_same_bits(rows: int, choice: Any) -> None:
    torch.manual_seed(2)
    x, grad = torch.randn(rows, 48, device=DEVICE), torch.randn(rows, 48, device=DEVICE)
    weight, exact = weight_of(48).float().requires_grad_(), weight_of(48).requires_grad_()
    with backend.chosen(choice):
        first, second = (torch.autograd.grad(rms_norm(x, weight, EPS), weight, grad)[0] for _ in range(2))
    y = x.double()
    (wanted,) = torch.autograd.grad(y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt() * exact, exact, grad.double())
    assert torch.equal(first, second)
    assert torch.allclose(first.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", BACKENDS)
def test_extreme_values_stay_finite(choice: Any) -> None:
    x = torch.tensor([[1e18, -1e18, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-200.0, 200.0, 3.0, -3.0]], device=DEVICE)
    with backend.chosen(choice):
        assert torch.isfinite(rms_norm(x, torch.ones(4, device=DEVICE), EPS)).all()
        assert torch.isfinite(swiglu(x)).all()


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight_H is \(3,\) on cpu and x_TH \(2, 4\)"):
        rms_norm(torch.zeros(2, 4), torch.zeros(3), EPS)
    with pytest.raises(ValueError, match=r"x_T2F is \(2, 5\)"):
        swiglu(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"cos_T1D \(2, 1, 3\)"):
        rope(torch.zeros(2, 1, 4), torch.zeros(2, 1, 3), torch.zeros(2, 1, 3))


@pytest.mark.parametrize("choice", BACKENDS)
def test_wrong_dtypes_and_devices_are_named_before_any_launch(choice: Any) -> None:
    x, angles = torch.zeros(2, 1, 4), torch.zeros(2, 1, 2)
    elsewhere = angles.to("meta")  # stands for the other device where there is one only
    with backend.chosen(choice):
        with pytest.raises(ValueError, match=r"x_TH is torch.float64 of shape \(2, 1, 4\); it must be torch.float32, torch.bfloat16"):
            rms_norm(x.double(), torch.ones(4), EPS)
        with pytest.raises(ValueError, match=r"weight_H is torch.int64"):
            rms_norm(x, torch.ones(4, dtype=torch.int64), EPS)
        with pytest.raises(ValueError, match=r"weight_H is \(4,\) on meta and x_TH \(2, 1, 4\) on cpu"):
            rms_norm(x, torch.ones(4, device="meta"), EPS)
        with pytest.raises(ValueError, match=r"x_T2F is torch.int32"):
            swiglu(x.int())
        with pytest.raises(ValueError, match=r"x_T2F is torch.float64"):
            weighted_swiglu(x[:, 0].double(), torch.ones(2))
        with pytest.raises(ValueError, match=r"weights_T is \(2,\) torch.float64 on cpu; it must be \(2,\) torch.float32"):
            weighted_swiglu(x[:, 0], torch.ones(2).double())
        with pytest.raises(ValueError, match=r"x_TND is torch.int64"):
            rope(x.long(), angles, angles)
        with pytest.raises(ValueError, match=r"sin_T1D is torch.bfloat16 on cpu; it must be torch.float32 on cpu"):
            rope(x, angles, angles.bfloat16())
        with pytest.raises(ValueError, match=r"cos_T1D is torch.float32 on meta; it must be torch.float32 on cpu"):
            rope(x, elsewhere, angles)
