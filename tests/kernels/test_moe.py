"""The parts of a mixture of experts against fp64: grouping of rows by expert, grouped matrix products, weighted SwiGLU, and all of it."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.kernels import backend
from tandem.kernels.grouped_gemm import grouped_linear
from tandem.kernels.permute import Plan, chunk_plan, gather_weights, permute, route, unpermute
from tandem.kernels.swiglu import weighted_swiglu

BACKENDS: list[Any] = ["reference", "triton"]
# A sum in fp32 of operands that are exact; in bf16 and fp16 it is rounded once more at the end (2^-9 and 2^-12 of it).
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def offsets_of(sizes: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int().to(DEVICE)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()


# Grouped products

# Off every tile: sizes of groups, inputs, outputs.
GROUPS = {
    "ragged": ([3, 0, 70, 1, 0], 40, 72),
    "one expert": ([65], 33, 17),
    "an expert with everything": ([0, 130, 0], 64, 64),
    "no rows": ([0, 0], 16, 8),
    "narrow": ([1, 1, 1], 1, 1),
}


def product_with_gradients(x: torch.Tensor, weights: Sequence[torch.Tensor], offsets: torch.Tensor, grad: torch.Tensor) -> Any:
    out = grouped_linear(x, weights, offsets)
    return out, *torch.autograd.grad(out, [x, *weights], grad)


def exact_product(x: torch.Tensor, weights: Sequence[torch.Tensor], sizes: Sequence[int], grad: torch.Tensor) -> Any:
    x, weights = x.detach().double().requires_grad_(), [weight.detach().double().requires_grad_() for weight in weights]
    out = torch.cat([rows @ weight.T for rows, weight in zip(x.split(list(sizes)), weights, strict=True)])
    return out, *torch.autograd.grad(out, [x, *weights], grad.double())


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_a_grouped_product_and_its_gradients(dtype: torch.dtype, tolerance: float, name: str, choice: Any) -> None:
    sizes, num_inputs, num_outputs = GROUPS[name]
    torch.manual_seed(len(name))
    x = randn(sum(sizes), num_inputs, dtype=dtype).requires_grad_()
    weights = [randn(num_outputs, num_inputs, dtype=dtype).requires_grad_() for _ in sizes]
    grad = randn(sum(sizes), num_outputs, dtype=dtype)
    with backend.chosen(choice):
        found = product_with_gradients(x, weights, offsets_of(sizes), grad)
        again = product_with_gradients(x, weights, offsets_of(sizes), grad)
    for ours, second, wanted in zip(found, again, exact_product(x, weights, sizes, grad), strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, second)
        assert_close(ours, wanted, tolerance)


@pytest.mark.parametrize("choice", BACKENDS)
def test_rows_of_views_and_a_frozen_matrix(choice: Any) -> None:
    """Columns of a wider tensor, a gradient that is expanded, matrices cut from one tensor at any address."""
    torch.manual_seed(1)
    wide, storage = randn(9, 20), randn(1 + 2 * 5 * 10)
    x = wide[:, 3:13].requires_grad_()
    frozen, weight = storage[1:51].view(5, 10), storage[51:].view(5, 10).requires_grad_()
    with backend.chosen(choice):
        out = grouped_linear(x, [frozen, weight], offsets_of([4, 5]))
        grad_x, grad_weight = torch.autograd.grad(out.sum(), [x, weight])
    assert_close(out, torch.cat([x[:4] @ frozen.T, x[4:] @ weight.T]), 1e-6)
    assert_close(grad_x, torch.cat([frozen.sum(0).expand(4, -1), weight.sum(0).expand(5, -1)]), 1e-6)
    assert_close(grad_weight, x[4:].sum(0).expand(5, -1), 1e-6)


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize(("dtype", "inputs", "outputs"), [(torch.float32, 20, 9), (torch.bfloat16, 32, 16)], ids=["by element", "in bulk"])
def test_what_is_no_number_stays_with_its_expert(dtype: torch.dtype, inputs: int, outputs: int, choice: Any) -> None:
    """Tiles reach over the ends of groups; 0 times NaN would be NaN."""
    torch.manual_seed(3)
    x, weights = randn(12, inputs, dtype=dtype), [randn(outputs, inputs, dtype=dtype).requires_grad_() for _ in range(3)]
    x[5] = float("nan")
    with backend.chosen(choice):
        out = grouped_linear(x.requires_grad_(), weights, offsets_of([5, 3, 4]))
        grad_x, *grads = torch.autograd.grad(out, [x, *weights], torch.ones_like(out))
    assert [row for row in range(12) if out[row].isnan().any()] == [5]
    assert [e for e, grad in enumerate(grads) if grad.isnan().any()] == [1]
    assert grad_x.isfinite().all()


def test_what_does_not_fit_a_grouped_product_is_named() -> None:
    x, weight = torch.zeros(4, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"weights_EFH\[1\] is \(3, 2\).*it must be \(2, 3\)"):
        grouped_linear(x, [weight, weight.T], offsets_of([2, 2]).cpu())
    with pytest.raises(ValueError, match=r"torch.bfloat16 on cpu; it must be \(2, 3\) torch.float32"):
        grouped_linear(x, [weight.bfloat16()], offsets_of([4]).cpu())
    with pytest.raises(ValueError, match=r"ending at 5; it must rise from 0 to 4"):
        grouped_linear(x, [weight, weight], offsets_of([2, 3]).cpu())
    with pytest.raises(ValueError, match=r"2 matrices need \[3\] torch.int32"):
        grouped_linear(x, [weight, weight], offsets_of([4]).cpu())
    with pytest.raises(ValueError, match=r"x_MH is \(4, 3\) torch.float64; it must be"):
        grouped_linear(x.double(), [weight], offsets_of([4]).cpu())
    with pytest.raises(ValueError, match=r"torch.float32 on meta; it must be \(2, 3\) torch.float32 on cpu"):
        grouped_linear(x, [weight.to("meta")], offsets_of([4]).cpu())
    with pytest.raises(ValueError, match="there must be at least one matrix"):
        grouped_linear(x, [], offsets_of([]).cpu())


# Grouping of rows


def map_of(num_tokens: int, num_experts: int, num_chosen: int) -> torch.Tensor:
    chosen = torch.rand(num_tokens, num_experts).topk(num_chosen, dim=-1).indices
    return torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, chosen, True).to(DEVICE)


ROUTES = [(37, 5, 3), (1, 1, 1), (70, 300, 8), (0, 4, 2), (129, 64, 1), (16, 8, 8)]


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), ROUTES)
def test_rows_are_sorted_by_expert_then_token(num_tokens: int, num_experts: int, num_chosen: int, choice: Any) -> None:
    torch.manual_seed(num_tokens)
    chosen = map_of(num_tokens, num_experts, num_chosen)
    pairs = [(e, t) for e in range(num_experts) for t in range(num_tokens) if chosen[t, e]]
    with backend.chosen(choice):
        plan = route(chosen, num_rows=len(pairs), max_per_token=num_chosen)
    assert plan.source_M.tolist() == [t for _, t in pairs]
    assert plan.offsets_E1.tolist() == offsets_of(chosen.sum(0).tolist()).tolist()
    assert plan.place_TK.tolist() == [[i for i, pair in enumerate(pairs) if pair[1] == t] for t in range(num_tokens)]


@pytest.mark.parametrize("choice", BACKENDS)
def test_tokens_may_have_fewer_experts_than_others_or_none(choice: Any) -> None:
    """What a rank of an expert-parallel group sees: its own experts' columns of the map."""
    chosen = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.bool, device=DEVICE)
    with backend.chosen(choice):
        plan = route(chosen, num_rows=6, max_per_token=4)
        x = torch.arange(4.0, device=DEVICE)[:, None].expand(4, 3)
        rows = permute(x, plan)
        assert rows[:, 0].tolist() == [2.0, 0.0, 2.0, 0.0, 2.0, 3.0]
        rows, weights = (torch.cat([part.new_full((1, *part.shape[1:]), float("nan")), part])[1:] for part in (rows, rows[:, 0]))
        for factors in (None, torch.ones_like(weights)):  # and before the first row lies no row that could be taken for number -1
            assert unpermute(rows, plan, factors)[:, 0].tolist() == [0.0, 0.0, 6.0, 3.0]
        assert unpermute(rows, plan, weights)[:, 0].tolist() == [0.0, 0.0, 12.0, 9.0]
    assert plan.place_TK.tolist() == [[1, 3, -1, -1], [-1] * 4, [0, 2, 4, -1], [5, -1, -1, -1]]


