"""Linear log-prob on a GPU: logits live in registers only, tile by tile; the gradients' large products are cuBLAS's.

Shapes: T tokens, H hidden width, V this rank's part of the vocabulary, N splits of it, t and v a block of tokens and of columns.
Deterministic: no atomics, splits and blocks are added in a fixed order.
"""
# Triton's decorator hides the signatures of the kernels from type checkers.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tandem.kernels.backend import has_bulk_copies
from tandem.kernels.logprob import reference

# Tiles of columns that one program goes through before it writes its statistics: 16 bytes a token for 1024 columns.
TILES_PER_SPLIT = 4
# Row tiles that go through the vocabulary together. With 128 rows of width 4096 in bf16 they are 16 MiB, which stay in the L2 cache
# while the weight streams past, once for each group.
GROUP = 16
# Backward: dz of a block of tokens and columns (256 MiB in bf16). The columns bound how often the fp32 gradient of hidden is read and
# written, the tokens how often that of a block of the weight is.
BLOCK_TOKENS, BLOCK_COLUMNS = 16384, 8192
# Gradient in forward: tokens whose whole rows of fp32 logits exist at a time (1.2 GiB at V = 152k). Each block reads and writes the
# fp32 gradient of the whole weight, which fewer tokens would do more often.
ROW_TOKENS = 2048
ROW_OPTIONS = {"COLUMNS": 4096, "num_warps": 8}  # columns of a row that a program holds at a time


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a tile of logits is computed."""

    rows: int
    columns: int
    width: int  # of the hidden dimension at a time
    num_warps: int
    num_stages: int
    bulk: bool  # loads by the bulk copy engine (TMA)
    precision: str  # of fp32 products


def tiles_for(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> Tiles:
    """By dtype, alignment and chip."""
    if hidden_TH.dtype == torch.float32:
        return Tiles(rows=64, columns=64, width=32, num_warps=4, num_stages=2, bulk=False, precision="ieee")
    aligned = hidden_TH.shape[1] % 8 == 0 and hidden_TH.data_ptr() % 16 == 0 and weight_VH.data_ptr() % 16 == 0
    if aligned and has_bulk_copies(hidden_TH):
        return Tiles(rows=128, columns=256, width=64, num_warps=8, num_stages=4, bulk=True, precision="tf32")
    return Tiles(rows=128, columns=128, width=32, num_warps=8, num_stages=3, bulk=False, precision="tf32")


def logprob_forward(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs_T, entropy_T, lse_T). Raises: ValueError for fp64."""
    (num_tokens, width), vocab_size = _shape(hidden_TH), len(weight_VH)
    num_splits = triton.cdiv(vocab_size, tiles_for(hidden_TH, weight_VH).columns * TILES_PER_SPLIT)
    stats_N4T = temperature_T.new_empty((num_splits, 4, num_tokens))
    if num_tokens:
        local_T = reference.local_targets(targets_T, vocab_size, tp_group)
        arguments = (local_T, temperature_T, stats_N4T, num_tokens, vocab_size, width)
        _launch(_stats_kernel, hidden_TH, weight_VH, num_splits, arguments, TILES=TILES_PER_SPLIT)
    return reference.finish(reference.merge(stats_N4T), tp_group)


