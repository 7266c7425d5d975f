"""The engine's two copies of the weights: one serves, the other receives the next version.

Query, key and value projections (and gate and up) lie one after another in one tensor, so that decoding multiplies once;
the tensors under their Hugging Face names are row ranges of those, so a swap needs no copy beyond the one that receives it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from tandem.engine.rollout.architecture import Architecture


@dataclass(slots=True)
class LayerWeights:
    """One layer; E experts, F the width of the feed-forward layer or of an expert."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    q_norm: torch.Tensor  # [head_dim]
    k_norm: torch.Tensor  # [head_dim]
    o: torch.Tensor  # [hidden, heads * head_dim]
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2F, hidden], or [E, 2F, hidden] where the layer is sparse
    down: torch.Tensor  # [hidden, F], or [E, hidden, F]
    router: torch.Tensor | None  # [E, hidden] where the layer is sparse
    qk_norm: torch.Tensor  # [heads + kv_heads, head_dim]: q_norm and k_norm for every head, made by `finish`


class ModelWeights:
    """One version of all weights. `named` maps Hugging Face names to contiguous views of the fused tensors."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        a = architecture
        self.architecture = a
        self.dtype = dtype
        self.policy_version = -1
        self.named: dict[str, torch.Tensor] = {}
        self.embedding = self._tensor("model.embed_tokens.weight", a.vocab_size, a.hidden_size)
        self.layers = [self._layer(index) for index in range(a.num_layers)]
        self.norm = self._tensor("model.norm.weight", a.hidden_size)
        self.head = self.embedding if a.tie_word_embeddings else self._tensor("lm_head.weight", a.vocab_size, a.hidden_size)
        self.bytes = {name: tensor.view(-1).view(torch.uint8).numpy().data for name, tensor in self.named.items()}
        # Logits are computed in float32: rounding them to bfloat16 alone would move log-probs by up to 0.03.
        self.head_fp32 = self.head if dtype == torch.float32 else torch.zeros(a.vocab_size, a.hidden_size)

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        self.named[name] = torch.zeros(shape, dtype=self.dtype)
        return self.named[name]

    def _rows(self, tensor: torch.Tensor, names_and_rows: Sequence[tuple[str, int]]) -> None:
        parts = tensor.split([rows for _, rows in names_and_rows])
        self.named.update({name: part for (name, _), part in zip(names_and_rows, parts, strict=True)})

    def _layer(self, index: int) -> LayerWeights:
        a = self.architecture
        name = f"model.layers.{index}"
        q_rows, kv_rows = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        qkv = torch.zeros(q_rows + 2 * kv_rows, a.hidden_size, dtype=self.dtype)
        attention = f"{name}.self_attn"
        self._rows(qkv, [(f"{attention}.{p}_proj.weight", rows) for p, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))])
        router = None
        if a.sparse_layers[index]:
            width = a.moe_intermediate_size
            router = self._tensor(f"{name}.mlp.gate.weight", a.num_experts, a.hidden_size)
            gate_up = torch.zeros(a.num_experts, 2 * width, a.hidden_size, dtype=self.dtype)
            down = torch.zeros(a.num_experts, a.hidden_size, width, dtype=self.dtype)
            for e in range(a.num_experts):
                block = f"{name}.mlp.experts.{e}"
                self._rows(gate_up[e], [(f"{block}.gate_proj.weight", width), (f"{block}.up_proj.weight", width)])
                self.named[f"{block}.down_proj.weight"] = down[e]
        else:
            width = a.intermediate_size
            gate_up = torch.zeros(2 * width, a.hidden_size, dtype=self.dtype)
            self._rows(gate_up, [(f"{name}.mlp.gate_proj.weight", width), (f"{name}.mlp.up_proj.weight", width)])
            down = self._tensor(f"{name}.mlp.down_proj.weight", a.hidden_size, width)
        return LayerWeights(
            input_norm=self._tensor(f"{name}.input_layernorm.weight", a.hidden_size),
            qkv=qkv,
            q_norm=self._tensor(f"{attention}.q_norm.weight", a.head_dim),
            k_norm=self._tensor(f"{attention}.k_norm.weight", a.head_dim),
            o=self._tensor(f"{attention}.o_proj.weight", a.hidden_size, q_rows),
            post_norm=self._tensor(f"{name}.post_attention_layernorm.weight", a.hidden_size),
            gate_up=gate_up,
            down=down,
            router=router,
            qk_norm=torch.zeros(a.num_heads + a.num_kv_heads, a.head_dim, dtype=self.dtype),
        )

    def finish(self) -> None:
        """Compute what is derived from the received tensors."""
        a = self.architecture
        for layer in self.layers:
            layer.qk_norm[: a.num_heads] = layer.q_norm
            layer.qk_norm[a.num_heads :] = layer.k_norm
        if self.head_fp32 is not self.head:
            self.head_fp32.copy_(self.head)

    def digest(self) -> str:
        """32 hexadecimal digits: equal ones mean equal names, dtype and bytes, however they arrived. Reads all the weights once."""
        digest = hashlib.blake2b(str(self.dtype).encode(), digest_size=16)
        for name, content in self.bytes.items():
            digest.update(name.encode() + b"\0" + xxhash.xxh3_128_digest(content))
        return digest.hexdigest()