def dense_plan(plan: Plan) -> torch.Tensor:
    """[T, M] fp64: which rows are a token's."""
    row = torch.arange(len(plan.source_M), device=DEVICE)
    return torch.zeros(len(plan.place_TK), len(row), dtype=torch.float64, device=DEVICE).index_put(
        (plan.source_M.long(), row), row.new_ones(()).double()
    )


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "width"), [(21, 40), (3, 2050), (0, 4)])
def test_copies_and_sums_with_gradients(
    num_tokens: int, width: int, dtype: torch.dtype, tolerance: float, weighted: bool, choice: Any
) -> None:
    torch.manual_seed(width)
    x = randn(num_tokens, width, dtype=dtype).requires_grad_()
    scores = torch.rand(num_tokens, 6, device=DEVICE).requires_grad_()
    grad = randn(num_tokens, width, dtype=dtype)
    with backend.chosen(choice):
        plan = route(map_of(num_tokens, 6, 3), num_rows=3 * num_tokens, max_per_token=3)
        rows = permute(x, plan)
        y = (rows * rows.detach()).detach().requires_grad_()
        weights = gather_weights(scores, plan) if weighted else None
        out = unpermute(y, plan, weights)
        found = torch.autograd.grad(out, [y, scores] if weighted else [y], grad)
        (grad_x,) = torch.autograd.grad(rows, x, y.detach())
    dense = dense_plan(plan)
    expert_M = torch.searchsorted(plan.offsets_E1[1:].contiguous(), torch.arange(len(rows), device=DEVICE), right=True)
    y64, scores64 = y.detach().double().requires_grad_(), scores.detach().double().requires_grad_()
    factor = scores64[plan.source_M.long(), expert_M] if weighted else torch.ones_like(y64[:, 0])
    wanted = dense @ (y64 * factor[:, None])
    assert torch.equal(rows, x[plan.source_M.long()])
    assert_close(grad_x, dense @ y.double(), tolerance)
    assert_close(out, wanted, tolerance)
    for ours, right in zip(found, torch.autograd.grad(wanted, [y64, scores64] if weighted else [y64], grad.double()), strict=True):
        assert_close(ours, right, tolerance)


