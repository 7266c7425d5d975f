"""Packed attention for GPUs: the forward pass, and what it shares with the backward passes.

Each sum is made by one program in one order, so results are the same bits from run to run. Tiles that the plan calls whole are
computed without a mask. Softmax is in powers of two; sums are in fp32.

Tiles are loaded through tensor descriptors (bulk copies on Hopper). A head of 192 is computed as 128 + 64. In fp32 products are exact:
tensor cores have no such, and the others take a whole row and column of what they multiply into registers. So there products over a
head's width are summed by 64 columns at a time, read again for every tile.

Shapes: T queries, S keys, N query heads, G key/value heads, D head width, P padded T.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tandem.kernels.attention.plan import AttentionPlan
from tandem.kernels.backend import has_bulk_copies, is_amd

LOG2_E = 1.4426950408889634
EXACT_COLUMNS = 64  # of a head that one product in fp32 sums; those of a head of 192 that are not among its first 128, too


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, and how many warps and copies in flight compute it."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """One tile for each of the three passes."""

    forward: Tile
    keys: Tile
    queries: Tile


def tiles_of(q_TND: torch.Tensor, value_width: int) -> Tiles:
    """The tiles for these queries: none spills registers (docs/compiled.md). Their sizes are not tuned on hardware."""
    width = max(q_TND.shape[2], value_width)
    if q_TND.dtype == torch.float32:
        small = Tile(16, 16, 8, 1)
        return Tiles(forward=Tile(32, 32, 8, 1) if width <= 64 else small, keys=small, queries=small)
    if is_amd(q_TND):
        return tiles_of_amd(width)
    if not has_bulk_copies(q_TND):
        return tiles_before_hopper(width)
    queries = Tile(128, 64, 8, 2)
    if width <= 64:
        return Tiles(forward=Tile(128, 64, 4, 3), keys=Tile(64, 128, 8, 2), queries=queries)
    if width <= 128:
        return Tiles(forward=Tile(128, 128, 8, 2), keys=Tile(64, 128, 8, 2), queries=queries)
    return Tiles(forward=Tile(128, 64, 8, 3), keys=Tile(32, 128, 8, 2), queries=queries)


def tiles_before_hopper(width: int) -> Tiles:
    """Without bulk copies descriptors become pointers, which take many registers: these are the largest tiles that spill none."""
    if width <= 32:
        return Tiles(forward=Tile(64, 32, 4, 2), keys=Tile(32, 64, 8, 2), queries=Tile(64, 32, 8, 2))
    if width <= 128:
        return Tiles(forward=Tile(64, 32, 8, 2), keys=Tile(32, 64, 8, 2), queries=Tile(64, 32, 8, 2))
    return Tiles(forward=Tile(32, 32, 8, 2), keys=Tile(16, 32, 8, 2), queries=Tile(16, 32, 8, 2))


def tiles_of_amd(width: int) -> Tiles:
    """At most 256 registers, so that two waves share a unit and one computes while the other waits."""
    if width <= 64:
        return Tiles(forward=Tile(128, 64, 4, 1), keys=Tile(32, 64, 4, 1), queries=Tile(64, 64, 4, 1))
    if width <= 128:
        return Tiles(forward=Tile(64, 32, 4, 1), keys=Tile(32, 64, 8, 1), queries=Tile(64, 32, 8, 1))
    return Tiles(forward=Tile(64, 32, 4, 1), keys=Tile(16, 32, 4, 1), queries=Tile(16, 32, 4, 1))


@triton.jit
def products_by_columns(left_desc, left_row, left_column, right_desc, right_row, right_column, total, WIDTH: tl.constexpr):
    """total + left @ right.T, as many columns at a time as the descriptors' blocks have."""
    STEP: tl.constexpr = left_desc.block_shape[1]
    for column in tl.static_range(0, WIDTH, STEP):
        left = left_desc.load([left_row, left_column + column])
        right = right_desc.load([right_row, right_column + column])
        total = tl.dot(left, right.T, total, input_precision="ieee")
    return total


