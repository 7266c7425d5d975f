"""Tiny Qwen3 models, the rows they are tried on, and their weights under Megatron's names, cut by hand."""

import numpy as np
import torch

from tandem.engine.algo.pack import TrainingRow
from tests.trainer import families
from tests.trainer.families import VOCAB

HIDDEN, LAYERS, GROUPS, EXPERTS = 32, 4, 2, 4


def hf_model(*, moe: bool = False, tied: bool = False) -> torch.nn.Module:
    """See `families.hf_model`."""
    return families.hf_model("qwen3_moe" if moe else "qwen3, tied" if tied else "qwen3")


def training_rows(lengths: list[tuple[int, int]], seed: int = 0) -> list[TrainingRow]:
    """Random rows of (prompt, response) lengths; some tokens are stale or left out of the loss."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, (num_prompt, num_response) in enumerate(lengths):
        on_policy = np.arange(num_response) >= num_response // 3
        rows.append(
            TrainingRow(
                prompt_ids=rng.integers(0, VOCAB, num_prompt).astype(np.int32),
                response_ids=rng.integers(0, VOCAB, num_response).astype(np.int32),
                behaviour_logprobs=-4 * rng.random(num_response).astype(np.float32),
                loss_mask=on_policy if i % 2 else np.ones(num_response, dtype=np.bool_),
                on_policy=on_policy,
                advantage=float(rng.normal()),
                row_id=i,
            )
        )
    return rows


def hf_logprobs(model: torch.nn.Module, row: TrainingRow) -> torch.Tensor:
    """[P + N - 1] log-probs of the next token, each sequence on its own."""
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))
    logits_TV = model(ids[None, :-1]).logits[0]
    return logits_TV.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def megatron_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face names to Megatron's, with the query, key and value rows of a group beside each other; whole tensors."""
    out = {}
    for name, x in tensors.items():
        if name == "model.embed_tokens.weight":
            out["embedding.word_embeddings.weight"] = x
        elif name == "lm_head.weight":
            out["output_layer.weight"] = x
        elif name == "model.norm.weight":
            out["decoder.final_layernorm.weight"] = x
    for i in range(LAYERS):
        hf, mc = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (tensors[f"{hf}self_attn.{x}_proj.weight"].view(GROUPS, -1, HIDDEN) for x in "qkv")
        out[mc + "self_attention.linear_qkv.weight"] = torch.cat([q, k, v], 1).reshape(-1, HIDDEN)
        out[mc + "self_attention.linear_proj.weight"] = tensors[hf + "self_attn.o_proj.weight"]
        for x in "qk":
            out[mc + f"self_attention.{x}_layernorm.weight"] = tensors[hf + f"self_attn.{x}_norm.weight"]
        out[mc + "input_layernorm.weight"] = tensors[hf + "input_layernorm.weight"]
        out[mc + "pre_mlp_layernorm.weight"] = tensors[hf + "post_attention_layernorm.weight"]
        if hf + "mlp.gate.weight" in tensors:
            out[mc + "mlp.router.weight"] = tensors[hf + "mlp.gate.weight"]
            for e in range(EXPERTS):
                expert = mc + f"mlp.experts.local_experts.{e}."
                out[expert + "linear_fc1.weight"] = tensors[hf + "mlp.experts.gate_up_proj"][e]
                out[expert + "linear_fc2.weight"] = tensors[hf + "mlp.experts.down_proj"][e]
        else:
            gate, up = tensors[hf + "mlp.gate_proj.weight"], tensors[hf + "mlp.up_proj.weight"]
            out[mc + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
            out[mc + "mlp.linear_fc2.weight"] = tensors[hf + "mlp.down_proj.weight"]
    return out


def shard(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The part of a Megatron tensor that a tensor-parallel rank holds."""
    if size == 1 or "norm" in name or "router" in name:
        return whole
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0)[rank]
