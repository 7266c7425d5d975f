"""Backward passes of packed attention for GPUs: one over tiles of keys for dK and dV, one over tiles of queries for dQ.

Scores are computed again from the log-sum-exp, in both. Rows that take no part (padding, and queries below `grad_start`) have a
log-sum-exp of +inf, so that their probabilities are 0 without a mask. Each sum is made by one program in one order.

Shapes: T queries, S keys, N query heads, G key/value heads, D head width, P padded T.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tandem.kernels.attention.plan import AttentionPlan
from tandem.kernels.attention.triton import LOG2_E, Tile, descriptors, is_visible, products_by_columns, tiles_of, widths_of


@triton.jit
def _row_sums(
    out_desc, grad_desc, lse_ptr, grad_lse_ptr, lse_used_ptr, delta_ptr, places_ptr, num_heads, num_queries, padded_queries, grad_head,
    first_tile, grad_start, HAS_GRAD_LSE: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = sum over the width of out * grad, less the gradient of the log-sum-exp; and which rows take part."""
    head = tl.program_id(0) % num_heads
    start = (first_tile + tl.program_id(0) // num_heads) * BLOCK
    rows = start + tl.arange(0, BLOCK)
    out = out_desc.load([start, head * VALUE_WIDTH]).to(tl.float32)
    grad = grad_desc.load([start, head * grad_head]).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + head.to(tl.int64) * num_queries + rows, mask=rows < num_queries, other=0.0)
    takes_part = tl.load(places_ptr + rows) >= grad_start
    offset = head.to(tl.int64) * padded_queries + rows
    tl.store(delta_ptr + offset, tl.where(takes_part, delta, 0.0))
    tl.store(lse_used_ptr + offset, tl.where(takes_part, tl.load(lse_ptr + offset), float("inf")))


