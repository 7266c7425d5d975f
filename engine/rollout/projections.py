"""From hidden states to the queries, keys and values that attention sees, and back from what it attended.

Letters of tensor names: T tokens (a multiple of ROW_MULTIPLE), H query heads, G key/value heads, D width of a key, E width of a value.
"""

import torch

from tandem.engine.architecture import Architecture, LatentAttention
from tandem.engine.rollout.products import linear, rms_norm
from tandem.engine.rollout.weights import LayerWeights

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class Rotation:
    """cos and sin of every position, [context, 1, half the rotated width]."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, context_length: int) -> None:
        rope = architecture.rope
        angles = torch.arange(context_length, dtype=torch.float32)[:, None] * rope.inverse_frequencies_D(torch.device("cpu"))
        self._cos, self._sin = ((f(angles) * rope.attention_scaling).to(dtype)[:, None] for f in (torch.cos, torch.sin))
        self._interleaved = rope.interleaved

    def at(self, positions: torch.Tensor) -> "Rotated":
        """Positions [T]."""
        return Rotated(self._cos[positions], self._sin[positions], self._interleaved)


class Rotated:
    """The rotation of T tokens."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
        self._cos, self._sin, self._interleaved = cos, sin, interleaved

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, heads, D], the first elements of all pairs before the second ones in the result."""
        left, right = (x[..., 0::2], x[..., 1::2]) if self._interleaved else x.chunk(2, dim=-1)
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        half = x.shape[-1] // 2
        torch.mul(left, self._cos, out=out[..., :half]).addcmul_(right, self._sin, value=-1)
        torch.mul(right, self._cos, out=out[..., half:]).addcmul_(left, self._sin)
        return out


def project(a: Architecture, layer: LayerWeights, x: torch.Tensor, rotate: Rotated) -> QKV:
    """q [T * H, D], k [T * G, D] and v [T * G, E] of normalised hidden states [T, hidden]. Of latents there is one key and no value."""
    fused = linear(x, layer.qkv)
    if a.latent is not None:
        return _project_latent(a, a.latent, layer, fused, rotate)
    if layer.qkv_bias is not None:
        fused += layer.qkv_bias
    qk, v = fused.view(len(x), -1, a.head_dim).split([a.num_heads + a.num_kv_heads, a.num_kv_heads], dim=1)
    if layer.qk_norm is not None:
        qk = rms_norm(qk, layer.qk_norm, a.rms_norm_eps)
    q, k = rotate(qk).split([a.num_heads, a.num_kv_heads], dim=1)
    return q.reshape(-1, a.head_dim), k.reshape(-1, a.head_dim), v.reshape(-1, a.head_dim)


def _project_latent(a: Architecture, latent: LatentAttention, layer: LayerWeights, fused: torch.Tensor, rotate: Rotated) -> QKV:
    """The part of a query without position is taken through the key's expansion instead of every key: q · (W c) = (Wᵀ q) · c."""
    assert layer.kv_norm is not None
    rank, width, num_tokens = latent.kv_lora_rank, latent.qk_rope_head_dim, len(fused)
    q, c, k_rope = fused.split([fused.shape[1] - rank - width, rank, width], dim=1)
    if layer.q_b is not None:
        assert layer.q_norm is not None
        q = linear(rms_norm(q, layer.q_norm, latent.norm_eps), layer.q_b)
    q_nope, q_rope = q.view(num_tokens, a.num_heads, a.head_dim).split([latent.qk_nope_head_dim, width], dim=2)
    query = fused.new_empty(num_tokens, a.num_heads, rank + width)
    query[..., :rank] = torch.bmm(q_nope.transpose(0, 1), _expansion(a, layer)[:, : latent.qk_nope_head_dim]).transpose(0, 1)
    rotate(q_rope, out=query[..., rank:])
    key = fused.new_empty(num_tokens, 1, rank + width)
    key[:, 0, :rank] = rms_norm(c, layer.kv_norm, latent.norm_eps)
    rotate(k_rope[:, None], out=key[..., rank:])
    return query.flatten(0, 1), key.flatten(0, 1), None


def output(a: Architecture, layer: LayerWeights, attended: torch.Tensor) -> torch.Tensor:
    """[T, H, E] to [T, hidden]. Latents are expanded to values here."""
    if a.latent is not None:
        expand = _expansion(a, layer)[:, a.latent.qk_nope_head_dim :].transpose(1, 2)  # [H, rank, v_head_dim]
        attended = torch.bmm(attended.transpose(0, 1), expand).transpose(0, 1)
    return linear(attended.reshape(len(attended), -1), layer.o)


def _expansion(a: Architecture, layer: LayerWeights) -> torch.Tensor:
    """[H, key part + value part, rank]."""
    assert layer.kv_b is not None
    return layer.kv_b.view(a.num_heads, -1, layer.kv_b.shape[1])
