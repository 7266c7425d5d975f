"""Forward pass of Qwen3 and Qwen3-MoE for generation on a CPU, over a key/value cache with one row per response.

Letters of tensor names: B rows that decode, T packed tokens, H query heads, G key/value heads, D head dim, V vocabulary,
S padded length, L cache length.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from tandem.engine.rollout.architecture import Architecture
from tandem.engine.rollout.weights import LayerWeights, ModelWeights

# What a row gets must not depend on its company, to the last bit: a phase that is generated again after a fault continues with the same
# tokens. The libraries' products round a row alike in any number of rows that is a multiple of this (measured with 1 to 8 threads on an
# AMD CPU), and otherwise not: for a few rows they take paths of their own.
ROW_MULTIPLE = 16
# Rows whose attention is computed together, over the longest of them. Measured on toy shapes: below 32 the calls' overhead
# shows, above it the padding.
ATTENTION_ROWS = 32
# oneDNN's float32 product runs at 2.2 times the speed of MKL's on an AMD CPU (220 against 100 GFLOP/s, one core of Zen 5), but
# spends a millisecond on every shape that it has not seen and remembers 1024.
MAX_ONEDNN_ROWS = 1024
# MKL adds up float32 products in blocks of at most this many, whose size depends on the length of the sum, and oneDNN in one. Sums up to
# it are rounded alike by both, so that log-probs agree with a trainer on MKL. Longer sums over keys are cut here, so that the masked keys
# behind a row's own, which add zeros, change nothing; bfloat16 sums are rounded once, at their end, and need no cuts.
MKL_BLOCK = 192
# Below this many multiplications torch multiplies small matrices itself, and rounds in another way.
MIN_MULTIPLICATIONS = 400
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
# Padded prompt tokens in one prefill.
PREFILL_TOKENS = 8192


def key_multiple(architecture: Architecture) -> int:
    """Attention covers a multiple of this many keys, most of them masked for a short sequence."""
    multiple = ROW_MULTIPLE
    while multiple * architecture.head_dim * (architecture.num_heads // architecture.num_kv_heads) < MIN_MULTIPLICATIONS:
        multiple *= 2
    return multiple


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class KVCache:
    """Keys and values of up to `num_rows` sequences of up to `length` tokens.

    Untouched memory stays unmapped (the kernel hands out zero pages), so what is paid for is what was written.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype, num_rows: int, length: int) -> None:
        a = architecture
        # Two threads would share the attention of a single matrix, and round it in another way than one of several.
        num_rows, length = _round_up(num_rows, 2), _round_up(length, key_multiple(a))
        shape = (a.num_layers, num_rows, a.num_kv_heads, length, a.head_dim)
        # Zeros, not empty: a masked key weighs 0, and 0 * NaN would spoil the sum.
        self.k = torch.zeros(shape, dtype=dtype)
        self.v = torch.zeros(shape, dtype=dtype)
        self.num_kv_heads = a.num_kv_heads
        self.num_rows = num_rows
        self.length = length

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of one row to another."""
        for cache in (self.k, self.v):
            cache[:, target, :, :num_tokens] = cache[:, source, :, :num_tokens]

    def permute(self, order: torch.Tensor, num_tokens: int) -> None:
        """Row i becomes what row order[i] was, for i < len(order); tokens past `num_tokens` are not moved."""
        for cache in (self.k, self.v):
            for layer in cache:
                layer[: len(order), :, :num_tokens] = layer[order, :, :num_tokens]

    def flat_index(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Indices into [num_rows * G * L, D] of (row, every kv head, position): [N] → [N * G]."""
        heads = torch.arange(self.num_kv_heads)
        return ((rows[:, None] * self.num_kv_heads + heads) * self.length + positions[:, None]).flatten()