def test_chunks_change_their_order() -> None:
    """The rows that other ranks sent, one chunk for each of a rank's experts, become rows by expert. Chunks may be empty."""
    rows = torch.arange(6.0, device=DEVICE)[:, None].requires_grad_()
    plan = chunk_plan(torch.tensor([1, 0, 3, 2], device=DEVICE), torch.tensor([2, 0, 3, 1], device=DEVICE), num_rows=6)
    sorted_rows = permute(rows, plan)
    assert sorted_rows[:, 0].tolist() == [1.0, 2.0, 3.0, 0.0, 4.0, 5.0]
    assert torch.equal(unpermute(sorted_rows, plan), rows)
    assert plan.offsets_E1.tolist() == [0, 3, 4, 6, 6]
    (grad,) = torch.autograd.grad(sorted_rows, rows, sorted_rows.detach())
    assert torch.equal(grad, rows)


def test_what_does_not_fit_a_plan_is_named() -> None:
    chosen = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="sends 6 rows, at most 3 of one token, but num_rows is 6 and max_per_token 2"):
        route(chosen, num_rows=6, max_per_token=2)
    with pytest.raises(ValueError, match=r"torch.int64; it must be \[T, E\] of bool"):
        route(chosen.long(), num_rows=6, max_per_token=3)
    plan = route(chosen, num_rows=6, max_per_token=3)
    with pytest.raises(ValueError, match=r"x_TH is \(6, 4\) on cpu; the plan needs 2 rows"):
        permute(torch.zeros(6, 4), plan)
    with pytest.raises(ValueError, match=r"x_TH is torch.int64 of shape \(2, 4\); it must be torch.float32"):
        permute(torch.zeros(2, 4).long(), plan)
    with pytest.raises(ValueError, match=r"y_MH is \(6, 4\) on meta; the plan needs 6 rows on cpu"):
        unpermute(torch.zeros(6, 4, device="meta"), plan)
    with pytest.raises(ValueError, match=r"weights_M is \(2,\) torch.float32 on cpu; it must be \(6,\)"):
        unpermute(torch.zeros(6, 4), plan, torch.zeros(2))
    with pytest.raises(ValueError, match="the plan has 2 tokens and 3 experts"):
        gather_weights(torch.zeros(2, 4), plan)


