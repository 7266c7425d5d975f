"""Attention over the key/value cache, of one query position per row and of whole sequences.

What a query gets depends on its own keys alone, not on how many masked keys lie behind them: see MKL_BLOCK.
Letters of tensor names: B sequences, H query heads, G key/value heads, D width of a key, E width of a value, S padded length.
"""

import torch
import torch.nn.functional as F

from tandem.engine.rollout.products import MKL_BLOCK, ROW_MULTIPLE

# Below this many multiplications torch multiplies small matrices itself, and rounds in another way.
MIN_MULTIPLICATIONS = 400
# MKL multiplies fewer rows than this by a matrix in a way of its own, in which the trainer's many rows are not rounded.
MIN_QUERIES = 4


def key_multiple(num_queries: int, width: int) -> int:
    """Of how many keys attention covers a multiple, most of them masked for a short sequence.

    Args:
        num_queries: query heads that share a key head. width: of a key or of a value, whichever is narrower.
    """
    multiple = ROW_MULTIPLE
    while multiple * width * num_queries < MIN_MULTIPLICATIONS:
        multiple *= 2
    return multiple


def length_bias(positions: torch.Tensor, length: int) -> torch.Tensor | None:
    """[rows, 1, length] float32: -inf on keys past a row's own position; None when all rows see all of them."""
    if int(positions.min()) + 1 == length:
        return None
    hidden = torch.arange(length) > positions[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, num_kv_heads: int, scale: float, out: torch.Tensor
) -> None:
    """Attention of one query position: q [N, H/G, D] on k [N, length, D], v [N, length, E], N = rows * G, written to out [N, H/G, E].

    Plain batched products: with one query per row they run at 1.5 to 2 times the speed of torch's fused attention on a CPU.
    """
    num_queries = q.shape[1]
    if num_queries < MIN_QUERIES and q.dtype == torch.float32:
        padded = F.pad(q, (0, 0, 0, MIN_QUERIES - num_queries))
        attended = out.new_empty(len(out), MIN_QUERIES, out.shape[2])
        attend(padded, k, v, bias, num_kv_heads, scale, attended)
        out.copy_(attended[:, :num_queries])
        return
    scores = torch.bmm(q, k.transpose(1, 2)).float()
    if bias is None:
        scores.mul_(scale)
    else:
        rows = scores.view(-1, num_kv_heads, *scores.shape[1:])
        torch.add(bias[:, None], rows, alpha=scale, out=rows)
    _weighted_sum(scores.softmax(-1).to(v.dtype), v, out)


def attend_causally(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of whole sequences: q [B, H, S, D], k [B, G, S, D] and v [B, G, S, E] to [B, H, S, E]. Queries in blocks of MKL_BLOCK."""
    num_sequences, num_heads, length, _ = q.shape
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    out = q.new_empty(num_sequences, num_heads, length, v.shape[-1])
    hidden = torch.ones(MKL_BLOCK, MKL_BLOCK, dtype=torch.bool).triu(1)
    for start in range(0, length, MKL_BLOCK):
        stop = min(start + MKL_BLOCK, length)
        rows = q[:, :, start:stop].reshape(len(k), -1, q.shape[-1])  # [B * G, H/G * queries, D]
        scores = torch.bmm(rows, k[:, :stop].transpose(1, 2)).float().mul_(scale)
        diagonal = scores.view(len(k), -1, stop - start, stop)[..., start:]
        diagonal.masked_fill_(hidden[: stop - start, : stop - start], -torch.inf)
        weighted = _weighted_sum(scores.softmax(-1).to(v.dtype), v[:, :stop], q.new_empty(*rows.shape[:2], v.shape[-1]))
        out[:, :, start:stop] = weighted.view(num_sequences, num_heads, stop - start, -1)
    return out


def _weighted_sum(weights: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """weights [N, R, keys] @ v [N, keys, E], written to out [N, R, E].

    MKL would cut a long float32 sum into blocks whose size depends on the number of keys, so it is cut here, and the masked keys behind a
    row's own add zeros. bfloat16 sums are rounded once, at their end, and need no cuts.
    """
    block = MKL_BLOCK if v.dtype == torch.float32 else v.shape[1]
    torch.bmm(weights[..., :block], v[:, :block], out=out)
    for start in range(block, v.shape[1], block):
        torch.baddbmm(out, weights[..., start : start + block], v[:, start : start + block], out=out)
    return out
