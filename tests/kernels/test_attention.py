"""Packed attention, in plain torch and in Triton, against a brute-force mask in fp64."""

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import DEVICE  # isort: skip  (before any kernel)
from tandem.kernels.attention import AttentionPlan, packed_attention, plan_attention, reference, triton_backward
from tandem.kernels.attention import triton as triton_forward
from tandem.kernels.attention.tiles import plan_tiles
from tandem.kernels.attention.triton import Tile, Tiles
from tandem.kernels.backend import chosen

MASKS = {
    "one token": [1],
    "single tokens": list(range(1, 20)),
    "sequences": [3] * 3 + [4] + [21] * 17,
    "equal sequences": [6] * 6 + [12] * 6 + [18] * 6,
    "shared prompt": [12] * 4 + [7] * 3 + [12] * 5,
    "tree beside a sequence": [2] * 2 + [30] * 5 + [20] * 3 + [12] * 2 + [20] * 8 + [30] * 10,
}


def _random_mask(generator: np.random.Generator, num_tokens: int, depth: int, largest: int) -> torch.Tensor:
    """Sequences of random lengths; each may be a prompt shared by random responses, and so on down to `depth`."""
    ends = np.zeros(num_tokens, dtype=np.int64)

    def fill(start: int, end: int, depth: int) -> None:
        while start < end:
            stop = min(end, start + int(generator.integers(1, largest + 1)))
            ends[start:stop] = stop
            if depth > 1 and generator.random() < 0.7:
                fill(start + int(generator.integers(1, stop - start + 1)), stop, depth - 1)
            start = stop

    fill(0, num_tokens, depth)
    return torch.from_numpy(ends)


def _visible(visible_end: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """[T, S]"""
    j = torch.arange(len(visible_end))
    i = (j if positions is None else positions)[:, None]
    return (j <= i) & (i < visible_end)


def _brute_force(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; a row that sees nothing has 0 and -inf."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (torch.einsum("ind,jnd->nij", q, k) * q.shape[2] ** -0.5).masked_fill(~visible, -torch.inf)
    is_empty = ~visible.any(1)
    probs = scores.masked_fill(is_empty[:, None], 0.0).softmax(-1).masked_fill(is_empty[:, None], 0.0)
    lse = scores.masked_fill(is_empty[:, None], 0.0).logsumexp(-1).masked_fill(is_empty, -torch.inf)
    return torch.einsum("nij,jnd->ind", probs, v), lse


def _relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.detach().double().cpu() - y).norm() / y.norm().clamp(min=1e-30))


def _check(
    visible_end: torch.Tensor,
    heads: int,
    groups: int,
    *,
    tolerance: float = 3e-6,
    grad_tolerance: float | None = None,
    dtype: torch.dtype = torch.float32,
    widths: tuple[int, int] = (8, 8),
    positions: torch.Tensor | None = None,
    grad_start: int = 0,
    device: str = "cpu",
    runs_twice: bool = False,
) -> None:
    """Output, log-sum-exp and the gradients through both, against autograd in fp64."""
    torch.manual_seed(len(visible_end))
    num_queries = len(visible_end) if positions is None else len(positions)
    keys = len(visible_end)
    shapes = ((num_queries, heads, widths[0]), (keys, groups, widths[0]), (keys, groups, widths[1]), (num_queries, heads, widths[1]))
    q, k, v, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    grad_lse = torch.randn(heads, num_queries)
    own = [x.clone().to(device).requires_grad_() for x in (q, k, v)]
    plan = plan_attention(visible_end, positions, device=torch.device(device))

    def run() -> tuple[torch.Tensor, ...]:
        out, lse = packed_attention(own[0], own[1], own[2], visible_end, plan=plan, grad_start=grad_start, return_lse=True)
        return out, lse, *torch.autograd.grad((out, lse), own, (grad.to(device), grad_lse.to(device)))

    results = run()
    if runs_twice:
        assert all(torch.equal(x, y) for x, y in zip(results, run(), strict=True))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = _brute_force(exact[0], exact[1], exact[2], _visible(visible_end, positions))
    places = torch.arange(keys) if positions is None else positions
    takes_part = places >= max(grad_start, 0)
    wanted = torch.autograd.grad(
        (out, lse.masked_fill(places < 0, 0.0)), exact, (grad.double() * takes_part[:, None, None], grad_lse.double() * takes_part)
    )
    assert all(x.dtype == dtype for x in (results[0], *results[2:]))
    assert _relative(results[0], out.detach()) <= tolerance
    has_keys = places >= 0
    assert (results[1].cpu().double() - lse)[:, has_keys].abs().max() <= 1e-4
    assert (results[1].cpu()[:, ~has_keys] == -torch.inf).all()
    assert not results[0][(~has_keys).to(device)].any()
    for x, y in zip(results[2:], wanted, strict=True):
        y = y.clone()
        if x is not results[2]:
            y[:grad_start] = 0
            assert not x[:grad_start].any()
        assert _relative(x, y) <= (grad_tolerance or tolerance) if y.any() else not x.any()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "groups"), [(5, 1), (6, 2), (2, 2)])
