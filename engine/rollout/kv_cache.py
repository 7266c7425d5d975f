"""The key/value cache: one row per response.

Letters of tensor names: H query heads, G key/value heads, D width of a key, E width of a value, L cache length.
"""

from dataclasses import dataclass

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.rollout.attention import key_multiple
from tandem.engine.rollout.products import round_up


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What attention sees: `num_heads` queries of `key_dim` for each token, keys and values of `num_kv_heads` heads.

    Latent attention caches one latent per token, the rotated part of the key behind it. All heads query it as one key head whose values
    are its first `value_dim` elements (arXiv:2405.04434, 2.1.2): nothing is decompressed.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    is_latent: bool

    @classmethod
    def of(cls, architecture: Architecture) -> "HeadShape":
        """The shape that a model's attention has here."""
        a, latent = architecture, architecture.latent
        if latent is not None:
            return cls(a.num_heads, 1, latent.kv_lora_rank + latent.qk_rope_head_dim, latent.kv_lora_rank, True)
        return cls(a.num_heads, a.num_kv_heads, a.head_dim, a.head_dim, False)

    @property
    def key_multiple(self) -> int:
        """See `attention.key_multiple`."""
        return key_multiple(self.num_heads // self.num_kv_heads, min(self.key_dim, self.value_dim))


class KVCache:
    """Keys and values of up to `num_rows` sequences of up to `length` tokens.

    Untouched memory stays unmapped (the kernel hands out zero pages), so what is paid for is what was written.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype, num_rows: int, length: int) -> None:
        self.shape = shape = HeadShape.of(architecture)
        # Two threads would share the attention of a single matrix, and round it in another way than one of several.
        self.num_rows, self.length = round_up(num_rows, 2), round_up(length, shape.key_multiple)
        sizes = (architecture.num_layers, self.num_rows, shape.num_kv_heads, self.length)
        # Zeros, not empty: a masked key weighs 0, and 0 * NaN would spoil the sum.
        self._k = torch.zeros(*sizes, shape.key_dim, dtype=dtype)
        self._v = None if shape.is_latent else torch.zeros(*sizes, shape.value_dim, dtype=dtype)

    @property
    def _stored(self) -> tuple[torch.Tensor, ...]:
        return (self._k,) if self._v is None else (self._k, self._v)

    def write(self, layer: int, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
        """Put keys [N * G, D] and values [N * G, E] where `flat_index` says. A latent cache takes no values."""
        for stored, new in zip(self._stored, (k, v), strict=False):
            assert new is not None
            stored[layer].view(-1, stored.shape[-1]).index_copy_(0, index, new)

    def keys_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [num_rows * G, L, D] and [num_rows * G, L, E]."""
        k, v = (stored[layer].flatten(0, 1) for stored in (self._stored[0], self._stored[-1]))
        return k, v[..., : self.shape.value_dim]

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of one row to another."""
        for stored in self._stored:
            stored[:, target, :, :num_tokens] = stored[:, source, :, :num_tokens]

    def permute(self, order: torch.Tensor, num_tokens: int) -> None:
        """Row i becomes what row order[i] was, for i < len(order); tokens past `num_tokens` are not moved."""
        for stored in self._stored:
            for layer in stored:
                layer[: len(order), :, :num_tokens] = layer[order, :, :num_tokens]

    def flat_index(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Indices into [num_rows * G * L, D] of (row, every kv head, position): [N] → [N * G]."""
        heads = torch.arange(self.shape.num_kv_heads)
        return ((rows[:, None] * self.shape.num_kv_heads + heads) * self.length + positions[:, None]).flatten()
