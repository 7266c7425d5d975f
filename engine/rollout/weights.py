"""The engine's copies of the weights: one serves, another receives the next version (receive.py).

What a layer multiplies with the same input lies one after another in one tensor (query, key and value projections; gate and up), so that
decoding multiplies once; the tensors under their Hugging Face names are row ranges of those, so a swap needs no copy beyond the one that
receives it.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from tandem.engine.architecture import Architecture
from tandem.engine.types import TensorMeta

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of weights and activations; logits and log-probs are float32


@dataclass(kw_only=True, slots=True)
class LayerWeights:
    """One layer; E experts, F the width of the feed-forward layer or of an expert, None what the family lacks."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]; with latents: queries or their latent, key latent, rotated key
    qkv_bias: torch.Tensor | None = None  # [(heads + 2 kv_heads) * head_dim]
    q_norm: torch.Tensor | None = None  # [head_dim], or of the queries' latent
    k_norm: torch.Tensor | None = None  # [head_dim]
    qk_norm: torch.Tensor | None = None  # [heads + kv_heads, head_dim]: q_norm and k_norm for every head, made by `finish`
    q_b: torch.Tensor | None = None  # [heads * head_dim, query latent]
    kv_norm: torch.Tensor | None = None  # [key latent]
    kv_b: torch.Tensor | None = None  # [heads * (key part + value part), key latent]
    o: torch.Tensor  # [hidden, heads * v_head_dim]
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2F, hidden], or [E, 2F, hidden] where the layer is sparse
    down: torch.Tensor  # [hidden, F], or [E, hidden, F]
    router: torch.Tensor | None = None  # [E, hidden] where the layer is sparse
    router_fp32: torch.Tensor | None = None  # the same, made by `finish`
    expert_bias: torch.Tensor | None = None  # [E] float32
    shared_gate_up: torch.Tensor | None = None  # [2 * shared width, hidden]
    shared_down: torch.Tensor | None = None  # [hidden, shared width]