def test_it_equals_brute_force_with_gradients(mask: str, heads: int, groups: int) -> None:
    _check(torch.tensor(MASKS[mask], dtype=torch.int32), heads, groups)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("value_width", [5, 12])
def test_values_may_have_another_width_than_keys(mask: str, value_width: int) -> None:
    _check(torch.tensor(MASKS[mask], dtype=torch.int32), 4, 2, widths=(8, value_width))


def test_bf16_stays_within_the_rounding_of_its_inputs_and_outputs() -> None:
    _check(torch.tensor(MASKS["sequences"]), 4, 2, tolerance=4e-3, dtype=torch.bfloat16)


@pytest.mark.parametrize("keeps_indices", [True, False])
def test_long_sequences_and_trees_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch, keeps_indices: bool) -> None:
    monkeypatch.setattr(reference, "MAX_TASK_SCORES", 32 * 70)
    monkeypatch.setattr(reference, "MAX_KEPT_SCORES", 100)  # probabilities are computed again in the backward pass
    monkeypatch.setattr(reference, "MAX_KEPT_KEYS", 1 << 20 if keeps_indices else 0)
    _check(torch.cat([torch.full((70,), 70), torch.full((19,), 89)]), 4, 2)
    _check(torch.cat([torch.full((20,), 200), torch.full((100,), 120), torch.full((80,), 200)]), 4, 2)


def test_the_gradient_of_the_reference_is_that_of_its_output() -> None:
    visible_end = torch.tensor(MASKS["shared prompt"])
    q, k, v = (torch.randn(12, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, visible_end, return_lse=True), (q, k, v))


@pytest.mark.parametrize("mask", ["sequences", "tree beside a sequence"])
def test_a_rank_that_holds_a_part_of_the_queries_gets_their_rows(mask: str) -> None:
    positions = torch.tensor([0, 2, 3, 4, 9, 10, 13, 20, -1, -1])
    _check(torch.tensor(MASKS[mask]), 4, 2, positions=positions)
    _check(torch.tensor(MASKS[mask]), 4, 2, positions=positions, grad_start=4)


@pytest.mark.parametrize("grad_start", [1, 4, 10])
def test_below_grad_start_nothing_has_a_gradient_and_above_only_keys_below_lose_theirs(grad_start: int) -> None:
    _check(torch.full((10,), 10), 2, 2, grad_start=grad_start)
    _check(torch.tensor(MASKS["shared prompt"]), 2, 1, grad_start=grad_start)


