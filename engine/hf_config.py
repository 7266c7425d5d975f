"""config.json of the model of a run."""

from pathlib import Path
from typing import Any

from tandem.engine.checkpoint.hf_folder import read_hf_config
from tandem.engine.config import ModelConfig
from tandem.engine.data.tokenizer import HFTokenizer, padded_vocab_size


def hf_config_of(model: ModelConfig, tokenizer: HFTokenizer) -> dict[str, Any]:
    """That of its folder, or of a Qwen3 from scratch. Raises: FileNotFoundError or ValueError for a folder that is no model."""
    if model.path is None:
        return qwen3_hf_config(model, padded_vocab_size(tokenizer))
    return read_hf_config(Path(model.path))


def qwen3_hf_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """config.json of a Qwen3, or Qwen3-MoE with `num_experts`, of the configured sizes."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if model.num_experts else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if model.num_experts else "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }
    if model.num_experts:
        config |= {
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            "moe_intermediate_size": model.moe_intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }
    return config
