"""What torch asks of an operator, of those that are registered with it: schema, shapes without values, autograd, and tracing.

Not registered are what change memory that others hold: AdamW and bucket packing write through tables of addresses made once, and a
`Detector` keeps its rows. As operators they would be shown every tensor at every call, thousands of them; nothing traces them, and none
has a gradient.
"""

from typing import Any

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.kernels import attention, backend, checksum, grouped_gemm, logprob, norm, permute, policy_loss, repetition, rope, swiglu
from tandem.kernels.native import library

BACKENDS = ["native" if library(DEVICE) is not None else "reference", "triton"]


def randn(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).requires_grad_(grad)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# A tree of two responses to one prompt, and a second sequence. Plans live as long as somebody holds them.
VISIBLE_END = torch.tensor([6, 6, 4, 4, 6, 6, 8, 8])
PLAN = attention.plan_attention(VISIBLE_END, device=torch.device(DEVICE))
MAP_TE = torch.tensor([[True, False, True], [True, True, False], [False, False, False], [False, False, True]], device=DEVICE)
ROUTE = permute.route(MAP_TE, num_rows=5, max_per_token=2)


def _inputs() -> dict[str, tuple[Any, ...]]:
    mask, angles = torch.tensor([True, False, True, True, True], device=DEVICE), randn(5, 1, 4, grad=False)
    flags = torch.tensor([True, True, False], device=DEVICE)
    q, k, v = randn(8, 4, 16), randn(8, 2, 16), randn(8, 2, 32)
    plan = ROUTE.source_M, ROUTE.place_TK
    return {
        "packed_attention": (attention._forward, (q, k, v, PLAN.number, 0.25, 0, False, True)),
        "packed_attention_with_lse": (attention._forward, (q, k, v, PLAN.number, 0.25, 0, True, True)),
        "packed_attention_detached": (attention._forward, (q, k, v, PLAN.number, 0.25, 3, False, True)),
        "packed_attention_without_backward": (
            attention._forward,
            (q.detach(), k.detach(), v.detach(), PLAN.number, 0.25, 0, False, False),
        ),
        "grouped_linear": (grouped_gemm._forward, (randn(5, 16), [randn(8, 16) for _ in range(3)], ROUTE.offsets_E1)),
        "grouped_linear_one_without_gradient": (
            grouped_gemm._forward,
            (randn(5, 16), [randn(8, 16), randn(8, 16, grad=False), randn(8, 16)], ROUTE.offsets_E1),
        ),
        "route": (permute._route, (MAP_TE, 5, 2)),
        "permute": (permute._gather, (randn(4, 16), *plan)),
        "unpermute": (permute._gather_sum, (randn(5, 16), None, *plan)),
        "unpermute_weighted": (permute._gather_sum, (randn(5, 16), randn(5), *plan)),
        "bucket_checksums": (
            checksum._checksums,
            (ints(*range(16)).view(torch.uint8), torch.tensor([[0, 17, 0], [24, 40, 1]], device=DEVICE), ints(0, 1)),
        ),
        "first_repetition": (repetition._first_repetition, (ints(1, 2, 1, 2, 1, 2, 7), ints(0, 6, 7), 4, 2, 3, 2, 1.0)),
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