@triton.jit
def _keys_tile(
    dk0, dk1, dv, k0, k1, v, q0_desc, q1_desc, k1_desc, v1_desc, grad0_desc, grad1_desc, lse_desc, delta_desc, places_ptr, ends_ptr,
    key_start, m, row_offset, q_column, k_column, v_column, grad_column, scale_log2,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries of tile m give to dK and dV. Scores are transposed, keys by queries.

    The exponentials need the first product alone and follow the second one, so that the assembler can spread them between its
    instructions: tensor cores and the others then work at the same time.
    """
    start = m * BLOCK_Q
    # Both products start from what is subtracted of them: it then takes no registers while they are computed.
    base = lse_desc.load([row_offset + start]) / -scale_log2
    q0 = q0_desc.load([start, q_column])
    q1 = q0
    scores = tl.broadcast_to(base[None, :], [BLOCK_K, BLOCK_Q])
    if WIDTH_1:
        q1 = q1_desc.load([start, q_column + WIDTH_0])
    if q0.dtype == tl.float32:
        scores = products_by_columns(k1_desc, key_start, k_column, q1_desc, start, q_column, scores, WIDTH_0 + WIDTH_1)
    else:
        scores = tl.dot(k0, q0.T, scores, input_precision="ieee")
        if WIDTH_1:
            scores = tl.dot(k1, q1.T, scores, input_precision="ieee")
    delta = delta_desc.load([row_offset + start])
    grad = grad0_desc.load([start, grad_column])
    grad_probs = tl.broadcast_to(-delta[None, :], [BLOCK_K, BLOCK_Q])
    if q0.dtype == tl.float32:
        grad_probs = products_by_columns(v1_desc, key_start, v_column, grad1_desc, start, grad_column, grad_probs, VALUE_WIDTH)
    else:
        grad_probs = tl.dot(v, grad.T, grad_probs, input_precision="ieee")
    probs = tl.math.exp2(scores * scale_log2)
    if MASKED:
        place_q = tl.load(places_ptr + start + tl.arange(0, BLOCK_Q))
        place_k = key_start + tl.arange(0, BLOCK_K)
        ends = tl.load(ends_ptr + place_k)
        probs = tl.where((place_k[:, None] <= place_q[None, :]) & (place_q[None, :] < ends[:, None]), probs, 0.0)
    dv = tl.dot(probs.to(grad.dtype), grad, dv, input_precision="ieee")
    grad_scores = (probs * grad_probs).to(q0.dtype)
    dk0 = tl.dot(grad_scores, q0, dk0, input_precision="ieee")
    if WIDTH_1:
        dk1 = tl.dot(grad_scores, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv


@triton.jit
def _backward_keys(
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, grad0_desc, grad1_desc, dk0_desc, dk1_desc, dv_desc, lse_desc, delta_desc,
    places_ptr, ends_ptr, order_ptr, bounds_ptr, num_groups, padded_queries, q_head, k_head, v_head, grad_head, scale_log2, scale,
    grad_start,
    HEADS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over the queries of all heads of its group."""
    program = tl.program_id(0)
    group = program % num_groups
    tile = tl.load(order_ptr + program // num_groups)
    start = tile * BLOCK_K
    k0 = k0_desc.load([start, group * k_head])
    v = v0_desc.load([start, group * v_head])
    dk0 = tl.zeros([BLOCK_K, WIDTH_0], tl.float32)
    dv = tl.zeros([BLOCK_K, VALUE_WIDTH], tl.float32)
    k1 = k0
    dk1 = dk0
    if WIDTH_1:
        k1 = k1_desc.load([start, group * k_head + WIDTH_0])
        dk1 = tl.zeros([BLOCK_K, WIDTH_1], tl.float32)
    first = tl.load(bounds_ptr + 4 * tile)
    first_whole = tl.load(bounds_ptr + 4 * tile + 1)
    end_whole = tl.load(bounds_ptr + 4 * tile + 2)
    end = tl.load(bounds_ptr + 4 * tile + 3)
    # Heads and tiles are one loop, so that copies in flight do not run dry between heads.
    num_whole = end_whole - first_whole
    for i in tl.range(0, num_whole * HEADS_PER_GROUP, num_stages=STAGES):
        head = group * HEADS_PER_GROUP + i // num_whole
        dk0, dk1, dv = _keys_tile(
            dk0, dk1, dv, k0, k1, v, q0_desc, q1_desc, k1_desc, v1_desc, grad0_desc, grad1_desc, lse_desc, delta_desc, places_ptr, ends_ptr,
            start, first_whole + i % num_whole, head * padded_queries, head * q_head, group * k_head, group * v_head, head * grad_head,
            scale_log2, WIDTH_0, WIDTH_1, VALUE_WIDTH, BLOCK_Q, BLOCK_K, False,
        )  # fmt: skip
    num_before = first_whole - first
    num_masked = num_before + end - end_whole
    for i in tl.range(0, num_masked * HEADS_PER_GROUP, num_stages=STAGES):
        head = group * HEADS_PER_GROUP + i // num_masked
        m = i % num_masked
        dk0, dk1, dv = _keys_tile(
            dk0, dk1, dv, k0, k1, v, q0_desc, q1_desc, k1_desc, v1_desc, grad0_desc, grad1_desc, lse_desc, delta_desc, places_ptr, ends_ptr,
            start, tl.where(m < num_before, first + m, end_whole + m - num_before), head * padded_queries, head * q_head,
            group * k_head, group * v_head, head * grad_head, scale_log2, WIDTH_0, WIDTH_1, VALUE_WIDTH, BLOCK_Q, BLOCK_K, True,
        )  # fmt: skip
    has_grad = (start + tl.arange(0, BLOCK_K) >= grad_start)[:, None]
    dk0_desc.store([start, group * WIDTH], tl.where(has_grad, dk0 * scale, 0.0).to(dk0_desc.dtype))
    if WIDTH_1:
        dk1_desc.store([start, group * WIDTH + WIDTH_0], tl.where(has_grad, dk1 * scale, 0.0).to(dk1_desc.dtype))
    dv_desc.store([start, group * VALUE_WIDTH], tl.where(has_grad, dv, 0.0).to(dv_desc.dtype))


@triton.jit
def _queries_tile(
    dq0, dq1, q0, q1, grad, lse, delta, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, grad1_desc, ends_ptr, place_q, query_start, n,
    q_column, k_column, v_column, grad_column, scale_log2, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys of tile n give to dQ. The order of products and exponentials is as in `_keys_tile`, and for its reason."""
    start = n * BLOCK_K
    k0 = k0_desc.load([start, k_column])
    k1 = k0
    if WIDTH_1:
        k1 = k1_desc.load([start, k_column + WIDTH_0])
    if k0.dtype == tl.float32:
        zeros = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        scores = products_by_columns(q1_desc, query_start, q_column, k1_desc, start, k_column, zeros, WIDTH_0 + WIDTH_1)
        grad_probs = products_by_columns(grad1_desc, query_start, grad_column, v1_desc, start, v_column, zeros, VALUE_WIDTH)
    else:
        scores = tl.dot(q0, k0.T, input_precision="ieee")
        if WIDTH_1:
            scores = tl.dot(q1, k1.T, scores, input_precision="ieee")
        v = v0_desc.load([start, v_column])
        grad_probs = tl.dot(grad, v.T, input_precision="ieee")
    probs = tl.math.exp2(scores * scale_log2 - lse[:, None])
    if MASKED:
        probs = tl.where(is_visible(ends_ptr, place_q, start, BLOCK_K), probs, 0.0)
    grad_scores = (probs * (grad_probs - delta[:, None])).to(k0.dtype)
    dq0 = tl.dot(grad_scores, k0, dq0, input_precision="ieee")
    if WIDTH_1:
        dq1 = tl.dot(grad_scores, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit
def _backward_queries(
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, grad0_desc, grad1_desc, dq0_desc, dq1_desc, lse_ptr, delta_ptr, places_ptr,
    ends_ptr, order_ptr, query_runs_ptr, runs_ptr, num_heads, padded_queries, q_head, k_head, v_head, grad_head, scale_log2, scale,
    HEADS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % num_heads
    tile = tl.load(order_ptr + program // num_heads)
    group = head // HEADS_PER_GROUP
    start = tile * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    place_q = tl.load(places_ptr + rows)
    offset = head.to(tl.int64) * padded_queries + rows
    lse = tl.load(lse_ptr + offset)
    delta = tl.load(delta_ptr + offset)
    q0 = q0_desc.load([start, head * q_head])
    grad = grad0_desc.load([start, head * grad_head])
    dq0 = tl.zeros([BLOCK_Q, WIDTH_0], tl.float32)
    q1 = q0
    dq1 = dq0
    if WIDTH_1:
        q1 = q1_desc.load([start, head * q_head + WIDTH_0])
        dq1 = tl.zeros([BLOCK_Q, WIDTH_1], tl.float32)
    first_whole = tl.load(query_runs_ptr + 3 * tile)
    first_masked = tl.load(query_runs_ptr + 3 * tile + 1)
    end = tl.load(query_runs_ptr + 3 * tile + 2)
    for run in range(first_whole, first_masked):
        for n in tl.range(tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1), num_stages=STAGES):
            dq0, dq1 = _queries_tile(
                dq0, dq1, q0, q1, grad, lse, delta, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, grad1_desc, ends_ptr, place_q, start, n,
                head * q_head, group * k_head, group * v_head, head * grad_head, scale_log2,
                WIDTH_0, WIDTH_1, VALUE_WIDTH, BLOCK_Q, BLOCK_K, False,
            )  # fmt: skip
    for run in range(first_masked, end):
        for n in tl.range(tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1), num_stages=STAGES):
            dq0, dq1 = _queries_tile(
                dq0, dq1, q0, q1, grad, lse, delta, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, grad1_desc, ends_ptr, place_q, start, n,
                head * q_head, group * k_head, group * v_head, head * grad_head, scale_log2,
                WIDTH_0, WIDTH_1, VALUE_WIDTH, BLOCK_Q, BLOCK_K, True,
            )  # fmt: skip
    dq0_desc.store([start, head * WIDTH], (dq0 * scale).to(dq0_desc.dtype))
    if WIDTH_1:
        dq1_desc.store([start, head * WIDTH + WIDTH_0], (dq1 * scale).to(dq1_desc.dtype))


def attention_backward(
    grad_TND: torch.Tensor,
    grad_lse_NT: torch.Tensor | None,
    q_TND: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    out_TND: torch.Tensor,
    lse_NP: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    grad_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from those of the output and of the log-sum-exp in nats."""
    (num_queries, num_heads, width), num_groups, value_width = q_TND.shape, k_SGD.shape[1], v_SGD.shape[2]
    tiles = tiles_of(q_TND, value_width)
    places, ends = plan.places()
    padded_queries = lse_NP.shape[1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_TND, k_SGD, v_SGD))
    by_query = plan.tiles(tiles.queries.block_q, tiles.queries.block_k, grad_start)
    by_key = plan.tiles(tiles.keys.block_q, tiles.keys.block_k, grad_start)
    # Tiles in front of these are not visited at all.
    first_row = plan.num_rows_below(grad_start)
    dq[: first_row // tiles.queries.block_q * tiles.queries.block_q].zero_()
    for x in (dk, dv):
        x[: grad_start // tiles.keys.block_k * tiles.keys.block_k].zero_()
    if not len(by_query.query_order_A):
        return dq, dk.zero_(), dv.zero_()
    lse_used_NP, delta_NP = torch.empty_like(lse_NP), torch.empty_like(lse_NP)
    # From the first tile that any pass visits, in the smallest tiles of all.
    block = min(tiles.queries.block_q, tiles.keys.block_q)
    first_tile = first_row // max(tiles.queries.block_q, tiles.keys.block_q) * (max(tiles.queries.block_q, tiles.keys.block_q) // block)
    _row_sums[((padded_queries // block - first_tile) * num_heads,)](
        descriptors(out_TND, block)[0], descriptors(grad_TND, block)[0], lse_NP, grad_lse_NT, lse_used_NP, delta_NP, places, num_heads,
        num_queries, padded_queries, grad_TND.stride(1), first_tile, grad_start,
        HAS_GRAD_LSE=grad_lse_NT is not None, VALUE_WIDTH=value_width, BLOCK=block, num_warps=4,
    )  # fmt: skip
    strides = (q_TND.stride(1), k_SGD.stride(1), v_SGD.stride(1), grad_TND.stride(1))
    shared = {"HEADS_PER_GROUP": num_heads // num_groups, "WIDTH": width, **widths_of(width), "VALUE_WIDTH": value_width}

    def operands(tile: Tile) -> tuple[Any, ...]:
        return (
            *descriptors(q_TND, tile.block_q),
            *descriptors(k_SGD, tile.block_k),
            *descriptors(v_SGD, tile.block_k),
            *descriptors(grad_TND, tile.block_q),
        )

    tile = tiles.keys
    by_row = [TensorDescriptor(x.view(-1), [x.numel()], [1], [tile.block_q]) for x in (lse_used_NP, delta_NP)]
    _backward_keys[(len(by_key.key_order_B) * num_groups,)](
        *operands(tile), *descriptors(dk, tile.block_k), descriptors(dv, tile.block_k)[0], *by_row, places, ends,
        by_key.key_order_B, by_key.key_bounds_B4, num_groups, padded_queries, *strides, scale * LOG2_E, scale, grad_start,
        **shared, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    tile = tiles.queries
    _backward_queries[(len(by_query.query_order_A) * num_heads,)](
        *operands(tile), *descriptors(dq, tile.block_q), lse_used_NP, delta_NP, places, ends,
        by_query.query_order_A, by_query.query_runs_A3, by_query.runs_R2, num_heads, padded_queries, *strides, scale * LOG2_E, scale,
        **shared, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    return dq, dk, dv
