"""The rows of the name map: every Megatron parameter of a model, its Hugging Face names and shapes, and how ranks cut it.

To add a family: give engine/architecture.py the features that it has, and `rows_of` the rows that these features bring.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from tandem.engine.architecture import Architecture, LatentAttention

Cut = Literal["whole", "vocabulary", "rows", "columns", "qkv", "glu"]
"""How a Megatron parameter lies on its tensor-parallel ranks.

whole: every rank holds all of it. vocabulary: rows in equal parts, padded at the end. rows, columns: dimension 0 or 1 in equal parts.
qkv: rows interleaved per key/value group as [queries, key, value], then cut into equal parts.
glu: [gate; up], each half cut into equal parts.
"""

Where = Literal["model", "layer", "dense_layer", "moe_layer"]
"""Which layers have a row; "model": it stands outside of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter and what it is on disk.

    `hf` pairs each Hugging Face name with its shape in named sizes. `{layer}` and `{expert}` stand for global indices.
    """

    megatron: str
    cut: Cut
    hf: tuple[tuple[str, tuple[str, ...]], ...]
    where: Where
    dtype: torch.dtype | None = None  # on disk and in a swap; None: that of the model


def sizes_of(architecture: Architecture) -> dict[str, int]:
    """The sizes that rows speak of; those of a feature that the model lacks are 0."""
    a, latent, experts = architecture, architecture.latent, architecture.experts
    sizes = {
        "layers": a.num_layers,
        "vocab": a.vocab_size,
        "hidden": a.hidden_size,
        "scores": int(a.has_score_head),
        "groups": a.num_kv_heads,
        "head": a.head_dim,
        "query": a.num_heads * a.head_dim,
        "key_value": a.num_kv_heads * a.head_dim,
        "attended": a.num_heads * a.v_head_dim,
        "ffn": a.intermediate_size,
        "experts": a.num_experts,
        "expert_ffn": experts.intermediate_size if experts is not None else 0,
        "shared_ffn": experts.shared_intermediate_size if experts is not None else 0,
    }
    if latent is not None:
        sizes |= {
            "query_latent": latent.q_lora_rank or 0,
            "key_latent": latent.kv_lora_rank,
            "key_latent_and_rope": latent.kv_lora_rank + latent.qk_rope_head_dim,
            "expanded": a.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim),
        }
    return sizes


_EMBEDDING = ("model.embed_tokens.weight", ("vocab", "hidden"))
_M, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION_M, _ATTENTION_HF = f"{_M}self_attention.", f"{_HF}self_attn."


def rows_of(architecture: Architecture) -> tuple[Row, ...]:
    """The rows of one model."""
    output = _EMBEDDING if architecture.tie_word_embeddings else ("lm_head.weight", ("vocab", "hidden"))
    output_row = Row("output_layer.weight", "vocabulary", (output,), "model")  # tied: with pp > 1 the last stage holds a copy
    if architecture.has_score_head:
        output_row = Row("output_layer.weight", "whole", (("score.weight", ("scores", "hidden")),), "model")
    rows = (
        Row("embedding.word_embeddings.weight", "vocabulary", (_EMBEDDING,), "model"),
        output_row,
        Row("decoder.final_layernorm.weight", "whole", (("model.norm.weight", ("hidden",)),), "model"),
        Row(f"{_M}input_layernorm.weight", "whole", ((f"{_HF}input_layernorm.weight", ("hidden",)),), "layer"),
    )
    if architecture.latent is not None:
        rows += _latent_attention_rows(architecture.latent)
    else:
        rows += _attention_rows(bias=architecture.qkv_bias, qk_norm=architecture.qk_norm)
    rows += (
        Row(f"{_ATTENTION_M}linear_proj.weight", "columns", ((f"{_ATTENTION_HF}o_proj.weight", ("hidden", "attended")),), "layer"),
        Row(f"{_M}pre_mlp_layernorm.weight", "whole", ((f"{_HF}post_attention_layernorm.weight", ("hidden",)),), "layer"),
        *_feed_forward_rows(f"{_M}mlp.", f"{_HF}mlp.", "ffn", "dense_layer"),
    )
    experts = architecture.experts
    return rows + _moe_rows(bias=experts.has_expert_bias, shared=experts.shared_intermediate_size > 0) if experts is not None else rows


def _attention_rows(*, bias: bool, qk_norm: bool) -> tuple[Row, ...]:
    def qkv(kind: str, *inputs: str) -> Row:
        sizes = (("q", "query"), ("k", "key_value"), ("v", "key_value"))
        names = tuple((f"{_ATTENTION_HF}{name}_proj.{kind}", (size, *inputs)) for name, size in sizes)
        return Row(f"{_ATTENTION_M}linear_qkv.{kind}", "qkv", names, "layer")

    norms = tuple(
        Row(f"{_ATTENTION_M}{name}_layernorm.weight", "whole", ((f"{_ATTENTION_HF}{name}_norm.weight", ("head",)),), "layer")
        for name in "qk"
    )
    return (qkv("weight", "hidden"), *((qkv("bias"),) if bias else ()), *(norms if qk_norm else ()))


def _latent_attention_rows(latent: LatentAttention) -> tuple[Row, ...]:
    def row(megatron: str, cut: Cut, hf: str, *shape: str) -> Row:
        return Row(f"{_ATTENTION_M}{megatron}.weight", cut, ((f"{_ATTENTION_HF}{hf}.weight", shape),), "layer")

    if latent.q_lora_rank is None:
        queries = (row("linear_q_proj", "rows", "q_proj", "query", "hidden"),)
    else:
        queries = (
            row("linear_q_down_proj", "whole", "q_a_proj", "query_latent", "hidden"),
            row("q_layernorm", "whole", "q_a_layernorm", "query_latent"),
            row("linear_q_up_proj", "rows", "q_b_proj", "query", "query_latent"),
        )
    return (
        *queries,
        row("linear_kv_down_proj", "whole", "kv_a_proj_with_mqa", "key_latent_and_rope", "hidden"),
        row("kv_layernorm", "whole", "kv_a_layernorm", "key_latent"),
        row("linear_kv_up_proj", "rows", "kv_b_proj", "expanded", "key_latent"),
    )


def _feed_forward_rows(megatron: str, hf: str, size: str, where: Where) -> tuple[Row, ...]:
    """The two matrices of a gated feed-forward layer: dense, one expert, or the shared experts."""
    gate_up = tuple((f"{hf}{name}_proj.weight", (size, "hidden")) for name in ("gate", "up"))
    return (
        Row(f"{megatron}linear_fc1.weight", "glu", gate_up, where),
        Row(f"{megatron}linear_fc2.weight", "columns", ((f"{hf}down_proj.weight", ("hidden", size)),), where),
    )


def _moe_rows(*, bias: bool, shared: bool) -> tuple[Row, ...]:
    rows = (Row(f"{_M}mlp.router.weight", "whole", ((f"{_HF}mlp.gate.weight", ("experts", "hidden")),), "moe_layer"),)
    if bias:
        hf = ((f"{_HF}mlp.gate.e_score_correction_bias", ("experts",)),)
        # Its steps are below the resolution of bfloat16.
        rows += (Row(f"{_M}mlp.router.expert_bias", "whole", hf, "moe_layer", torch.float32),)
    rows += _feed_forward_rows(f"{_M}mlp.experts.local_experts.{{expert}}.", f"{_HF}mlp.experts.{{expert}}.", "expert_ffn", "moe_layer")
    return rows + (_feed_forward_rows(f"{_M}mlp.shared_experts.", f"{_HF}mlp.shared_experts.", "shared_ffn", "moe_layer") if shared else ())
