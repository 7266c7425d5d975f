"""From a model's config.json to its architecture: transformers' defaults and spellings, and what is refused."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from tandem.engine.architecture import Architecture
from tests.trainer.families import FAMILIES, hf_model

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
QWEN3 = BASE | {"model_type": "qwen3", "head_dim": 8}
QWEN3_MOE = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LLAMA = BASE | {"model_type": "llama"}
DEEPSEEK = BASE | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
YARN = {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_embd": 8, "model_type": "gpt2"}, "model_type is 'gpt2'; known are qwen3, qwen3_moe, llama, qwen2, deepseek_v3, kimi_k2"),
        (without(QWEN3, "rms_norm_eps", "vocab_size"), "config of the qwen3 model lacks vocab_size, rms_norm_eps; add"),
        (without(QWEN3_MOE, "num_experts", "moe_intermediate_size"), r"lacks moe_intermediate_size, num_experts \(or num_local_experts\)"),
        (without(DEEPSEEK, "q_lora_rank", "v_head_dim"), r"lacks v_head_dim, q_lora_rank \(null where"),
        (without(QWEN3, "rope_theta"), "neither rope_theta nor rope_parameters.rope_theta"),
        (QWEN3 | {"attention_bias": True}, "attention_bias is True; only attention_bias=False is computed"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types holds 'sliding_attention'"),
        (LLAMA | {"hidden_size": "48"}, "'hidden_size' expected int, got str"),
        (LLAMA | {"num_key_value_heads": 3}, r"num_key_value_heads is 3; it must divide num_attention_heads \(4\)"),
        (LLAMA | {"head_dim": 7}, "requires an even rotary dimension.*`head_dim`=7"),
        (BASE | {"model_type": "qwen2", "hidden_size": 36}, "head_dim is 9; it must be even"),
        (BASE | {"model_type": "qwen2", "hidden_size": 50}, "hidden_size is 50; it must be a multiple"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; computed are default"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn"}}, "refuses the config of the llama model.*factor"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (DEEPSEEK | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is 'fp8'.*convert the model to bfloat16"),
        (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        (DEEPSEEK | {"num_key_value_heads": 2}, "num_key_value_heads is 2; latent attention"),
        (DEEPSEEK | {"n_group": 3}, r"n_group is 3; it must divide n_routed_experts \(8\)"),
        (DEEPSEEK | {"n_group": 8}, "n_group is 8; it must leave each group at least 2 of 8 experts"),
        (DEEPSEEK | {"topk_group": 3}, r"topk_group is 3; it must lie between 1 and n_group \(2\)"),
        (DEEPSEEK | {"num_experts_per_tok": 5}, r"num_experts_per_tok is 5; .*may choose from \(4\)"),
    ],
)
def test_a_model_that_is_not_computed_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture.from_hf(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_what_transformers_saves(family: str) -> None:
    model: Any = hf_model(family)
    architecture = Architecture.from_hf(model.config.to_dict())
    layer = model.model.layers[-1].self_attn
    assert architecture.softmax_scale == pytest.approx(layer.scaling, rel=1e-12)
    rotary = model.model.rotary_emb
    assert torch.equal(architecture.rope.inverse_frequencies_D(torch.device("cpu")), rotary.inv_freq)
    assert architecture.rope.attention_scaling == rotary.attention_scaling
    assert architecture.tie_word_embeddings == FAMILIES[family].tied
    assert (architecture.num_experts > 0) == FAMILIES[family].has_experts
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == list(architecture.sparse_layers)


def test_both_spellings_of_transformers_4_and_5_are_read() -> None:
    new = without(QWEN3_MOE, "rope_theta", "num_experts") | {
        **{"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    }
    assert Architecture.from_hf(new) == Architecture.from_hf(QWEN3_MOE)
    new = without(LLAMA, "rope_theta") | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}}
    assert Architecture.from_hf(new) == Architecture.from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})


def test_the_config_is_left_as_it_was() -> None:
    config = DEEPSEEK | {"rope_scaling": dict(YARN)}
    Architecture.from_hf(config)
    assert config == DEEPSEEK | {"rope_scaling": YARN}


def test_absent_fields_have_the_defaults_of_their_family() -> None:
    assert Architecture.from_hf(without(QWEN3, "head_dim")).head_dim == 128
    assert Architecture.from_hf(without(QWEN3_MOE, "head_dim")).head_dim == 12
    assert Architecture.from_hf(LLAMA | {"head_dim": None, "num_key_value_heads": None}).num_kv_heads == 4
    assert not Architecture.from_hf(LLAMA).tie_word_embeddings


def test_kimi_k2_is_deepseek_v3_by_another_name() -> None:
    deepseek = Architecture.from_hf(DEEPSEEK)
    assert Architecture.from_hf(DEEPSEEK | {"model_type": "kimi_k2"}) == dataclasses.replace(deepseek, model_type="kimi_k2")
    assert (deepseek.head_dim, deepseek.v_head_dim, deepseek.sparse_layers) == (12, 6, (False, True, True))


def test_yarn_of_deepseek_scales_the_softmax_and_leaves_the_rotation() -> None:
    architecture = Architecture.from_hf(DEEPSEEK | {"rope_scaling": YARN})
    assert architecture.softmax_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(12))
    assert architecture.rope.attention_scaling == 1.0
