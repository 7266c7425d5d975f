"""From a model's config.json to the trainer's: what is missing or not computed is named."""

from typing import Any

import pytest
import torch

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.config import ModelConfig
from tandem.engine.trainer.layers import check_hf_config, head_dim_of, inverse_frequencies, qwen3_hf_config
from tandem.engine.trainer.mesh import num_experts_of

DENSE = qwen3_hf_config(ModelConfig(), 64)
MOE = qwen3_hf_config(ModelConfig(num_experts=4), 64)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_embd": 8, "model_type": "gpt2"}, "model_type is 'gpt2'; the trainer knows qwen3 and qwen3_moe"),
        (without(DENSE, "rms_norm_eps", "vocab_size"), "config of the qwen3 model lacks vocab_size, rms_norm_eps; add"),
        (without(MOE, "num_experts", "moe_intermediate_size"), r"lacks moe_intermediate_size, num_experts \(or num_local_experts\); add"),
        (DENSE | {"attention_bias": True}, "attention_bias is True; the trainer computes attention_bias=False only"),
        (without(DENSE, "rope_parameters"), "neither rope_theta nor rope_parameters.rope_theta"),
    ],
)
def test_a_model_that_the_layers_do_not_compute_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_hf_config(config)


def test_experts_may_have_the_name_that_transformers_5_gives_them() -> None:
    config = without(MOE, "num_experts") | {"num_local_experts": 6}
    check_hf_config(config)
    assert num_experts_of(config) == 6


def test_a_head_is_an_equal_part_of_the_hidden_width_unless_the_config_says_otherwise() -> None:
    assert head_dim_of(DENSE | {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 32}) == 32
    for config in (without(DENSE, "head_dim"), DENSE | {"head_dim": None}):
        config |= {"hidden_size": 48, "num_attention_heads": 4}
        check_hf_config(config)
        assert head_dim_of(config) == 12
        assert inverse_frequencies(config, torch.device("cpu")).shape == (6,)
