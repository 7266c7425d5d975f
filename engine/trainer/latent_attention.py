"""Multi-head latent attention (DeepSeek-V2 and V3, arXiv:2412.19437, 2.1.1): queries, keys and values from two narrow latents.

Megatron-core's own module takes Transformer Engine for granted and rotates by the place in the microbatch; this one rotates by position
and fills the same place of the layer. The projections into the latents are narrow and whole on every tensor-parallel rank: under
sequence parallelism each rank projects its own tokens, and only the latents are gathered.

Shapes: L tokens of this context-parallel rank, N query heads of this tensor-parallel rank.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from tandem.engine.architecture import Architecture
from tandem.engine.trainer.attention import attend
from tandem.engine.trainer.batch import LocalBatch
from tandem.engine.trainer.modules import Norm, WholeLinear
from tandem.kernels.rope import interleaved_rope, rope


class LatentSelfAttention(MegatronModule):
    """In the place of Megatron's SelfAttention; parameters have the names of Megatron's MLASelfAttention."""

    def __init__(self, config: TransformerConfig, pg_collection: Any, architecture: Architecture, **_: Any) -> None:
        super().__init__(config)
        assert architecture.latent is not None
        self.latent, self.head_dim = architecture.latent, architecture.head_dim
        self.softmax_scale, self.rope = architecture.softmax_scale, interleaved_rope if architecture.rope.interleaved else rope
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in (config.recompute_modules or ())
        latent, heads, hidden = self.latent, architecture.num_heads, architecture.hidden_size
        if latent.q_lora_rank is None:
            self.linear_q_proj = self._column_parallel(hidden, heads * self.head_dim)
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden, latent.q_lora_rank)
            self.q_layernorm = Norm(config, latent.q_lora_rank, latent.norm_eps)
            self.linear_q_up_proj = self._column_parallel(latent.q_lora_rank, heads * self.head_dim)
        self.linear_kv_down_proj = WholeLinear(config, hidden, latent.kv_lora_rank + latent.qk_rope_head_dim)
        self.kv_layernorm = Norm(config, latent.kv_lora_rank, latent.norm_eps)
        self.linear_kv_up_proj = self._column_parallel(latent.kv_lora_rank, heads * (latent.qk_nope_head_dim + latent.v_head_dim))
        self.linear_proj = RowParallelLinear(
            heads * latent.v_head_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,  # pyright: ignore[reportArgumentType]
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )

    def _column_parallel(self, num_inputs: int, num_outputs: int) -> ColumnParallelLinear:
        config: Any = self.config
        return ColumnParallelLinear(
            num_inputs, num_outputs, config=config, init_method=config.init_method, bias=False, gather_output=False, tp_group=self.tp_group
        )

    def forward(self, hidden: torch.Tensor, *, packed_seq_params: LocalBatch, **_: Any) -> tuple[torch.Tensor, None]:
        """[L or L / tp, 1, H] to the same."""
        batch, latent = packed_seq_params, self.latent
        query = self._queries(hidden)
        query_nope, query_rope = query.split([latent.qk_nope_head_dim, latent.qk_rope_head_dim], dim=-1)
        compressed, key_rope = self.linear_kv_down_proj(hidden).split([latent.kv_lora_rank, latent.qk_rope_head_dim], dim=-1)
        # Every rank's heads use the one rotated key, so the gradients of all are summed.
        if self.config.sequence_parallel:
            key_rope = gather_from_sequence_parallel_region(key_rope, group=self.tp_group)
        else:
            key_rope = copy_to_tensor_model_parallel_region(key_rope, group=self.tp_group)
        expanded, _ = self.linear_kv_up_proj(self.kv_layernorm(compressed))
        expanded = expanded[:, 0].unflatten(-1, (query.shape[1], -1))
        key_nope, value = expanded.split([latent.qk_nope_head_dim, latent.v_head_dim], dim=-1)
        query_rope, key_rope = (self.rope(x, batch.cos_L1D, batch.sin_L1D) for x in (query_rope, key_rope))
        query = torch.cat([query_nope, query_rope], dim=-1)
        key = torch.cat([key_nope, key_rope.expand(-1, query.shape[1], -1)], dim=-1)

        def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attend(query, key, value, batch, self.cp_group, self.softmax_scale)

        recompute = self.recompute_core and self.training
        out = tensor_parallel.checkpoint(core, False, query, key, value) if recompute else core(query, key, value)
        return self.linear_proj(out)[0], None

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """[L, N, D]"""
        if self.latent.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        return query[:, 0].unflatten(-1, (-1, self.head_dim))
