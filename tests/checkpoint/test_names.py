"""The name map against a cut of the full model written out by hand."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tandem.engine.checkpoint.names import NameMap
from tandem.engine.types import WeightShard
from tests.trainer.families import FAMILIES, hf_model

DENSE = {
    "model_type": "qwen3",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "intermediate_size": 40,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
MOE = DENSE | {
    **{"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]},
}
DEEPSEEK = DENSE | {
    **{"model_type": "deepseek_v3", "num_key_value_heads": 8, "q_lora_rank": 10, "kv_lora_rank": 12},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    **{"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 2},
    **{"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
}
CONFIGS = {
    "qwen3": DENSE,
    "qwen3, tied": DENSE | {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "qwen3_moe": MOE,
    "llama": DENSE | {"model_type": "llama"},
    "llama, tied": DENSE | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": DENSE | {"model_type": "qwen2", "num_key_value_heads": 2},
    "deepseek_v3": DEEPSEEK,
    "moonlight": DEEPSEEK | {"q_lora_rank": None, "tie_word_embeddings": True},
}


def _sparse(config: dict[str, Any], layer: int) -> bool:
    if config["model_type"] == "deepseek_v3":
        return layer >= config["first_k_dense_replace"]
    return config["model_type"] == "qwen3_moe" and layer not in config["mlp_only_layers"]


def _attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of one layer, without the output projection."""
    hidden, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    if config["model_type"] != "deepseek_v3":
        head = config["head_dim"]
        rows = {"q": heads * head, "k": groups * head, "v": groups * head}
        shapes: dict[str, tuple[int, ...]] = {f"{name}_proj.weight": (size, hidden) for name, size in rows.items()}
        if config["model_type"] == "qwen2":
            shapes |= {f"{name}_proj.bias": (size,) for name, size in rows.items()}
        return shapes | ({f"{name}_norm.weight": (head,) for name in "qk"} if config["model_type"].startswith("qwen3") else {})
    q_rank, kv_rank, rotated = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    query = heads * (config["qk_nope_head_dim"] + rotated)
    queries = {"q_a_proj": (q_rank, hidden), "q_a_layernorm": (q_rank,), "q_b_proj": (query, q_rank)}
    of_keys = {
        "kv_a_proj_with_mqa": (kv_rank + rotated, hidden),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), kv_rank),
    }
    return {f"{name}.weight": shape for name, shape in ({**(queries if q_rank else {"q_proj": (query, hidden)}), **of_keys}).items()}


