"""From the model's architecture to Megatron's: the transformer's configuration and the one layer spec, the same on CPU and GPU."""

import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from tandem.engine.architecture import Architecture
from tandem.engine.config import TrainerConfig
from tandem.engine.trainer import dispatch
from tandem.engine.trainer.attention import PackedCoreAttention
from tandem.engine.trainer.batch import LocalBatch
from tandem.engine.trainer.experts import Experts
from tandem.engine.trainer.latent_attention import LatentSelfAttention
from tandem.engine.trainer.mesh import Mesh
from tandem.engine.trainer.modules import Norm, SwiGLU, residual_add
from tandem.engine.trainer.router import Router

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _leave_unset(weight: torch.Tensor) -> None: ...


def transformer_config(architecture: Architecture, mesh: Mesh, trainer: TrainerConfig, *, variable_lengths: bool) -> TransformerConfig:
    """Megatron's configuration. `variable_lengths`: pipeline stages tell each other the length of every microbatch."""
    dtype, experts = DTYPES[trainer.dtype], architecture.experts
    # Megatron checks the dispatcher of dense models too.
    options: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if experts is not None:
        options |= {
            "num_moe_experts": experts.num_experts,
            "moe_layer_freq": [int(is_sparse) for is_sparse in architecture.sparse_layers],
            # The rest of the routing is the router's (router.py).
            "moe_router_topk": experts.num_experts_per_tok,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_ffn_hidden_size": experts.intermediate_size,
            "moe_shared_expert_intermediate_size": experts.shared_intermediate_size or None,
            "moe_token_dispatcher_type": trainer.moe_dispatcher,
            "moe_permute_fusion": True,
            "moe_grouped_gemm": False,  # names Transformer Engine's experts; ours stand in the spec
        }
        dispatch.install()
    if trainer.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif trainer.recompute == "selective":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
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


class Layer(TransformerLayer):
    """Megatron's layer, whose router is told which microbatch it sees: Megatron hands that to attention only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_moe_layer:
            mlp: Any = self.mlp
            dispatch.keep_local(mlp)

    def forward(self, *args: Any, packed_seq_params: LocalBatch, **kwargs: Any) -> Any:
        if self.is_moe_layer:
            mlp: Any = self.mlp
            mlp.router.batch = packed_seq_params
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def layer_specs(architecture: Architecture) -> list[ModuleSpec]:
    """The spec of every layer: Megatron's local one with our norm, activation, attention and router in its places."""
    return [_layer_spec(architecture, is_sparse) for is_sparse in architecture.sparse_layers]


def _layer_spec(architecture: Architecture, is_sparse: bool) -> ModuleSpec:
    num_experts = architecture.num_experts if is_sparse else None
    spec = get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
    spec.module = Layer
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    layer.self_attn_bda = layer.mlp_bda = residual_add
    params = {"architecture": architecture}
    if architecture.latent is not None:
        layer.self_attention = ModuleSpec(module=LatentSelfAttention, params=params)
    else:
        attention: Any = layer.self_attention.submodules
        if architecture.qk_norm:
            attention.q_layernorm = attention.k_layernorm = Norm
        attention.core_attention = ModuleSpec(module=PackedCoreAttention, params=params)
    mlp: Any = layer.mlp.submodules
    if is_sparse:
        mlp.router = functools.partial(Router, architecture=architecture)
        mlp.experts.module = Experts
        mlp.experts.submodules.activation_func = mlp.shared_experts.submodules.activation_func = SwiGLU
    else:
        mlp.activation_func = SwiGLU
    return spec
