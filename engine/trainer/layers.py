"""From a Hugging Face config to Megatron's: the transformer's sizes and the one layer spec, the same on CPU and GPU.

Shapes: L tokens of this rank, N query heads, G key/value heads, D head width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import MegatronModule

from tandem.engine.config import ModelConfig, TrainerConfig
from tandem.engine.trainer.batch import LocalBatch
from tandem.engine.trainer.context_parallel import gather_keys
from tandem.engine.trainer.elementwise import rms_norm, rope, swiglu
from tandem.engine.trainer.mesh import Mesh, num_experts_of
from tandem.kernels.attention import packed_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Fields of config.json without which a model is not known.
NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)
NEEDED_OF_MOE = ("num_experts_per_tok", "moe_intermediate_size")


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


def check_hf_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming field and value, for a model that the layers here do not compute or that lacks a field."""
    model_type = config.get("model_type")
    if model_type not in ("qwen3", "qwen3_moe"):
        raise ValueError(f"model_type is {model_type!r}; the trainer knows qwen3 and qwen3_moe")
    missing = [name for name in NEEDED + (NEEDED_OF_MOE if model_type == "qwen3_moe" else ()) if config.get(name) is None]
    if model_type == "qwen3_moe" and config.get("num_experts", config.get("num_local_experts")) is None:
        missing.append("num_experts (or num_local_experts)")
    if missing:
        raise ValueError(f"the config of the {model_type} model lacks {', '.join(missing)}; add what its weights were trained with")
    for name, plain in (("attention_bias", False), ("use_sliding_window", False), ("hidden_act", "silu"), ("attention_dropout", 0.0)):
        if config.get(name, plain) != plain:
            raise ValueError(f"{name} is {config[name]!r}; the trainer computes {name}={plain!r} only")
    rope_theta(config)


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Width of one head; hidden_size over num_attention_heads where the model's config names none."""
    head_dim = config.get("head_dim")
    return config["hidden_size"] // config["num_attention_heads"] if head_dim is None else head_dim


def rope_theta(config: Mapping[str, Any]) -> float:
    """Base of the rotary embedding, where transformers 4 or transformers 5 puts it. Raises ValueError for scaled variants."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}; the trainer computes 'default' only")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ValueError("the model's config has neither rope_theta nor rope_parameters.rope_theta; add one of them")
    return float(theta)


def inverse_frequencies(config: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """[D/2] fp32: theta ** (-2 i / D)."""
    head_dim = head_dim_of(config)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / (rope_theta(config) ** exponent)


def moe_layers(config: Mapping[str, Any]) -> list[bool]:
    """Whether each layer has experts."""
    num_layers = config["num_hidden_layers"]
    if not num_experts_of(config):
        return [False] * num_layers
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]


def _leave_unset(weight: torch.Tensor) -> None: ...


def transformer_config(config: Mapping[str, Any], mesh: Mesh, trainer: TrainerConfig, *, variable_lengths: bool) -> TransformerConfig:
    """Megatron's configuration. `variable_lengths`: pipeline stages tell each other the length of every microbatch."""
    dtype = DTYPES[trainer.dtype]
    # Megatron checks the dispatcher of dense models too.
    options: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if any(moe_layers(config)):
        options |= {
            "num_moe_experts": num_experts_of(config),
            "moe_layer_freq": [int(is_moe) for is_moe in moe_layers(config)],
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            # Normalised top-k probabilities are the softmax over the top-k logits.
            "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": trainer.moe_dispatcher,
            "moe_grouped_gemm": False,
        }
    if trainer.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif trainer.recompute == "selective":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=head_dim_of(config),
        ffn_hidden_size=config["intermediate_size"],
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        # Not Transformer Engine's function: the spec's activation module, which is ours.
        use_te_activation_func=True,
        bias_activation_fusion=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=mesh.tp_size,
        sequence_parallel=mesh.config.sequence_parallel,
        pipeline_model_parallel_size=mesh.pp_size,
        virtual_pipeline_model_parallel_size=mesh.config.vpp if mesh.config.vpp > 1 else None,
        context_parallel_size=mesh.cp_size,
        expert_model_parallel_size=mesh.ep_size,
        expert_tensor_parallel_size=mesh.etp_size,
        variable_seq_lengths=variable_lengths,
        # The interleaved schedule is wrong for pp = 2 unless its sends overlap (megatron-core 0.16.1).
        overlap_p2p_comm=mesh.config.vpp > 1,
        batch_p2p_comm=mesh.config.vpp == 1,
        # Gradients are sums over tokens; the loss is divided by the global normaliser before they are taken.
        calculate_per_token_loss=True,
        # Weights are drawn by name after the model is built. (Without initialisation Megatron forgets to mark them as split.)
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        **options,
    )


class Norm(torch.nn.Module):
    """RMSNorm that tells Megatron to sum its gradient over the tensor-parallel ranks when they split the tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(MegatronModule):
    """silu(gate) * up, where [gate, up] is the input's last axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x)


class PackedCoreAttention(torch.nn.Module):
    """Rotary embedding by position and attention within each packed sequence, over all context-parallel ranks."""

    def __init__(self, config: TransformerConfig, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self.cp_group = pg_collection.cp

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, *, packed_seq_params: LocalBatch, **_: Any
    ) -> torch.Tensor:
        """query [L, 1, N, D], key and value [L, 1, G, D] to [L, 1, N * D]."""
        batch = packed_seq_params
        query, key = (rope(x[:, 0], batch.cos_L1D, batch.sin_L1D) for x in (query, key))
        value = value[:, 0]
        if batch.order_T is not None:
            if self.cp_group.size() > 1:
                key, value = (gather_keys(x, batch.order_T, self.cp_group) for x in (key, value))
            else:
                key, value = (x.index_select(0, batch.order_T) for x in (key, value))
        out = packed_attention(query, key, value, batch.whole.visible_end_T, plan=batch.plan)
        return out.reshape(out.shape[0], 1, -1)


def _residual_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """Megatron's bias-dropout-add where there is neither bias nor dropout."""

    def add(x_and_bias: tuple[torch.Tensor, None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        return residual + x_and_bias[0]

    return add


def layer_specs(config: TransformerConfig, is_moe: list[bool]) -> list[ModuleSpec]:
    """The spec of every layer: Megatron's local one with our norm, activation and attention in its places."""
    specs = []
    for moe in is_moe:
        spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts if moe else None, qk_layernorm=True, normalization="RMSNorm")
        layer: Any = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = Norm
        layer.self_attn_bda = layer.mlp_bda = _residual_add
        attention: Any = layer.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = Norm
        attention.core_attention = PackedCoreAttention
        mlp: Any = layer.mlp.submodules
        (mlp.experts.submodules if moe else mlp).activation_func = SwiGLU
        specs.append(spec)
    return specs