class ModelWeights:
    """One version of all weights. `named` maps Hugging Face names to contiguous views of the fused tensors.

    Args:
        other: a version whose float32 copy of the head this one shares: it is that of the version which was finished last.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: str = "cpu", *, other: "ModelWeights | None" = None) -> None:
        a = architecture
        self.architecture = a
        self.dtype = dtype
        self._device = device
        self.policy_version = -1
        self.named: dict[str, torch.Tensor] = {}
        self.embedding = self._tensor("model.embed_tokens.weight", a.vocab_size, a.hidden_size)
        self.layers = [self._layer(index) for index in range(a.num_layers)]
        self.norm = self._tensor("model.norm.weight", a.hidden_size)
        self.head = self.embedding if a.tie_word_embeddings else self._tensor("lm_head.weight", a.vocab_size, a.hidden_size)
        # Logits are computed in float32: rounding them to bfloat16 alone would move log-probs by up to 0.03.
        if dtype == torch.float32:
            self.head_fp32 = self.head
        elif other is not None:
            self.head_fp32 = other.head_fp32
        else:
            self.head_fp32 = self._zeros(a.vocab_size, a.hidden_size, dtype=torch.float32)

    @functools.cached_property
    def bytes(self) -> dict[str, memoryview]:
        """The memory of every named tensor."""
        return {name: tensor.view(-1).view(torch.uint8).numpy().data for name, tensor in self.named.items()}

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self._device)

    def _tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.named[name] = self._zeros(*shape, dtype=dtype)
        return self.named[name]

    def _rows(self, tensor: torch.Tensor, names_and_rows: Sequence[tuple[str, int]]) -> torch.Tensor:
        parts = tensor.split([rows for _, rows in names_and_rows])
        self.named.update({name: part for (name, _), part in zip(names_and_rows, parts, strict=True)})
        return tensor

    def _fused(self, names_and_rows: Sequence[tuple[str, int]], *inner: int) -> torch.Tensor:
        return self._rows(self._zeros(sum(rows for _, rows in names_and_rows), *inner), names_and_rows)

    def _layer(self, index: int) -> LayerWeights:
        a = self.architecture
        name = f"model.layers.{index}"
        attention = self._latent_attention(name) if a.latent is not None else self._attention(name)
        return LayerWeights(
            input_norm=self._tensor(f"{name}.input_layernorm.weight", a.hidden_size),
            **attention,
            o=self._tensor(f"{name}.self_attn.o_proj.weight", a.hidden_size, a.num_heads * a.v_head_dim),
            post_norm=self._tensor(f"{name}.post_attention_layernorm.weight", a.hidden_size),
            **(self._experts(f"{name}.mlp") if a.sparse_layers[index] else self._dense(f"{name}.mlp")),
        )

    def _attention(self, layer: str) -> dict[str, torch.Tensor]:
        a = self.architecture
        rows = (("q", a.num_heads * a.head_dim), ("k", a.num_kv_heads * a.head_dim), ("v", a.num_kv_heads * a.head_dim))
        tensors = {"qkv": self._fused([(f"{layer}.self_attn.{p}_proj.weight", count) for p, count in rows], a.hidden_size)}
        if a.qkv_bias:
            tensors["qkv_bias"] = self._fused([(f"{layer}.self_attn.{p}_proj.bias", count) for p, count in rows])
        if a.qk_norm:
            tensors |= {f"{p}_norm": self._tensor(f"{layer}.self_attn.{p}_norm.weight", a.head_dim) for p in "qk"}
            tensors["qk_norm"] = self._zeros(a.num_heads + a.num_kv_heads, a.head_dim)
        return tensors

    def _latent_attention(self, layer: str) -> dict[str, torch.Tensor]:
        a, latent = self.architecture, self.architecture.latent
        assert latent is not None
        name, query_rows, rank = f"{layer}.self_attn", a.num_heads * a.head_dim, latent.kv_lora_rank
        queries = ("q_proj", query_rows) if latent.q_lora_rank is None else ("q_a_proj", latent.q_lora_rank)
        down = [queries, ("kv_a_proj_with_mqa", rank + latent.qk_rope_head_dim)]
        tensors = {
            "qkv": self._fused([(f"{name}.{p}.weight", count) for p, count in down], a.hidden_size),
            "kv_norm": self._tensor(f"{name}.kv_a_layernorm.weight", rank),
            "kv_b": self._tensor(f"{name}.kv_b_proj.weight", a.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim), rank),
        }
        if latent.q_lora_rank is not None:
            tensors["q_norm"] = self._tensor(f"{name}.q_a_layernorm.weight", latent.q_lora_rank)
            tensors["q_b"] = self._tensor(f"{name}.q_b_proj.weight", query_rows, latent.q_lora_rank)
        return tensors

    def _dense(self, block: str, width: int | None = None) -> dict[str, torch.Tensor]:
        a = self.architecture
        width = a.intermediate_size if width is None else width
        return {
            "gate_up": self._fused([(f"{block}.gate_proj.weight", width), (f"{block}.up_proj.weight", width)], a.hidden_size),
            "down": self._tensor(f"{block}.down_proj.weight", a.hidden_size, width),
        }

    def _experts(self, block: str) -> dict[str, torch.Tensor]:
        hidden, experts = self.architecture.hidden_size, self.architecture.experts
        assert experts is not None
        count, width = experts.num_experts, experts.intermediate_size
        tensors = {"router": self._tensor(f"{block}.gate.weight", count, hidden)}
        # Made here, not by the first step: a swap must not allocate.
        tensors["router_fp32"] = tensors["router"] if self.dtype == torch.float32 else self._zeros(count, hidden, dtype=torch.float32)
        if experts.has_expert_bias:
            tensors["expert_bias"] = self._tensor(f"{block}.gate.e_score_correction_bias", count, dtype=torch.float32)
        if experts.shared_intermediate_size:
            shared = self._dense(f"{block}.shared_experts", experts.shared_intermediate_size)
            tensors |= {f"shared_{name}": tensor for name, tensor in shared.items()}
        tensors |= {"gate_up": self._zeros(count, 2 * width, hidden), "down": self._zeros(count, hidden, width)}
        for e in range(count):
            names = [(f"{block}.experts.{e}.{p}_proj.weight", width) for p in ("gate", "up")]
            self._rows(tensors["gate_up"][e], names)
            self.named[f"{block}.experts.{e}.down_proj.weight"] = tensors["down"][e]
        return tensors

    def finish(self) -> None:
        """Compute what is derived from the received tensors; before they serve, and again when another version was finished since."""
        heads = self.architecture.num_heads
        for layer in self.layers:
            if layer.qk_norm is not None and layer.q_norm is not None and layer.k_norm is not None:
                layer.qk_norm[:heads] = layer.q_norm
                layer.qk_norm[heads:] = layer.k_norm
            if layer.router is not None and layer.router_fp32 is not None and layer.router_fp32 is not layer.router:
                layer.router_fp32.copy_(layer.router)
        if self.head_fp32 is not self.head:
            self.head_fp32.copy_(self.head)

    def digest(self) -> str:
        """32 hexadecimal digits: equal ones mean equal names, dtype and bytes, however they arrived. Reads all the weights once."""
        digest = hashlib.blake2b(str(self.dtype).encode(), digest_size=16)
        for name, content in self.bytes.items():
            digest.update(name.encode() + b"\0" + xxhash.xxh3_128_digest(content))
        return digest.hexdigest()


def tensor_metas(architecture: Architecture, dtype: torch.dtype) -> dict[str, TensorMeta]:
    """Every tensor of the model by its Hugging Face name, in a fixed order, as a sender must announce it."""
    named = ModelWeights(architecture, dtype, device="meta").named
    return {name: TensorMeta(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in named.items()}
