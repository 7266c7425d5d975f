"""Packed attention against a brute-force mask in fp64."""

import pytest
import torch

from tandem.kernels.attention import packed_attention, plan_attention, reference

MASKS = {
    "one token": [1],
    "sequences": [3] * 3 + [4] + [21] * 17,
    "equal sequences": [6] * 6 + [12] * 6 + [18] * 6,
    "shared prompt": [12] * 4 + [7] * 3 + [12] * 5,
    "tree beside a sequence": [2] * 2 + [30] * 5 + [20] * 3 + [12] * 2 + [20] * 8 + [30] * 10,
}


def _brute_force(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible_end: torch.Tensor) -> torch.Tensor:
    i = torch.arange(len(visible_end))
    visible = (i[None] <= i[:, None]) & (i[:, None] < visible_end[None])
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("ind,jnd->nij", q, k) * q.shape[2] ** -0.5
    return torch.einsum("nij,jnd->ind", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def _check(
    visible_end: torch.Tensor, heads: int, groups: int, tolerance: float = 3e-6, dtype: torch.dtype = torch.float32, value_width: int = 8
) -> None:
    torch.manual_seed(len(visible_end))
    shapes = ((heads, 8), (groups, 8), (groups, value_width), (heads, value_width))
    q, k, v, grad = (torch.randn(len(visible_end), *shape).to(dtype) for shape in shapes)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, wanted = packed_attention(own[0], own[1], own[2], visible_end), _brute_force(exact[0], exact[1], exact[2], visible_end)
    grads = torch.autograd.grad(out, own, grad)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double())
    for x, y in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).norm() <= tolerance * max(1.0, y.norm())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "groups"), [(5, 1), (6, 2), (2, 2)])
def test_it_equals_brute_force_with_gradients(mask: str, heads: int, groups: int) -> None:
    _check(torch.tensor(MASKS[mask], dtype=torch.int32), heads, groups)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("value_width", [5, 12])
def test_values_may_have_another_width_than_keys(mask: str, value_width: int) -> None:
    _check(torch.tensor(MASKS[mask], dtype=torch.int32), 4, 2, value_width=value_width)


def test_bf16_stays_within_the_rounding_of_its_inputs_and_outputs() -> None:
    _check(torch.tensor(MASKS["sequences"]), 4, 2, tolerance=4e-3, dtype=torch.bfloat16)


def test_long_sequences_and_trees_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_TASK_SCORES", 32 * 70)
    monkeypatch.setattr(reference, "MAX_KEPT_SCORES", 100)  # probabilities are computed again in the backward pass
    _check(torch.cat([torch.full((70,), 70), torch.full((19,), 89)]), 4, 2)
    _check(torch.cat([torch.full((20,), 200), torch.full((100,), 120), torch.full((80,), 200)]), 4, 2)


def test_a_rank_that_holds_a_part_of_the_queries_gets_their_rows() -> None:
    visible_end = torch.tensor([9] * 9 + [14] * 5)
    q, k, v = (torch.randn(14, n, 4) for n in (2, 1, 1))
    rows = torch.tensor([2, 3, 4, 9, 10, 13, 0, -1])
    part = packed_attention(q[rows.clamp(min=0)], k, v, visible_end, plan=plan_attention(visible_end, rows))
    whole = packed_attention(q, k, v, visible_end)
    assert torch.allclose(part[:7], whole[rows[:7]], atol=1e-6)
    assert not part[7].any()


def test_below_grad_start_nothing_has_a_gradient_and_above_only_keys_below_lose_theirs() -> None:
    visible_end = torch.full((10,), 10)
    q, k, v = (torch.randn(10, 2, 4, requires_grad=True) for _ in range(3))
    cut = torch.autograd.grad(packed_attention(q, k, v, visible_end, grad_start=4).sum(), (q, k, v))
    weight = (torch.arange(10) >= 4).float()[:, None, None]
    exact = torch.autograd.grad((packed_attention(q, k, v, visible_end) * weight).sum(), (q, k, v))
    for x, y in zip(cut, exact, strict=True):
        assert not x[:4].any()
        assert torch.allclose(x[4:], y[4:], atol=1e-6)


def test_a_token_that_cannot_see_itself_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"visible_end\[1\] is 1"):
        plan_attention(torch.tensor([2, 1]))