# --- the plan of tiles


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_tiles_cover_each_visible_pair_once_and_none_is_all_hidden(depth: int, seed: int) -> None:
    generator = np.random.default_rng([depth, seed])
    num_tokens, block_q, block_k = int(generator.integers(1, 150)), int(generator.choice([8, 16])), int(generator.choice([8, 16]))
    visible_end = _random_mask(generator, num_tokens, depth, int(generator.choice([3, 40, 200]))).numpy()
    held = np.flatnonzero(generator.random(num_tokens) < 0.6) if seed % 2 else np.arange(num_tokens)
    positions = np.append(held, [-1] * int(generator.integers(0, 12)))
    grad_start = int(generator.integers(0, num_tokens)) if seed % 3 else 0
    plan = plan_tiles(positions, visible_end, block_q, block_k, grad_start, torch.device("cpu"))
    visible = _visible(torch.from_numpy(visible_end), torch.from_numpy(positions)).numpy()
    takes_part = positions >= grad_start

    def classify(a: int, b: int) -> tuple[bool, bool]:
        """Whether the tile has a visible pair, and whether it is whole, as far as rows take part."""
        rows = slice(a * block_q, (a + 1) * block_q)
        tile = visible[rows, b * block_k : (b + 1) * block_k][takes_part[rows]]
        return bool(tile.any()), bool(tile.size and tile.all() and (b + 1) * block_k <= num_tokens)

    num_q, num_k = -(-len(positions) // block_q), -(-num_tokens // block_k)
    wanted = {(a, b): is_whole for a in range(num_q) for b in range(num_k) for is_seen, is_whole in [classify(a, b)] if is_seen}
    by_query: list[tuple[tuple[int, int], bool]] = []
    for a in range(num_q):
        first_whole, first_masked, end = plan.query_runs_A3[a].tolist()
        for run in range(first_whole, end):
            by_query += [((a, b), run < first_masked) for b in range(*plan.runs_R2[run].tolist())]
    by_key: list[tuple[tuple[int, int], bool]] = []
    for b, (first, whole, end_whole, end) in enumerate(plan.key_bounds_B4.tolist()):
        by_key += [((a, b), whole <= a < end_whole) for a in range(first, end)]
    for visited in (by_query, by_key):
        assert len(visited) == len(wanted)
        assert dict(visited) == wanted
    assert sorted(plan.key_order_B.tolist()) == list(range(grad_start // block_k, num_k))
    first = int((held < grad_start).sum()) // block_q
    assert sorted(plan.query_order_A.tolist()) == list(range(first, num_q))
    work = [sum(a == tile for (a, _), _ in by_query) for tile in plan.query_order_A.tolist()]
    assert work == sorted(work, reverse=True)


def test_a_plan_grows_with_the_tokens_and_not_with_their_square() -> None:
    num_tokens = 1 << 17
    plan = plan_attention(torch.full((num_tokens,), num_tokens))
    tiles = plan.tiles(128, 128)
    assert len(tiles.runs_R2) <= 2 * 1024
    tasks = plan.tasks()
    assert tasks.kept_batches is None
    assert sum(len(group.tasks) for group in tasks.groups) <= num_tokens // 8


# --- Triton


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few tokens are several tiles, and their sizes differ between the passes."""
    tiles = Tiles(forward=Tile(32, 16, 4, 2), keys=Tile(16, 32, 4, 2), queries=Tile(32, 32, 4, 2))
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "tiles_of", lambda *_: tiles)


CASES = {
    "random packing": (_random_mask(np.random.default_rng(1), 61, 1, 40), (64, 64), (8, 1), {}),
    "tree of depth 3": (_random_mask(np.random.default_rng(2), 90, 3, 80), (64, 64), (2, 2), {"runs_twice": True}),
    "shared prompt": (torch.cat([torch.full((37,), 88)] + [torch.full((17,), 54 + 17 * i) for i in range(3)]), (128, 128), (2, 1), {}),
    "single tokens": (torch.arange(1, 41), (64, 64), (2, 1), {}),
    "one token": (torch.tensor([1]), (128, 128), (2, 1), {}),
    "latent": (torch.full((70,), 70), (192, 128), (2, 2), {}),
    "detached prefix": (torch.full((101,), 101), (64, 64), (2, 1), {"grad_start": 45}),
    "detached tree": (_random_mask(np.random.default_rng(3), 96, 3, 96), (64, 64), (2, 1), {"grad_start": 17}),
    "a part of the queries": (
        torch.tensor([60] * 60 + [90] * 30),
        (64, 64),
        (4, 2),
        {"positions": torch.cat([torch.arange(7, 20), torch.arange(41, 54), torch.arange(65, 70), torch.full((3,), -1)]), "grad_start": 9},
    ),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in CASES] + [(case, torch.float32) for case in ("random packing", "latent", "detached tree")],
)
def test_triton_equals_brute_force_with_gradients(case: str, dtype: torch.dtype) -> None:
    visible_end, widths, (heads, groups), options = CASES[case]
    # bf16: the tolerances that hold for its inputs and outputs; fp32: sums in another order.
    tolerances = {"tolerance": 2e-6, "grad_tolerance": 4e-6} if dtype == torch.float32 else {"tolerance": 4e-3, "grad_tolerance": 8e-3}
    with chosen("triton"):
        _check(visible_end, heads, groups, widths=widths, dtype=dtype, device=DEVICE, **tolerances, **options)


@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128)])
def test_the_tiles_of_a_real_run_give_the_same(widths: tuple[int, int]) -> None:
    visible_end = _random_mask(np.random.default_rng(widths[0]), 300, 3, 260)
    with chosen("triton"):
        _check(visible_end, 2, 1, widths=widths, dtype=torch.bfloat16, tolerance=4e-3, grad_tolerance=8e-3, grad_start=131, device=DEVICE)


@pytest.mark.usefixtures("small_tiles")
def test_triton_takes_strided_tensors_and_expanded_gradients() -> None:
    visible_end = torch.tensor([50] * 50)
    mixed = torch.randn(50, 4, 96, device=DEVICE)
    views = [mixed[:, :2, :64], mixed[:, 2:3, 16:80], mixed[:, 3:4, 32:64]]
    results = []
    for tensors in (views, [view.contiguous() for view in views]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        with chosen("triton"):
            out = packed_attention(leaves[0], leaves[1], leaves[2], visible_end.to(DEVICE))
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", [1e-4, 100.0])
def test_triton_is_exact_for_very_small_and_very_large_scores(size: float) -> None:
    torch.manual_seed(0)
    visible_end = torch.tensor([40] * 40)
    q, k, v = (torch.randn(40, 1, 64) * s for s in (size, size, 1.0))
    with chosen("triton"):
        out, lse = packed_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), visible_end.to(DEVICE), return_lse=True)
    wanted, wanted_lse = _brute_force(q.double(), k.double(), v.double(), _visible(visible_end))
    assert torch.isfinite(out).all()
    # Scores up to 4e4 are known to 4e-3 in fp32: the share of two that are nearly equal, to a quarter of that.
    assert _relative(out, wanted) <= (1e-5 if size < 1 else 4e-3)
    assert ((lse.cpu() - wanted_lse) / wanted_lse.abs().clamp(min=1.0)).abs().max() <= 1e-6


def test_no_tokens_are_no_work() -> None:
    empty = torch.empty(0, 2, 64, device=DEVICE, requires_grad=True)
    for backend in ("reference", "triton"):
        with chosen(backend):
            out, lse = packed_attention(empty, empty, empty, torch.empty(0, dtype=torch.int32, device=DEVICE), return_lse=True)
            assert out.shape == (0, 2, 64)
            assert lse.shape == (2, 0)
            assert torch.autograd.grad(out.sum(), empty)[0].shape == (0, 2, 64)


# --- input


@pytest.mark.parametrize(
    ("visible_end", "message"),
    [
        ([2, 1], r"visible_end\[1\] is 1"),
        ([2, 3], r"visible_end\[1\] is 3, but there are 2"),
        ([3, 5, 5, 5, 5], r"token 1 sees token 0 and is visible up to 5, but token 0 only up to 3"),
        ([6, 4, 3, 4, 6, 6], None),
        ([6, 4, 5, 5, 6, 6], r"token 2 sees token 1 and is visible up to 5, but token 1 only up to 4"),
    ],
)
def test_visible_ends_must_nest(visible_end: list[int], message: str | None) -> None:
    if message is None:
        plan_attention(torch.tensor(visible_end))
    else:
        with pytest.raises(ValueError, match=message):
            plan_attention(torch.tensor(visible_end))


@pytest.mark.parametrize("positions", [[3, 2], [1, 1], [-1, 1], [0, 4]])
def test_places_of_queries_must_increase(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="must increase"):
        plan_attention(torch.full((4,), 4), torch.tensor(positions))


def _inputs(**changes: torch.Tensor) -> list[torch.Tensor]:
    shapes = {"q": (8, 4, 64), "k": (8, 2, 64), "v": (8, 2, 64)}
    return [changes.get(name, torch.zeros(shape)) for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"k": torch.zeros(8, 3, 64), "v": torch.zeros(8, 3, 64)}, {}, "do not fit"),
        ({"k": torch.zeros(8, 2, 32)}, {}, "do not fit"),
        ({"q": torch.zeros(7, 4, 64)}, {}, "q has 7 rows"),
        ({"v": torch.zeros(8, 2, 64, dtype=torch.bfloat16)}, {}, "v torch.bfloat16"),
        ({"k": torch.zeros(8, 2, 64, device="meta")}, {}, "k on meta"),
        ({}, {"scale": -1.0}, "scale is -1.0"),
        ({}, {"grad_start": 9}, "grad_start is 9"),
        ({"q": torch.zeros(8, 4, 80), "k": torch.zeros(8, 2, 80)}, {}, "heads are 80 wide"),
        ({"q": torch.zeros(8, 64, 4).transpose(1, 2)}, {}, r"call q.contiguous\(\)"),
        ({"v": torch.zeros(8, 2, 65)[:, :, 1:]}, {}, r"call v.contiguous\(\)"),
    ],
)
def test_bad_input_is_an_error_before_any_launch(changes: dict[str, torch.Tensor], options: dict[str, float], message: str) -> None:
    q, k, v = _inputs(**changes)
    with chosen("triton"), pytest.raises(ValueError, match=message):
        packed_attention(q, k, v, torch.full((8,), 8), **options)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_a_plan_takes_a_device_with_or_without_its_number() -> None:
    device = torch.device("cuda") if DEVICE == "cuda" else torch.device("cpu", 0)  # what no tensor says of itself
    x, ends = torch.randn(4, 1, 64, device=DEVICE), torch.full((4,), 4)
    assert torch.equal(packed_attention(x, x, x, ends, plan=plan_attention(ends, device=device)), packed_attention(x, x, x, ends))


def test_a_plan_of_another_device_is_an_error() -> None:
    plan: AttentionPlan = plan_attention(torch.full((8,), 8), device=torch.device("meta"))
    q, k, v = _inputs()
    with pytest.raises(ValueError, match="the plan on meta"):
        packed_attention(q, k, v, torch.full((8,), 8), plan=plan)
