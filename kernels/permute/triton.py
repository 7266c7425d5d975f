"""Grouping of rows by expert in Triton. Each output is written once by one program: there is nothing to add up atomically.

Shapes as in the package; B blocks of tokens.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl

CELLS_PER_TILE = 4096  # of the map; a tile holds whole tokens
TILE = 2048  # elements of a row that one program copies


@triton.jit
def _count_kernel(token_map, counts, T, E, num_blocks, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    token, expert = block * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS)
    inside = (token[:, None] < T) & (expert[None, :] < E)
    sent = tl.load(token_map + token.to(tl.int64)[:, None] * E + expert[None, :], mask=inside, other=0).to(tl.int32)
    tl.store(counts + expert * num_blocks + block, tl.sum(sent, 0), mask=expert < E)


@triton.jit
def _place_kernel(token_map, before, source, place, T, E, M, num_blocks, K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    token, expert = block * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS)
    inside = (token[:, None] < T) & (expert[None, :] < E)
    sent = tl.load(token_map + token.to(tl.int64)[:, None] * E + expert[None, :], mask=inside, other=0).to(tl.int32)
    first = tl.load(before + expert * num_blocks + block, mask=expert < E, other=0)
    row = first[None, :] + tl.cumsum(sent, 0) - 1
    slot = tl.cumsum(sent, 1) - 1
    written = (sent > 0) & (slot < K) & (row < M)
    tl.store(source + row, token[:, None] + tl.zeros_like(row), mask=written)
    tl.store(place + token.to(tl.int64)[:, None] * K + slot, row, mask=written)


@triton.jit
def _gather_kernel(rows, source, out, H, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < H
    at = tl.load(source + row).to(tl.int64)
    tl.store(out + row * H + column, tl.load(rows + at * H + column, mask=inside), mask=inside)


@triton.jit
def _gather_sum_kernel(rows, place, weights, out, H, K: tl.constexpr, WEIGHTED: tl.constexpr, TILE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.float32)
    for k in range(K):
        at = tl.load(place + token * K + k).to(tl.int64)
        values = tl.load(rows + at * H + column, mask=(column < H) & (at >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights + at, mask=at >= 0, other=0.0)
        total += values
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


@triton.jit
def _unpermute_backward_kernel(grad, y, weights, source, grad_y, grad_weights, H, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(source + row).to(tl.int64)
    weight = tl.load(weights + row)
    dot = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, H, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < H
        above = tl.load(grad + at * H + column, mask=inside, other=0.0).to(tl.float32)
        dot += above * tl.load(y + row * H + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_y + row * H + column, (above * weight).to(grad_y.dtype.element_ty), mask=inside)
    tl.store(grad_weights + row, tl.sum(dot, 0))


def _tile(width: int) -> int:
    return min(TILE, max(32, 1 << (width - 1).bit_length()))


def route(map_TE: torch.Tensor, num_rows: int, max_per_token: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(source_M, place_TK, offsets_E1)."""
    num_tokens, num_experts = map_TE.shape
    device = map_TE.device
    source_M = torch.zeros(num_rows, dtype=torch.int32, device=device)
    place_TK = torch.full((num_tokens, max_per_token), -1, dtype=torch.int32, device=device)
    if not num_tokens or not num_experts:
        return source_M, place_TK, torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    bytes_TE = map_TE.contiguous().view(torch.uint8)
    experts = triton.next_power_of_2(num_experts)
    rows = max(1, CELLS_PER_TILE // experts)
    num_blocks = triton.cdiv(num_tokens, rows)
    counts_EB = torch.empty((num_experts, num_blocks), dtype=torch.int32, device=device)
    _count_kernel[(num_blocks,)](bytes_TE, counts_EB, num_tokens, num_experts, num_blocks, ROWS=rows, EXPERTS=experts)
    ends = counts_EB.view(-1).cumsum(0, dtype=torch.int32)
    before_EB = ends.view_as(counts_EB) - counts_EB
    _place_kernel[(num_blocks,)](
        bytes_TE, before_EB, source_M, place_TK, num_tokens, num_experts, num_rows, num_blocks, K=max_per_token, ROWS=rows, EXPERTS=experts
    )
    return source_M, place_TK, torch.cat([before_EB[:, 0], ends[-1:]])


def gather(rows_GH: torch.Tensor, source_M: torch.Tensor) -> torch.Tensor:
    """[M, H]."""
    width = rows_GH.shape[1]
    out_MH = rows_GH.new_empty((len(source_M), width))
    tile = _tile(width)
    if out_MH.numel():
        _gather_kernel[(len(source_M), triton.cdiv(width, tile))](rows_GH.contiguous(), source_M, out_MH, width, TILE=tile)
    return out_MH


def gather_sum(rows_MH: torch.Tensor, place_TK: torch.Tensor, weights_M: torch.Tensor | None) -> torch.Tensor:
    """[T, H]."""
    num_tokens, most = place_TK.shape
    width, tile = rows_MH.shape[1], _tile(rows_MH.shape[1])
    out_TH = rows_MH.new_empty((num_tokens, width))
    if out_TH.numel():
        weights = rows_MH if weights_M is None else weights_M.contiguous()  # not read without weights
        _gather_sum_kernel[(num_tokens, triton.cdiv(width, tile))](
            rows_MH.contiguous(), place_TK.contiguous(), weights, out_TH, width, K=most, WEIGHTED=weights_M is not None, TILE=tile
        )
    return out_TH


def unpermute_gradients(
    grad_TH: torch.Tensor, y_MH: torch.Tensor, weights_M: torch.Tensor, source_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows and of their weights."""
    grad_MH, grad_weights_M = torch.empty_like(y_MH, memory_format=torch.contiguous_format), torch.zeros_like(weights_M)
    if grad_MH.numel():
        _unpermute_backward_kernel[(len(y_MH),)](
            grad_TH.contiguous(),
            y_MH.contiguous(),
            weights_M.contiguous(),
            source_M,
            grad_MH,
            grad_weights_M,
            y_MH.shape[1],
            TILE=_tile(y_MH.shape[1]),
        )
    return grad_MH, grad_weights_M
