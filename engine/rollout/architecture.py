"""What the inference code must know of a Qwen3 or Qwen3-MoE, read from its Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tandem.engine.config import RolloutConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes of the network; `sparse_layers[i]` is True where layer i is a mixture of experts."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    sparse_layers: tuple[bool, ...]
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Architecture":
        """Read a Hugging Face config.json.

        Raises: ValueError naming the field that asks for something other than a plain Qwen3 or Qwen3-MoE.
        """
        model_type = config.get("model_type")
        if model_type not in ("qwen3", "qwen3_moe"):
            raise ValueError(f"model_type is {model_type!r}; the embedded rollout engine runs qwen3 and qwen3_moe")
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true; the embedded rollout engine attends to the whole context")
        if config.get("attention_bias"):
            raise ValueError("attention_bias is true; the embedded rollout engine has no biases")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {config['hidden_act']!r}; the embedded rollout engine has silu only")
        num_layers = config["num_hidden_layers"]
        num_heads = config["num_attention_heads"]
        sparse_layers = (False,) * num_layers
        experts: dict[str, Any] = {}
        if model_type == "qwen3_moe":
            dense = set(config.get("mlp_only_layers") or ())
            step = config.get("decoder_sparse_step", 1)
            sparse_layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
            experts = {name: config[name] for name in ("num_experts_per_tok", "moe_intermediate_size")}
            # transformers 5 writes num_local_experts, before it was num_experts.
            experts["num_experts"] = config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]
            experts["norm_topk_prob"] = config.get("norm_topk_prob", False)
        return cls(
            num_layers=num_layers,
            hidden_size=config["hidden_size"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(config),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            sparse_layers=sparse_layers,
            **experts,
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model under its Hugging Face name on disk, in a fixed order."""
        hidden, head_dim = self.hidden_size, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}"
            shapes[f"{name}.input_layernorm.weight"] = (hidden,)
            shapes[f"{name}.self_attn.q_proj.weight"] = (self.num_heads * head_dim, hidden)
            shapes[f"{name}.self_attn.k_proj.weight"] = (self.num_kv_heads * head_dim, hidden)
            shapes[f"{name}.self_attn.v_proj.weight"] = (self.num_kv_heads * head_dim, hidden)
            shapes[f"{name}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{name}.self_attn.k_norm.weight"] = (head_dim,)
            shapes[f"{name}.self_attn.o_proj.weight"] = (hidden, self.num_heads * head_dim)
            shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
            blocks = {f"{name}.mlp": self.intermediate_size}
            if self.sparse_layers[layer]:
                shapes[f"{name}.mlp.gate.weight"] = (self.num_experts, hidden)
                blocks = {f"{name}.mlp.experts.{e}": self.moe_intermediate_size for e in range(self.num_experts)}
            for block, width in blocks.items():
                shapes[f"{block}.gate_proj.weight"] = (width, hidden)
                shapes[f"{block}.up_proj.weight"] = (width, hidden)
                shapes[f"{block}.down_proj.weight"] = (hidden, width)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """What a process that computes is told once: the first message to the embedded engine's worker."""

    architecture: Architecture
    config: RolloutConfig
    dtype: torch.dtype
    context_length: int
    stop_token_ids: tuple[int, ...]
    num_threads: int


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Base of a plain rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` (before)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}; the embedded rollout engine has the plain rotary embedding only")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ValueError("the model's config has neither rope_theta nor rope_parameters.rope_theta")
    return float(theta)