class InferenceModel:
    """The network's arithmetic; the weights are handed to every call because they are swapped between calls."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, context_length: int) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self._key_multiple = key_multiple(architecture)
        half = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
        angles = torch.arange(context_length, dtype=torch.float32)[:, None] * (1.0 / architecture.rope_theta**half)
        self._cos = angles.cos().to(dtype)  # [context, D/2]
        self._sin = angles.sin().to(dtype)

    def decode(self, weights: ModelWeights, cache: KVCache, tokens_B: torch.Tensor, positions_B: np.ndarray) -> torch.Tensor:
        """Append one token to each of the rows 0 … B-1.

        Args:
            tokens_B: [B] int64. positions_B: [B] int64, how many tokens the row holds already.
        Returns: logits of the next token, [B, V] float32.
        """
        a = self.architecture
        num_rows = len(tokens_B)
        num_padded = _round_up(num_rows, ROW_MULTIPLE)
        positions = torch.from_numpy(positions_B)
        written = cache.flat_index(torch.arange(num_rows), positions)
        padding = (0, num_padded - num_rows)
        padded_positions = F.pad(positions, padding)
        cos, sin = self._cos[padded_positions][:, None], self._sin[padded_positions][:, None]
        chunks: list[tuple[int, int, int, torch.Tensor | None]] = []
        for start in range(0, num_rows, ATTENTION_ROWS):
            stop = min(start + ATTENTION_ROWS, _round_up(num_rows, 2))
            length = _round_up(int(positions_B[start:stop].max()) + 1, self._key_multiple)
            chunks.append((start, stop, length, _length_bias(padded_positions[start:stop], length)))
        x = F.embedding(F.pad(tokens_B, padding), weights.embedding)
        attended = torch.zeros(num_padded * a.num_kv_heads, a.num_heads // a.num_kv_heads, a.head_dim, dtype=self.dtype)
        for index, layer in enumerate(weights.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            pairs = ((cache.k, k[: len(written)]), (cache.v, v[: len(written)]))
            k_rows, v_rows = (c[index].view(-1, a.head_dim).index_copy_(0, written, new) for c, new in pairs)
            k_rows, v_rows = (rows.view(-1, cache.length, a.head_dim) for rows in (k_rows, v_rows))
            q = q.view_as(attended)
            for start, stop, length, bias in chunks:
                heads = slice(start * a.num_kv_heads, stop * a.num_kv_heads)
                _attend(q[heads], k_rows[heads, :length], v_rows[heads, :length], bias, a.num_kv_heads, attended[heads])
            x = x + _linear(attended.view(num_padded, -1), layer.o)
            x = x + self._feed_forward(layer, _rms_norm(x, layer.post_norm, a.rms_norm_eps))
        x = _rms_norm(x, weights.norm, a.rms_norm_eps)
        return _linear(x.float(), weights.head_fp32)[:num_rows]

    def prefill(self, weights: ModelWeights, cache: KVCache, sequences: Sequence[np.ndarray], rows: Sequence[int]) -> None:
        """Write keys and values of whole sequences (each [n] int64, n >= 1) into empty rows of the cache."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        while order:
            shortest = len(sequences[order[0]])
            taken = 1
            while taken < len(order):
                length = len(sequences[order[taken]])
                if length > 1.25 * shortest + 16 or length * (taken + 1) > PREFILL_TOKENS:
                    break
                taken += 1
            now, order = order[:taken], order[taken:]
            self._prefill_similar(weights, cache, [sequences[i] for i in now], [rows[i] for i in now])

    def _prefill_similar(self, weights: ModelWeights, cache: KVCache, sequences: list[np.ndarray], rows: list[int]) -> None:
        """Tokens are packed for the matrix products and padded (at the end) for the causal attention."""
        a = self.architecture
        lengths = np.array([len(sequence) for sequence in sequences])
        num_sequences, longest = len(sequences), _round_up(int(lengths.max()), self._key_multiple)
        num_tokens = int(lengths.sum())
        padding = (0, _round_up(num_tokens, ROW_MULTIPLE) - num_tokens)
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
        sequence = torch.from_numpy(np.repeat(np.arange(num_sequences), lengths))
        padded = sequence * longest + positions  # where a packed token lies in [sequences * S]
        written = cache.flat_index(torch.tensor(rows)[sequence], positions)
        rotations = F.pad(positions, padding)
        cos, sin = self._cos[rotations][:, None], self._sin[rotations][:, None]
        x = F.embedding(F.pad(torch.from_numpy(np.concatenate(sequences)), padding), weights.embedding)

        def pad(packed: torch.Tensor, num_heads: int) -> torch.Tensor:
            out = packed.new_zeros(num_sequences * longest, num_heads, a.head_dim)
            out[padded] = packed.view(-1, num_heads, a.head_dim)[:num_tokens]
            return out.view(num_sequences, longest, num_heads, a.head_dim).transpose(1, 2)

        for index, layer in enumerate(weights.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            cache.k[index].view(-1, a.head_dim).index_copy_(0, written, k[: len(written)])
            cache.v[index].view(-1, a.head_dim).index_copy_(0, written, v[: len(written)])
            if index == a.num_layers - 1:
                return  # nobody asks for logits: the last token of a prompt is decoded
            heads = (pad(q, a.num_heads), pad(k, a.num_kv_heads), pad(v, a.num_kv_heads))
            out = x.new_zeros(len(x), a.num_heads * a.head_dim)
            out[:num_tokens] = _attend_causally(*heads).transpose(1, 2).reshape(num_sequences * longest, -1)[padded]
            x = x + _linear(out, layer.o)
            x = x + self._feed_forward(layer, _rms_norm(x, layer.post_norm, a.rms_norm_eps))

    def _qkv(
        self, layer: LayerWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T * H, D], k and v [T * G, D] of hidden states [T, hidden]; q and k are normalised and rotated."""
        a = self.architecture
        fused = _linear(_rms_norm(x, layer.input_norm, a.rms_norm_eps), layer.qkv).view(len(x), -1, a.head_dim)
        qk, v = fused.split([a.num_heads + a.num_kv_heads, a.num_kv_heads], dim=1)
        left, right = _rms_norm(qk, layer.qk_norm, a.rms_norm_eps).chunk(2, dim=-1)
        rotated = torch.empty_like(qk, memory_format=torch.contiguous_format)
        half = a.head_dim // 2
        torch.mul(left, cos, out=rotated[..., :half]).addcmul_(right, sin, value=-1)
        torch.mul(right, cos, out=rotated[..., half:]).addcmul_(left, sin)
        q, k = rotated.split([a.num_heads, a.num_kv_heads], dim=1)
        return q.reshape(-1, a.head_dim), k.reshape(-1, a.head_dim), v.reshape(-1, a.head_dim)

    def _feed_forward(self, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        if layer.router is None:
            return _swiglu(x, layer.gate_up, layer.down)
        a = self.architecture
        probabilities = F.softmax(_linear(x, layer.router), dim=-1, dtype=torch.float32)
        weight, expert = probabilities.topk(a.num_experts_per_tok, dim=-1)
        if a.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        by_expert = expert.flatten().argsort(stable=True)
        sorted_x = x[by_expert // a.num_experts_per_tok]
        sorted_out = torch.empty_like(sorted_x)
        start = 0
        for index, count in enumerate(expert.flatten().bincount(minlength=a.num_experts).tolist()):
            if count:
                part = slice(start, start + count)
                rows = F.pad(sorted_x[part], (0, 0, 0, _round_up(count, ROW_MULTIPLE) - count))
                sorted_out[part] = _swiglu(rows, layer.gate_up[index], layer.down[index])[:count]
            start += count
        out = torch.empty_like(sorted_out)
        out[by_expert] = sorted_out
        return (out.view(len(x), a.num_experts_per_tok, -1) * weight.to(x.dtype)[..., None]).sum(1)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dim, in float32, rounded to x's type before the weight as the Hugging Face model does."""
    wide = x.float()
    scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale[..., None]).to(x.dtype).mul_(weight)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T for x [T, in], weight [out, in]; T a multiple of ROW_MULTIPLE."""
    assert len(x) % ROW_MULTIPLE == 0, len(x)
    if not _HAS_ONEDNN or x.shape[1] > MKL_BLOCK:
        return F.linear(x, weight)
    parts = [torch.ops.mkldnn._linear_pointwise(part, weight, None, "none", [], "") for part in x.split(MAX_ONEDNN_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = _linear(x, gate_up).chunk(2, dim=-1)
    return _linear(F.silu(gate).mul_(up), down)


def _attend_causally(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of whole sequences: q [B, H, S, D], k and v [B, G, S, D], S a multiple of ROW_MULTIPLE. Queries in blocks of MKL_BLOCK."""
    num_sequences, _, length, width = k.shape
    scale = width**-0.5
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    out = torch.empty_like(q)
    hidden = torch.ones(MKL_BLOCK, MKL_BLOCK, dtype=torch.bool).triu(1)
    for start in range(0, length, MKL_BLOCK):
        stop = min(start + MKL_BLOCK, length)
        rows = q[:, :, start:stop].reshape(len(k), -1, width)  # [B * G, H/G * queries, D]
        scores = torch.bmm(rows, k[:, :stop].transpose(1, 2)).float().mul_(scale)
        diagonal = scores.view(len(k), -1, stop - start, stop)[..., start:]
        diagonal.masked_fill_(hidden[: stop - start, : stop - start], -torch.inf)
        weighted = _weighted_sum(scores.softmax(-1).to(v.dtype), v[:, :stop], torch.empty_like(rows))
        out[:, :, start:stop] = weighted.view(num_sequences, q.shape[1], stop - start, width)
    return out


