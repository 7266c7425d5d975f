"""Forward pass for generation on a CPU, over a key/value cache with one row per response.

Letters of tensor names: B rows that decode, T packed tokens, H query heads, G key/value heads, D width of a key, E width of a value,
V vocabulary, S padded length, L cache length, X sparse layers, K experts per token.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from tandem.engine.architecture import Architecture
from tandem.engine.rollout.attention import attend, attend_causally, length_bias
from tandem.engine.rollout.experts import feed_forward
from tandem.engine.rollout.kv_cache import HeadShape, KVCache
from tandem.engine.rollout.products import ROW_MULTIPLE, linear, rms_norm, round_up
from tandem.engine.rollout.projections import Rotation, output, project
from tandem.engine.rollout.weights import ModelWeights

# Rows whose attention is computed together, over the longest of them. Measured on toy shapes: below 32 the calls' overhead
# shows, above it the padding.
ATTENTION_ROWS = 32
# Padded prompt tokens in one prefill.
PREFILL_TOKENS = 8192


class InferenceModel:
    """The network's arithmetic; the weights are handed to every call because they are swapped between calls."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, context_length: int) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self._shape = HeadShape.of(architecture)
        self._rotation = Rotation(architecture, dtype, context_length)

    def decode(
        self, weights: ModelWeights, cache: KVCache, tokens_B: torch.Tensor, positions_B: np.ndarray
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Append one token to each of the rows 0 … B-1.

        Args:
            tokens_B: [B] int64. positions_B: [B] int64, how many tokens the row holds already.
        Returns: logits of the next token, [B, V] float32, and of each sparse layer the experts that each row chose, [B, K] int64.
        """
        a, shape = self.architecture, self._shape
        num_rows = len(tokens_B)
        padding = (0, round_up(num_rows, ROW_MULTIPLE) - num_rows)
        positions = F.pad(torch.from_numpy(positions_B), padding)
        written = cache.flat_index(torch.arange(num_rows), positions[:num_rows])
        rotate = self._rotation.at(positions)
        chunks: list[tuple[int, int, int, torch.Tensor | None]] = []
        for start in range(0, num_rows, ATTENTION_ROWS):
            stop = min(start + ATTENTION_ROWS, round_up(num_rows, 2))
            length = round_up(int(positions_B[start:stop].max()) + 1, shape.key_multiple)
            chunks.append((start, stop, length, length_bias(positions[start:stop], length)))
        x = F.embedding(F.pad(tokens_B, padding), weights.embedding)
        chosen: list[torch.Tensor] = []
        attended = torch.zeros(len(x) * shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.value_dim, dtype=self.dtype)
        for index, layer in enumerate(weights.layers):
            q, k, v = project(a, layer, rms_norm(x, layer.input_norm, a.rms_norm_eps), rotate)
            cache.write(index, written, k[: len(written)], None if v is None else v[: len(written)])
            keys, values = cache.keys_values(index)
            q = q.view(*attended.shape[:2], shape.key_dim)
            for start, stop, length, bias in chunks:
                heads = slice(start * shape.num_kv_heads, stop * shape.num_kv_heads)
                attend(q[heads], keys[heads, :length], values[heads, :length], bias, shape.num_kv_heads, a.softmax_scale, attended[heads])
            x = x + output(a, layer, attended.view(len(x), shape.num_heads, shape.value_dim))
            out, experts = feed_forward(a.experts, layer, rms_norm(x, layer.post_norm, a.rms_norm_eps))
            x = x + out
            if experts is not None:
                chosen.append(experts[:num_rows])
        x = rms_norm(x, weights.norm, a.rms_norm_eps)
        return linear(x.float(), weights.head_fp32)[:num_rows], chosen

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
        a, shape = self.architecture, self._shape
        lengths = np.array([len(sequence) for sequence in sequences])
        num_sequences, longest = len(sequences), round_up(int(lengths.max()), shape.key_multiple)
        num_tokens = int(lengths.sum())
        padding = (0, round_up(num_tokens, ROW_MULTIPLE) - num_tokens)
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
        sequence = torch.from_numpy(np.repeat(np.arange(num_sequences), lengths))
        padded = sequence * longest + positions  # where a packed token lies in [sequences * S]
        written = cache.flat_index(torch.tensor(rows)[sequence], positions)
        rotate = self._rotation.at(F.pad(positions, padding))
        x = F.embedding(F.pad(torch.from_numpy(np.concatenate(sequences)), padding), weights.embedding)

        def pad(packed: torch.Tensor, num_heads: int) -> torch.Tensor:
            out = packed.new_zeros(num_sequences * longest, num_heads, packed.shape[-1])
            out[padded] = packed.view(len(x), num_heads, -1)[:num_tokens]
            return out.view(num_sequences, longest, num_heads, -1).transpose(1, 2)

        for index, layer in enumerate(weights.layers):
            q, k, v = project(a, layer, rms_norm(x, layer.input_norm, a.rms_norm_eps), rotate)
            cache.write(index, written, k[: len(written)], None if v is None else v[: len(written)])
            if index == a.num_layers - 1:
                return  # nobody asks for logits: the last token of a prompt is decoded
            v = k[:, : shape.value_dim] if v is None else v
            heads = (pad(q, shape.num_heads), pad(k, shape.num_kv_heads), pad(v, shape.num_kv_heads))
            out = attend_causally(*heads, a.softmax_scale).transpose(1, 2).flatten(0, 1)
            attended = x.new_zeros(len(x), shape.num_heads, shape.value_dim)
            attended[:num_tokens] = out[padded]
            x = x + output(a, layer, attended)
            x = x + feed_forward(a.experts, layer, rms_norm(x, layer.post_norm, a.rms_norm_eps))[0]