# Between the matrices, and the whole


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 24), (2, 2051), (0, 8)])
def test_swiglu_times_a_weight(rows: int, width: int, dtype: torch.dtype, tolerance: float, choice: Any) -> None:
    torch.manual_seed(width)
    x, weights = randn(rows, 2 * width, dtype=dtype).requires_grad_(), torch.rand(rows, device=DEVICE).requires_grad_()
    grad = randn(rows, width, dtype=dtype)
    with backend.chosen(choice):
        out = weighted_swiglu(x, weights)
        found = torch.autograd.grad(out, [x, weights], grad)
    x64, weights64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    gate, up = x64.chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up * weights64[:, None]
    assert_close(out, wanted, tolerance)
    for ours, right in zip(found, torch.autograd.grad(wanted, [x64, weights64], grad.double()), strict=True):
        assert_close(ours, right, tolerance)


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("num_chosen", [1, 3])
def test_a_layer_of_experts_is_the_sum_over_a_tokens_experts(num_chosen: int, choice: Any) -> None:
    torch.manual_seed(num_chosen)
    num_tokens, num_experts, width, ffn = 19, 4, 24, 10
    x, chosen = randn(num_tokens, width).requires_grad_(), map_of(num_tokens, num_experts, num_chosen)
    scores = torch.rand(num_tokens, num_experts, device=DEVICE).requires_grad_()
    first = [randn(2 * ffn, width, scale=0.3).requires_grad_() for _ in range(num_experts)]
    second = [randn(width, ffn, scale=0.3).requires_grad_() for _ in range(num_experts)]
    with backend.chosen(choice):
        plan = route(chosen, num_rows=num_tokens * num_chosen, max_per_token=num_chosen)
        inner = weighted_swiglu(grouped_linear(permute(x, plan), first, plan.offsets_E1), gather_weights(scores, plan))
        out = unpermute(grouped_linear(inner, second, plan.offsets_E1), plan)
        found = torch.autograd.grad(out.square().sum(), [x, scores, *first, *second])
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, scores, *first, *second)]
    x64, scores64, first64, second64 = leaves[0], leaves[1], leaves[2 : 2 + num_experts], leaves[2 + num_experts :]
    wanted = torch.zeros_like(x64)
    for e in range(num_experts):
        gate, up = (x64 @ first64[e].T).chunk(2, -1)
        wanted = wanted + (torch.nn.functional.silu(gate) * up) @ second64[e].T * (scores64 * chosen)[:, e, None]
    assert_close(out, wanted, 2e-6)
    for ours, right in zip(found, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        assert_close(ours, right, 5e-6)