def logprob_backward(
    grad_logprobs_T: torch.Tensor | None,
    grad_entropy_T: torch.Tensor | None,
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    lse_T: torch.Tensor,
    entropy_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight. dz is written a block at a time, in the operands' dtype; its products are summed in fp32."""
    num_tokens, vocab_size = len(hidden_TH), len(weight_VH)
    local_T = reference.local_targets(targets_T, vocab_size, tp_group)
    g_T = torch.zeros_like(lse_T) if grad_logprobs_T is None else grad_logprobs_T.contiguous()
    g_entropy_T = g_T if grad_entropy_T is None else grad_entropy_T.contiguous()
    grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
    grad_weight_VH = torch.empty_like(weight_VH)
    dz_tv = hidden_TH.new_empty((min(num_tokens, BLOCK_TOKENS), min(vocab_size, BLOCK_COLUMNS)))
    for columns in _slices(vocab_size, BLOCK_COLUMNS):
        weight_vH = weight_VH[columns]
        grad_weight_vH = torch.zeros_like(weight_vH, dtype=torch.float32)
        for rows in _slices(num_tokens, BLOCK_TOKENS):
            hidden_tH, block_tv = hidden_TH[rows], dz_tv[: rows.stop - rows.start, : len(weight_vH)]
            per_token = (local_T[rows] - columns.start, temperature_T[rows], lse_T[rows], entropy_T[rows], g_T[rows], g_entropy_T[rows])
            arguments = (*per_token, block_tv, len(hidden_tH), len(weight_vH), hidden_tH.shape[1], block_tv.stride(0))
            num_tiles = triton.cdiv(len(weight_vH), tiles_for(hidden_tH, weight_vH).columns)
            _launch(_dz_kernel, hidden_tH, weight_vH, num_tiles, arguments, ENTROPY=grad_entropy_T is not None)
            _add_product(grad_hidden_TH[rows], block_tv, weight_vH)
            _add_product(grad_weight_vH, block_tv.T, hidden_tH)
        grad_weight_VH[columns] = grad_weight_vH
    if tp_group is not None:
        dist.all_reduce(grad_hidden_TH, group=tp_group)
    return grad_hidden_TH.to(hidden_TH.dtype), grad_weight_VH


def logprob_with_gradient(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    coefficients_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs_T, entropy_T) and the gradients of sum(coefficients_T * logprobs_T), from logits that are computed once, by cuBLAS."""
    (num_tokens, _), vocab_size = _shape(hidden_TH), len(weight_VH)
    local_T = reference.local_targets(targets_T, vocab_size, tp_group)
    grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
    logprobs_T, entropy_T = torch.empty_like(temperature_T), torch.empty_like(temperature_T)
    coefficients_T = coefficients_T.contiguous()
    for rows in _slices(num_tokens, ROW_TOKENS):
        hidden_tH = hidden_TH[rows]
        logits_tV = _product(hidden_tH, weight_VH.T)
        stats_4t = temperature_T.new_empty((4, len(hidden_tH)))
        _row_stats_kernel[(len(hidden_tH),)](
            logits_tV, local_T[rows], temperature_T[rows], stats_4t, len(hidden_tH), vocab_size, **ROW_OPTIONS
        )
        logprobs_T[rows], entropy_T[rows], lse_t = reference.finish(stats_4t, tp_group)
        dz_tV = torch.empty_like(logits_tV, dtype=hidden_TH.dtype)
        _row_dz_kernel[(len(hidden_tH), triton.cdiv(vocab_size, ROW_OPTIONS["COLUMNS"]))](
            logits_tV, local_T[rows], temperature_T[rows], lse_t, coefficients_T[rows], dz_tV, vocab_size, **ROW_OPTIONS
        )
        _add_product(grad_hidden_TH[rows], dz_tV, weight_VH)
        _add_product(grad_weight_VH, dz_tV.T, hidden_tH)
    if tp_group is not None:
        dist.all_reduce(grad_hidden_TH, group=tp_group)
    return logprobs_T, entropy_T, grad_hidden_TH.to(hidden_TH.dtype), grad_weight_VH.to(weight_VH.dtype)


def _launch(
    kernel: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, num_parts: int, arguments: tuple[Any, ...], **constants: Any
) -> None:
    """One program for each tile of tokens and each of so many parts of the vocabulary."""
    tiles = tiles_for(hidden_TH, weight_VH)
    grid = (triton.cdiv(len(hidden_TH), tiles.rows) * num_parts,)
    kernel[grid](*_operands(hidden_TH, weight_VH, tiles), *arguments, **constants, **_options(tiles))


def _shape(hidden_TH: torch.Tensor) -> torch.Size:
    if hidden_TH.dtype == torch.float64:
        raise ValueError("hidden is torch.float64, which the Triton kernel does not compute; convert it, or choose the reference")
    return hidden_TH.shape


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _operands(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, tiles: Tiles) -> tuple[Any, Any]:
    if not tiles.bulk:
        return hidden_TH, weight_VH
    return (
        TensorDescriptor.from_tensor(hidden_TH, [tiles.rows, tiles.width]),
        TensorDescriptor.from_tensor(weight_VH, [tiles.columns, tiles.width]),
    )


def _options(tiles: Tiles) -> dict[str, Any]:
    sizes = {"GROUP": GROUP, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "WIDTH": tiles.width}
    return {**sizes, "BULK": tiles.bulk, "PRECISION": tiles.precision, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, summed in fp32."""
    if total.is_cuda and left.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


@triton.jit
def _tile_of(program, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: rows fastest, within a group of GROUP row tiles."""
    group = program // (GROUP * num_column_tiles)
    within = program % (GROUP * num_column_tiles)
    first = group * GROUP
    group_rows = min(num_row_tiles - first, GROUP)
    return first + within % group_rows, within // group_rows


@triton.jit
def _logits_tile(
    hidden, weight, first_row, first_column, num_tokens, vocab_size, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] fp32 of hidden @ weight.T; 0 beyond the edges."""
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    if BULK:
        for k in range(0, width, WIDTH):
            left = hidden.load([first_row, k])
            right = weight.load([first_column, k])
            logits = tl.dot(left, right.T, logits)
    else:
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        depth = tl.arange(0, WIDTH)
        hidden += rows.to(tl.int64)[:, None] * width + depth[None, :]
        weight += columns.to(tl.int64)[None, :] * width + depth[:, None]
        for k in range(0, width, WIDTH):
            left = tl.load(hidden + k, mask=(rows[:, None] < num_tokens) & (depth[None, :] < width - k), other=0.0)
            right = tl.load(weight + k, mask=(columns[None, :] < vocab_size) & (depth[:, None] < width - k), other=0.0)
            logits = tl.dot(left, right, logits, input_precision=PRECISION)
    return logits


@triton.jit
def _include(logits, columns, target, maximum, total, weighted, at_target):
    """Statistics with a tile of scaled logits included; -inf is no logit. The maximum starts at -inf: no logit is too low."""
    at_target = tl.maximum(at_target, tl.max(tl.where(columns[None, :] == target[:, None], logits, float("-inf")), 1))
    higher = tl.maximum(maximum, tl.max(logits, 1))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum - higher)
    decay = tl.where(maximum == float("-inf"), 0.0, tl.exp(shift))
    below = logits - higher[:, None]
    p = tl.exp(below)
    weighted = decay * (weighted + shift * total) + tl.sum(tl.where(p > 0.0, p * below, 0.0), 1)  # 0 * -inf is no number
    return higher, decay * total + tl.sum(p, 1), weighted, at_target


@triton.jit
def _stats_kernel(
    hidden, weight, targets, temperature, stats, num_tokens, vocab_size, width,
    TILES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """stats [N, 4, T]: what `reference.merge` takes, of a tile of tokens over one split of the vocabulary."""
    num_splits = tl.cdiv(vocab_size, COLUMNS * TILES)
    row_tile, split = _tile_of(tl.program_id(0), tl.cdiv(num_tokens, ROWS), num_splits, GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < num_tokens, other=-1).to(tl.int32)
    scale = 1.0 / tl.load(temperature + rows, mask=rows < num_tokens, other=1.0)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    at_target = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    start = split * COLUMNS * TILES
    for first_column in range(start, min(start + COLUMNS * TILES, vocab_size), COLUMNS):
        logits = _logits_tile(
            hidden, weight, row_tile * ROWS, first_column, num_tokens, vocab_size, width, ROWS, COLUMNS, WIDTH, BULK, PRECISION
        )
        logits *= scale[:, None]
        columns = first_column + tl.arange(0, COLUMNS)
        if first_column + COLUMNS > vocab_size:
            logits = tl.where(columns[None, :] < vocab_size, logits, float("-inf"))
        maximum, total, weighted, at_target = _include(logits, columns, target, maximum, total, weighted, at_target)
    stats += split.to(tl.int64) * 4 * num_tokens + rows
    for_rows = rows < num_tokens
    tl.store(stats, maximum, mask=for_rows)
    tl.store(stats + num_tokens, total, mask=for_rows)
    tl.store(stats + num_tokens * 2, weighted, mask=for_rows)
    tl.store(stats + num_tokens * 3, at_target, mask=for_rows)


@triton.jit
def _dz_kernel(
    hidden, weight, targets, temperature, lse, entropy, grad_logprobs, grad_entropy, dz, num_tokens, vocab_size, width, dz_stride,
    ENTROPY: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dz = (g_logprob (1[target] - p) - g_entropy p (log p + entropy)) / temperature."""
    program = tl.program_id(0)
    row_tile, column_tile = _tile_of(program, tl.cdiv(num_tokens, ROWS), tl.cdiv(vocab_size, COLUMNS), GROUP)
    first_column = column_tile * COLUMNS
    logits = _logits_tile(
        hidden, weight, row_tile * ROWS, first_column, num_tokens, vocab_size, width, ROWS, COLUMNS, WIDTH, BULK, PRECISION
    )
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    for_rows = rows < num_tokens
    target = tl.load(targets + rows, mask=for_rows, other=-1).to(tl.int32)
    scale = 1.0 / tl.load(temperature + rows, mask=for_rows, other=1.0)
    g = tl.load(grad_logprobs + rows, mask=for_rows, other=0.0)
    logp = logits * scale[:, None] - tl.load(lse + rows, mask=for_rows, other=0.0)[:, None]
    factor = g[:, None]
    if ENTROPY:
        row_entropy = tl.load(entropy + rows, mask=for_rows, other=0.0)
        g_entropy = tl.load(grad_entropy + rows, mask=for_rows, other=0.0)
        factor = g[:, None] + g_entropy[:, None] * (logp + row_entropy[:, None])
    value = tl.where(columns[None, :] == target[:, None], g[:, None], 0.0) - tl.exp(logp) * factor
    value *= scale[:, None]
    offsets = rows.to(tl.int64)[:, None] * dz_stride + columns[None, :]
    tl.store(dz + offsets, value.to(dz.dtype.element_ty), mask=for_rows[:, None] & (columns[None, :] < vocab_size))


@triton.jit
def _row_stats_kernel(logits, targets, temperature, stats, num_tokens, vocab_size, COLUMNS: tl.constexpr):
    """stats [4, t] of one row of stored logits."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab_size
    target = tl.load(targets + row + tl.arange(0, 1)).to(tl.int32)
    scale = 1.0 / tl.load(temperature + row)
    maximum = tl.full([1], float("-inf"), tl.float32)
    at_target = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1], tl.float32)
    for first_column in range(0, vocab_size, COLUMNS):
        columns = first_column + tl.arange(0, COLUMNS)
        z = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf")) * scale
        maximum, total, weighted, at_target = _include(z[None, :], columns, target, maximum, total, weighted, at_target)
    stats += row + tl.arange(0, 1)
    tl.store(stats, maximum)
    tl.store(stats + num_tokens, total)
    tl.store(stats + num_tokens * 2, weighted)
    tl.store(stats + num_tokens * 3, at_target)


@triton.jit
def _row_dz_kernel(logits, targets, temperature, lse, coefficients, dz, vocab_size, COLUMNS: tl.constexpr):
    """dz = coefficient (1[target] - p) / temperature of a part of one row of stored logits."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < vocab_size
    scale = 1.0 / tl.load(temperature + row)
    z = tl.load(logits + row.to(tl.int64) * vocab_size + columns, mask=inside, other=0.0) * scale
    is_target = (columns == tl.load(targets + row).to(tl.int32)).to(tl.float32)
    value = tl.load(coefficients + row) * scale * (is_target - tl.exp(z - tl.load(lse + row)))
    tl.store(dz + row.to(tl.int64) * vocab_size + columns, value.to(dz.dtype.element_ty), mask=inside)