@triton.jit
def is_visible(ends_ptr, place_q, start, BLOCK_K: tl.constexpr):
    """Which keys from `start` on these queries see: queries by keys."""
    place_k = start + tl.arange(0, BLOCK_K)
    ends = tl.load(ends_ptr + place_k)
    return (place_k[None, :] <= place_q[:, None]) & (place_q[:, None] < ends[None, :])


@triton.jit
def _forward_tile(
    acc, row_max, row_sum, probs, decay, q0, q1, q1_desc, q_row, q_column, k0_desc, k1_desc, v_desc, ends_ptr, place_q, n, before,
    k_column, v_column, scale_log2, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys of tile n.

    The values of the tile before are added here, not those of n: so the tensor cores do that while this tile's softmax is computed.
    """
    start = n * BLOCK_K
    if k0_desc.dtype == tl.float32:
        scores = tl.zeros([q0.shape[0], BLOCK_K], tl.float32)
        scores = products_by_columns(q1_desc, q_row, q_column, k1_desc, start, k_column, scores, WIDTH_0 + WIDTH_1)
    else:
        k0 = k0_desc.load([start, k_column])
        scores = tl.dot(q0, k0.T, input_precision="ieee")
        if WIDTH_1:
            k1 = k1_desc.load([start, k_column + WIDTH_0])
            scores = tl.dot(q1, k1.T, scores, input_precision="ieee")
    v = v_desc.load([before * BLOCK_K, v_column])
    acc = tl.dot(probs, v, acc * decay[:, None], input_precision="ieee")
    if MASKED:
        scores = tl.where(is_visible(ends_ptr, place_q, start, BLOCK_K), scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    base = new_max
    if MASKED:
        # A row that has seen no key yet: its probabilities are 2^-inf = 0, not 2^(inf - inf).
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
    exact_probs = tl.math.exp2(scores * scale_log2 - base[:, None])
    decay = tl.math.exp2(row_max - base)
    row_sum = row_sum * decay + tl.sum(exact_probs, 1)
    return acc, new_max, row_sum, exact_probs.to(v.dtype), decay


@triton.jit
def _forward(
    q0_desc, q1_desc, k0_desc, k1_desc, v_desc, out_desc, lse_ptr, places_ptr, ends_ptr, order_ptr, query_runs_ptr, runs_ptr,
    num_heads, padded_queries, q_head, k_head, v_head, scale_log2,
    HEADS_PER_GROUP: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % num_heads
    tile = tl.load(order_ptr + program // num_heads)
    group = head // HEADS_PER_GROUP
    start = tile * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    place_q = tl.load(places_ptr + rows)
    q0 = q0_desc.load([start, head * q_head])
    q1 = q0
    if WIDTH_1:
        q1 = q1_desc.load([start, head * q_head + WIDTH_0])
    row_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, VALUE_WIDTH], tl.float32)
    first_whole = tl.load(query_runs_ptr + 3 * tile)
    first_masked = tl.load(query_runs_ptr + 3 * tile + 1)
    end = tl.load(query_runs_ptr + 3 * tile + 2)
    # The tile whose values are still to be added; at first some tile, with probabilities of 0.
    last = 0
    if first_whole < end:
        last = tl.load(runs_ptr + 2 * first_whole)
    probs = tl.zeros([BLOCK_Q, BLOCK_K], v_desc.dtype)
    decay = tl.full([BLOCK_Q], 1.0, tl.float32)
    for run in range(first_whole, first_masked):
        first = tl.load(runs_ptr + 2 * run)
        end_run = tl.load(runs_ptr + 2 * run + 1)
        for n in tl.range(first, end_run, num_stages=STAGES):
            acc, row_max, row_sum, probs, decay = _forward_tile(
                acc, row_max, row_sum, probs, decay, q0, q1, q1_desc, start, head * q_head, k0_desc, k1_desc, v_desc, ends_ptr, place_q, n,
                tl.where(n == first, last, n - 1), group * k_head, group * v_head, scale_log2, WIDTH_0, WIDTH_1, BLOCK_K, False,
            )  # fmt: skip
        last = end_run - 1
    for run in range(first_masked, end):
        first = tl.load(runs_ptr + 2 * run)
        end_run = tl.load(runs_ptr + 2 * run + 1)
        for n in tl.range(first, end_run, num_stages=STAGES):
            acc, row_max, row_sum, probs, decay = _forward_tile(
                acc, row_max, row_sum, probs, decay, q0, q1, q1_desc, start, head * q_head, k0_desc, k1_desc, v_desc, ends_ptr, place_q, n,
                tl.where(n == first, last, n - 1), group * k_head, group * v_head, scale_log2, WIDTH_0, WIDTH_1, BLOCK_K, True,
            )  # fmt: skip
        last = end_run - 1
    v = v_desc.load([last * BLOCK_K, group * v_head])
    acc = tl.dot(probs, v, acc * decay[:, None], input_precision="ieee")
    takes_part = place_q >= 0
    row_sum = tl.where(takes_part, row_sum, 1.0)
    inverse = 1.0 / row_sum
    out_desc.store([start, head * VALUE_WIDTH], tl.where(takes_part[:, None], acc * inverse[:, None], 0.0).to(out_desc.dtype))
    lse = tl.where(takes_part, row_max + tl.math.log2(row_sum), float("inf"))
    tl.store(lse_ptr + head.to(tl.int64) * padded_queries + rows, lse)


def descriptors(x_TND: torch.Tensor, block: int) -> tuple[Any, Any]:
    """Blocks of rows by the first 128 and the other columns of a head; in fp32 the second one's are 64 of any.

    Both are the same where the second one would have no columns, or as many as the first.
    """
    length, heads, width = x_TND.shape
    stride, head_stride = x_TND.stride(0), x_TND.stride(1)
    columns = (heads - 1) * head_stride + width
    # A stride of a single row is free in torch, but not in a descriptor.
    stride = stride if length > 1 else -(-columns // 16) * 16
    first = min(width, 128)
    second = min(width, EXACT_COLUMNS) if x_TND.dtype == torch.float32 else width - first
    whole = TensorDescriptor(x_TND, [length, columns], [stride, 1], [block, first])
    return whole, whole if second in (0, first) else TensorDescriptor(x_TND, [length, columns], [stride, 1], [block, second])


def widths_of(width: int) -> dict[str, int]:
    return {"WIDTH_0": min(width, 128), "WIDTH_1": width - min(width, 128)}


def attention_forward(
    q_TND: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, plan: AttentionPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp [N, P] in powers of two, +inf where a row is padding."""
    (num_queries, num_heads, width), num_groups, value_width = q_TND.shape, k_SGD.shape[1], v_SGD.shape[2]
    tile = tiles_of(q_TND, value_width).forward
    tiles, (places, ends) = plan.tiles(tile.block_q, tile.block_k), plan.places()
    out_TND = q_TND.new_empty((num_queries, num_heads, value_width))
    lse_NP = torch.full((num_heads, places.shape[0]), torch.inf, dtype=torch.float32, device=q_TND.device)
    if not len(tiles.query_order_A):
        return out_TND, lse_NP
    q0, q1 = descriptors(q_TND, tile.block_q)
    k0, k1 = descriptors(k_SGD, tile.block_k)
    v, out = descriptors(v_SGD, tile.block_k)[0], descriptors(out_TND, tile.block_q)[0]
    _forward[(len(tiles.query_order_A) * num_heads,)](
        q0, q1, k0, k1, v, out, lse_NP, places, ends, tiles.query_order_A, tiles.query_runs_A3, tiles.runs_R2,
        num_heads, lse_NP.shape[1], q_TND.stride(1), k_SGD.stride(1), v_SGD.stride(1), scale * LOG2_E,
        HEADS_PER_GROUP=num_heads // num_groups, **widths_of(width), VALUE_WIDTH=value_width,
        BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    return out_TND, lse_NP