def random_hf_state(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """A random state dict under the names that transformers writes to disk."""
    generator = torch.Generator().manual_seed(seed)
    hidden, deepseek = config["hidden_size"], config["model_type"] == "deepseek_v3"
    attended = config["num_attention_heads"] * config["v_head_dim" if deepseek else "head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        shapes |= {f"{prefix}self_attn.{name}": shape for name, shape in _attention_shapes(config).items()}
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, attended)
        blocks = {"": config["intermediate_size"]}
        if _sparse(config, layer):
            num_experts, width = config["n_routed_experts" if deepseek else "num_experts"], config["moe_intermediate_size"]
            shapes[f"{prefix}mlp.gate.weight"] = (num_experts, hidden)
            blocks = {f"experts.{e}.": width for e in range(num_experts)}
            if deepseek:
                shapes[f"{prefix}mlp.gate.e_score_correction_bias"] = (num_experts,)
                blocks["shared_experts."] = config["n_shared_experts"] * width
        for block, size in blocks.items():
            for name in ("gate", "up"):
                shapes[f"{prefix}mlp.{block}{name}_proj.weight"] = (size, hidden)
            shapes[f"{prefix}mlp.{block}down_proj.weight"] = (hidden, size)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _cut_attention(config: dict[str, Any], state: dict[str, torch.Tensor], h: str, t: int, tp: int) -> dict[str, torch.Tensor]:
    """Names within self_attention, and what tensor-parallel rank t holds."""
    state = {name.removeprefix(f"{h}self_attn."): tensor for name, tensor in state.items() if name.startswith(f"{h}self_attn.")}
    out = {"linear_proj.weight": state["o_proj.weight"].chunk(tp, 1)[t]}
    if config["model_type"] == "deepseek_v3":
        whole = {"q_a_proj": "linear_q_down_proj", "kv_a_proj_with_mqa": "linear_kv_down_proj"}
        whole |= {"q_a_layernorm": "q_layernorm", "kv_a_layernorm": "kv_layernorm"}
        by_head = {"q_proj": "linear_q_proj", "q_b_proj": "linear_q_up_proj", "kv_b_proj": "linear_kv_up_proj"}
        out |= {f"{mc}.weight": state[f"{hf}.weight"] for hf, mc in whole.items() if f"{hf}.weight" in state}
        return out | {f"{mc}.weight": state[f"{hf}.weight"].chunk(tp)[t] for hf, mc in by_head.items() if f"{hf}.weight" in state}
    groups, head = config["num_key_value_heads"], config["head_dim"]
    per_group = config["num_attention_heads"] // groups * head
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in state:
            q, k, v = (state[f"{x}_proj.{kind}"] for x in "qkv")
            interleaved = [
                x for g in range(groups) for x in (q[g * per_group : (g + 1) * per_group], *(y[g * head : (g + 1) * head] for y in (k, v)))
            ]
            out[f"linear_qkv.{kind}"] = torch.cat(interleaved).chunk(tp)[t]
    return out | {f"{x}_layernorm.weight": state[f"{x}_norm.weight"] for x in "qk" if f"{x}_norm.weight" in state}


def _cut_feed_forward(state: dict[str, torch.Tensor], h: str, t: int, size: int) -> dict[str, torch.Tensor]:
    gate, up = (state[f"{h}{x}_proj.weight"].chunk(size)[t] for x in ("gate", "up"))
    return {"linear_fc1.weight": torch.cat([gate, up]), "linear_fc2.weight": state[f"{h}down_proj.weight"].chunk(size, 1)[t]}


def megatron_shards(config: dict[str, Any], state: dict[str, torch.Tensor], tp: int, pp: int, ep: int, etp: int) -> list[list[WeightShard]]:
    """Every rank's shards, cut by hand: ranks are (pp stage, tp rank, ep rank, etp rank), and the first pp·tp hold the dense part."""
    hidden, num_experts = config["hidden_size"], config.get("num_experts", config.get("n_routed_experts", 0))
    num_layers = config["num_hidden_layers"]

    def layer_of(stage: int) -> Iterator[int]:
        return (layer for layer in range(num_layers) if layer * pp // num_layers == stage)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        rows = -(-tensor.shape[0] // tp) * tp
        return torch.cat([tensor, torch.zeros(rows - tensor.shape[0], hidden)])

    ranks = []
    for stage in range(pp):
        for t in range(tp):
            shards: list[tuple[str, torch.Tensor]] = []
            if stage == 0:
                shards.append(("embedding.word_embeddings.weight", padded(state["model.embed_tokens.weight"]).chunk(tp)[t]))
            if stage == pp - 1:
                shards.append(("decoder.final_layernorm.weight", state["model.norm.weight"]))
                if not config["tie_word_embeddings"]:
                    shards.append(("output_layer.weight", padded(state["lm_head.weight"]).chunk(tp)[t]))
                elif pp > 1:
                    shards.append(("output_layer.weight", padded(state["model.embed_tokens.weight"]).chunk(tp)[t]))
            for layer in layer_of(stage):
                m, h = f"decoder.layers.{layer}.", f"model.layers.{layer}."
                parts = {
                    "input_layernorm.weight": state[f"{h}input_layernorm.weight"],
                    "pre_mlp_layernorm.weight": state[f"{h}post_attention_layernorm.weight"],
                } | {f"self_attention.{name}": tensor for name, tensor in _cut_attention(config, state, h, t, tp).items()}
                feed_forward = {"mlp.": f"{h}mlp."}
                if f"{h}mlp.gate.weight" in state:
                    parts["mlp.router.weight"] = state[f"{h}mlp.gate.weight"]
                    feed_forward = {}
                if f"{h}mlp.gate.e_score_correction_bias" in state:
                    parts["mlp.router.expert_bias"] = state[f"{h}mlp.gate.e_score_correction_bias"]
                    feed_forward = {"mlp.shared_experts.": f"{h}mlp.shared_experts."}
                for mc, hf in feed_forward.items():
                    parts |= {f"{mc}{name}": tensor for name, tensor in _cut_feed_forward(state, hf, t, tp).items()}
                shards += [(f"{m}{name}", tensor) for name, tensor in parts.items()]
            ranks.append([WeightShard(name=name, tensor=tensor.clone(), tp_rank=t, tp_size=tp) for name, tensor in shards])
        for e in range(ep if num_experts else 0):
            for t in range(etp):
                shards = []
                for layer in layer_of(stage):
                    for expert in range(num_experts):
                        m, h = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.", f"model.layers.{layer}.mlp.experts.{expert}."
                        if expert * ep // num_experts == e and f"{h}down_proj.weight" in state:
                            shards += [(f"{m}{name}", tensor) for name, tensor in _cut_feed_forward(state, h, t, etp).items()]
                ranks.append([WeightShard(name=name, tensor=tensor.clone(), tp_rank=t, tp_size=etp) for name, tensor in shards])
    return ranks


LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1), (2, 2, 2, 1), (4, 2, 2, 2), (8, 1, 4, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_export_then_import_is_bitwise_over_layouts(family: str, layout: tuple[int, int, int, int]):
    config = CONFIGS[family]
    state = random_hf_state(config, seed=1)
    names = NameMap(config)
    ranks = megatron_shards(config, state, *layout)
    exported = {meta.name: torch.full(meta.shape, torch.nan) for meta in names.tensors(torch.float32)}
    for shard in (shard for shards in ranks for shard in shards):
        for view in names.views(shard):
            view.copy_to(exported[view.name][tuple(slice(*bounds) for bounds in view.region)])
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)

    for shard in (shard for shards in ranks for shard in shards):
        original = shard.tensor.clone()
        shard.tensor.zero_()
        for view in names.views(shard):
            view.copy_from(state[view.name][tuple(slice(*bounds) for bounds in view.region)])
        assert torch.equal(shard.tensor, original), shard.name


def test_rows_of_a_grouped_view_are_the_rows_of_the_region():
    state = random_hf_state(DENSE, seed=2)
    names = NameMap(DENSE)
    shard = next(shard for shard in megatron_shards(DENSE, state, 2, 1, 1, 1)[1] if "linear_qkv" in shard.name)
    draw = random.Random(0)
    for view in names.views(shard):
        whole = state[view.name][slice(*view.region[0])]
        for _ in range(50):
            start, stop = sorted(draw.choices(range(whole.shape[0] + 1), k=2))
            parts = list(view.rows(start, stop))
            assert [bound for a, b, _ in parts for bound in (a, b)] == sorted(bound for a, b, _ in parts for bound in (a, b))
            got = torch.cat([part.reshape(-1, whole.shape[1]) for _, _, part in parts]) if parts else whole[:0]
            assert torch.equal(got, whole[start:stop])


def test_an_unknown_model_type_names_the_known_ones():
    with pytest.raises(ValueError, match="model_type is 'gpt2'; known are qwen3, qwen3_moe"):
        NameMap({"model_type": "gpt2"})


@pytest.mark.parametrize("name", ["decoder.layers.3.input_layernorm.weight", "decoder.layers.0.mlp.router.weight", "value_head.weight"])
def test_a_parameter_outside_the_map_is_an_error(name: str):
    with pytest.raises(ValueError, match="has no parameter"):
        NameMap(DENSE).views(WeightShard(name=name, tensor=torch.zeros(24), tp_rank=0, tp_size=1))


def test_a_wrong_local_shape_names_parameter_and_shapes():
    shard = WeightShard(name="decoder.layers.0.self_attention.linear_proj.weight", tensor=torch.zeros(24, 20), tp_rank=0, tp_size=2)
    with pytest.raises(ValueError, match=r"linear_proj.*\(24, 20\).*\(24, 24\)"):
        NameMap(DENSE).views(shard)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_types_are_those_that_transformers_saves(family: str, tmp_path: Path):
    model = hf_model(family).bfloat16()
    for name, buffer in model.named_buffers():  # as from_pretrained leaves it
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = {name: (tuple(x.shape), x.dtype) for name in file.keys() for x in [file.get_tensor(name)]}  # noqa: SIM118
    assert {meta.name: (meta.shape, meta.dtype) for meta in NameMap(model.config.to_dict()).tensors(torch.bfloat16)} == on_disk
