"""A tiny random model of every family, as transformers saves it: for checks that need no particular weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# 4 layers, heads and experts: every axis of a layout can be 2 or 4.
_SIZES: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True}
_LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
    "first_k_dense_replace": 1,
}
TINY_MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4},
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "deepseek_v3": {**_EXPERTS, **_LATENT},
}


def write_tiny_model(name: str, folder: Path, *, seed: int) -> None:
    """Save the model in float32. Matrices are drawn large enough that no gradient is near 0, and norms around 1.

    Args:
        name: one of `TINY_MODELS`.
        folder: made if missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {**_SIZES, **TINY_MODELS[name]}
    if name in ("qwen2", "deepseek_v3"):
        del sizes["head_dim"]  # follows from other fields
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.1 * noise if "norm" in parameter_name else 0.2 * noise)
    model.save_pretrained(folder)
