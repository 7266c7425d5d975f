"""A tiny Hugging Face model of every family, in fp32, and its tensors under their names on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 64
# 4 layers, heads and experts (or 8) suit every layout of up to 4 ranks on an axis.
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
    "experts_implementation": "eager",  # the others have no fp64
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
# The softmax is scaled too.
DEEPSEEK_ROPE = YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 8, "beta_slow": 1}
LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The classes of transformers, and the fields of the config beside `SIZES`."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    fields: Mapping[str, Any]
    has_experts: bool = False
    tied: bool = False


QWEN3 = {"head_dim": 8, "rope_parameters": DEFAULT_ROPE}
QWEN3_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
FAMILIES: Mapping[str, Family] = {
    "qwen3": Family(config=Qwen3Config, model=Qwen3ForCausalLM, fields=QWEN3),
    "qwen3, tied": Family(config=Qwen3Config, model=Qwen3ForCausalLM, fields=QWEN3, tied=True),
    "qwen3_moe": Family(config=Qwen3MoeConfig, model=Qwen3MoeForCausalLM, fields=QWEN3 | QWEN3_EXPERTS, has_experts=True),
    "llama": Family(config=LlamaConfig, model=LlamaForCausalLM, fields={"rope_parameters": LLAMA3_ROPE}),
    "llama, tied": Family(config=LlamaConfig, model=LlamaForCausalLM, fields={"rope_parameters": DEFAULT_ROPE}, tied=True),
    "qwen2": Family(config=Qwen2Config, model=Qwen2ForCausalLM, fields={"rope_parameters": YARN_ROPE}),
    # DeepSeek-V3: queries from a latent too, experts in groups, YaRN
    "deepseek_v3": Family(
        config=DeepseekV3Config,
        model=DeepseekV3ForCausalLM,
        fields=LATENT
        | {"q_lora_rank": 10, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
        | {"rope_parameters": DEEPSEEK_ROPE},
        has_experts=True,
    ),
    # Moonlight and Kimi-K2: one group, two shared experts
    "moonlight": Family(
        config=DeepseekV3Config,
        model=DeepseekV3ForCausalLM,
        fields=LATENT
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.446}
        | {"rope_parameters": DEFAULT_ROPE},
        has_experts=True,
    ),
}


def hf_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model; `changes` to the config. Weights are large enough that every gradient is far from 0."""
    of = FAMILIES[family]
    fields: dict[str, Any] = {**SIZES, **of.fields, "tie_word_embeddings": of.tied, **changes}
    model = of.model(of.config(**fields))
    generator = torch.Generator().manual_seed(5)
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, tensor in [*model.named_parameters(), *biases]:
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = 1.0 + 0.1 * noise if "norm" in name else 0.2 * noise
    return model.float().eval()


def disk_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names on disk: transformers 5 holds the experts of a layer in one tensor."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, gate_up in enumerate(tensor):
                for part, matrix in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                    out[name.replace("gate_up_proj", f"{expert}.{part}_proj.weight")] = matrix
        elif name.endswith("experts.down_proj"):
            out |= {name.replace("down_proj", f"{expert}.down_proj.weight"): matrix for expert, matrix in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def disk_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights and expert biases under their names on disk, a tied output matrix once."""
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()} | biases
    return {name: tensor.clone() for name, tensor in disk_tensors(tensors).items()}


def disk_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients under the same names; 0 for a parameter that took no part."""
    found = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in model.named_parameters()}
    return {name: tensor.clone() for name, tensor in disk_tensors(found).items()}