def _length_bias(positions: torch.Tensor, length: int) -> torch.Tensor | None:
    """[rows, 1, length] float32: -inf on keys past a row's own position; None when all rows see all of them."""
    if int(positions.min()) + 1 == length:
        return None
    hidden = torch.arange(length) > positions[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, num_kv_heads: int, out: torch.Tensor) -> None:
    """Attention of one query position: q [N, H/G, D] on k, v [N, length, D], N = rows * G, written to out [N, H/G, D].

    Plain batched products: with one query per row they run at 1.5 to 2 times the speed of torch's fused attention on a CPU.
    """
    scale = q.shape[-1] ** -0.5
    scores = torch.bmm(q, k.transpose(1, 2)).float()
    if bias is None:
        scores.mul_(scale)
    else:
        rows = scores.view(-1, num_kv_heads, *scores.shape[1:])
        torch.add(bias[:, None], rows, alpha=scale, out=rows)
    _weighted_sum(scores.softmax(-1).to(v.dtype), v, out)


def _weighted_sum(weights: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """weights [N, R, keys] @ v [N, keys, D], written to out [N, R, D]."""
    block = MKL_BLOCK if v.dtype == torch.float32 else v.shape[1]
    torch.bmm(weights[..., :block], v[:, :block], out=out)
    for start in range(block, v.shape[1], block):
        torch.baddbmm(out, weights[..., start : start + block], v[:, start : start + block], out=out)
    return out
