"""What torch asks of an operator, of those that are registered with it: schema, shapes without values, autograd, and tracing."""

from typing import Any

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.kernels import backend, logprob, norm, policy_loss, rope, swiglu
from tandem.kernels.native import library

BACKENDS = ["native" if library(DEVICE) is not None else "reference", "triton"]


def randn(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).requires_grad_(grad)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _inputs() -> dict[str, tuple[Any, ...]]:
    mask, angles = torch.tensor([True, False, True, True, True], device=DEVICE), randn(5, 1, 4, grad=False)
    flags = torch.tensor([True, True, False], device=DEVICE)
    return {
        "rms_norm": (norm._forward, (randn(5, 3, 8), randn(8), 1e-6)),
        "swiglu": (swiglu._forward, (randn(5, 8),)),
        "weighted_swiglu": (swiglu._weighted_forward, (randn(5, 8), randn(5))),
        "rope": (rope._rotate, (randn(5, 2, 8), angles.cos(), angles.sin(), False)),
        "linear_logprob": (
            logprob._forward,
            (randn(5, 8), randn(7, 8), torch.arange(5, device=DEVICE), torch.rand(5, device=DEVICE), None),
        ),
        "linear_logprob_sum": (
            logprob._sum,
            (randn(5, 8), randn(7, 8), torch.arange(5, device=DEVICE), torch.rand(5, device=DEVICE), randn(5, grad=False), None),
        ),
        "policy_loss": (
            policy_loss._loss_and_coefficients,
            (randn(5), randn(5, grad=False), randn(2, grad=False), ints(0, 2, 5), mask, None, "mirror_descent", 0.1, 0.2, 0.2),
        ),
        "group_statistics": (
            policy_loss._group_statistics,
            (randn(3, grad=False), ints(3, 4, 5), flags, ~flags, ints(0, 1, 3), 0.5, "mean", 0.0, True),
        ),
    }


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("name", _inputs())
def test_an_operator_is_what_it_says(name: str, choice: Any) -> None:
    torch.manual_seed(0)
    operator, inputs = _inputs()[name]
    if name == "policy_loss" and choice == "reference":
        pytest.skip("csrc was not built, so that the reference computes it under autograd")
    with backend.chosen(choice):
        torch.library.opcheck(operator.overload, inputs)
