"""The name map against a cut of the full model written out by hand."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tandem.engine.checkpoint.names import NameMap
from tandem.engine.types import WeightShard

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


def random_hf_state(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """A random state dict under the names that transformers writes to disk."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key_value = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        for name, rows in (("q", query), ("k", key_value), ("v", key_value)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in "qk":
            shapes[f"{prefix}self_attn.{name}_norm.weight"] = (head,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, query)
        moe = config["model_type"] == "qwen3_moe" and layer not in config["mlp_only_layers"]
        if moe:
            shapes[f"{prefix}mlp.gate.weight"] = (config["num_experts"], hidden)
        size = config["moe_intermediate_size"] if moe else config["intermediate_size"]
        for expert in [f"experts.{e}." for e in range(config["num_experts"])] if moe else [""]:
            for name in ("gate", "up"):
                shapes[f"{prefix}mlp.{expert}{name}_proj.weight"] = (size, hidden)
            shapes[f"{prefix}mlp.{expert}down_proj.weight"] = (hidden, size)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def megatron_shards(config: dict[str, Any], state: dict[str, torch.Tensor], tp: int, pp: int, ep: int, etp: int) -> list[list[WeightShard]]:
    """Every rank's shards, cut by hand: ranks are (pp stage, tp rank, ep rank, etp rank), and the first pp·tp hold the dense part."""
    groups, head = config["num_key_value_heads"], config["head_dim"]
    hidden, per_group = config["hidden_size"], config["num_attention_heads"] // groups * head
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
                q, k, v = (state[f"{h}self_attn.{x}_proj.weight"] for x in "qkv")
                interleaved = [
                    x
                    for g in range(groups)
                    for x in (q[g * per_group : (g + 1) * per_group], *(y[g * head : (g + 1) * head] for y in (k, v)))
                ]
                shards += [
                    (f"{m}self_attention.linear_qkv.weight", torch.cat(interleaved).chunk(tp)[t]),
                    (f"{m}self_attention.linear_proj.weight", state[f"{h}self_attn.o_proj.weight"].chunk(tp, 1)[t]),
                    (f"{m}self_attention.q_layernorm.weight", state[f"{h}self_attn.q_norm.weight"]),
                    (f"{m}self_attention.k_layernorm.weight", state[f"{h}self_attn.k_norm.weight"]),
                    (f"{m}input_layernorm.weight", state[f"{h}input_layernorm.weight"]),
                    (f"{m}pre_mlp_layernorm.weight", state[f"{h}post_attention_layernorm.weight"]),
                ]
                if f"{h}mlp.gate.weight" in state:
                    shards.append((f"{m}mlp.router.weight", state[f"{h}mlp.gate.weight"]))
                else:
                    gate, up = (state[f"{h}mlp.{x}_proj.weight"].chunk(tp)[t] for x in ("gate", "up"))
                    shards.append((f"{m}mlp.linear_fc1.weight", torch.cat([gate, up])))
                    shards.append((f"{m}mlp.linear_fc2.weight", state[f"{h}mlp.down_proj.weight"].chunk(tp, 1)[t]))
            ranks.append([WeightShard(name=name, tensor=tensor.clone(), tp_rank=t, tp_size=tp) for name, tensor in shards])
        for e in range(ep if config["model_type"] == "qwen3_moe" else 0):
            for t in range(etp):
                shards = []
                for layer in layer_of(stage):
                    for expert in range(config["num_experts"]):
                        m, h = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.", f"model.layers.{layer}.mlp.experts.{expert}."
                        if expert * ep // config["num_experts"] == e and f"{h}down_proj.weight" in state:
                            gate, up = (state[f"{h}{x}_proj.weight"].chunk(etp)[t] for x in ("gate", "up"))
                            shards.append((f"{m}linear_fc1.weight", torch.cat([gate, up])))
                            shards.append((f"{m}linear_fc2.weight", state[f"{h}down_proj.weight"].chunk(etp, 1)[t]))
                ranks.append([WeightShard(name=name, tensor=tensor.clone(), tp_rank=t, tp_size=etp) for name, tensor in shards])
    return ranks


LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1), (2, 2, 2, 1), (4, 2, 2, 2), (8, 1, 4, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "config", [DENSE, DENSE | {"tie_word_embeddings": True, "num_key_value_heads": 2}, MOE], ids=["dense", "tied", "moe"]
)
def test_export_then_import_is_bitwise_over_layouts(config: dict[str, Any], layout: tuple[int, int, int, int]):
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


def test_names_and_shapes_are_those_that_transformers_saves(tmp_path):
    from safetensors import safe_open
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {key: value for key, value in MOE.items() if key != "model_type"}
    tied: dict[str, Any] = sizes | {"tie_word_embeddings": True}
    models = [Qwen3ForCausalLM(Qwen3Config(**tied)), Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))]
    for model in models:
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {meta.name: meta.shape for meta in NameMap(model.config.to_dict()).tensors(torch.float32)} == on_disk
