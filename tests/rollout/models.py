"""Tiny Hugging Face models for rollout tests, and the sender's side of a swap in its shortest form."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xxhash
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tandem.engine.types import BucketEntry, Completion, TensorMeta, WeightSink

VOCAB_SIZE = 64
CONTEXT_LENGTH = 96


def tiny_model(
    kind: str = "qwen3", *, dtype: torch.dtype = torch.float32, seed: int = 0, peaked: bool = True, **changes: Any
) -> PreTrainedModel:
    """A random model. Peaked: with logits so far apart that rounding does not flip a token; else as a fresh model has them.

    `changes` are fields of its configuration.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rope_theta": 10_000.0,
        "initializer_range": 0.2 if peaked else 0.08,
        "tie_word_embeddings": kind == "qwen3",
        "use_sliding_window": False,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes | changes))
    elif kind == "deepseek_v3":
        fields: dict[str, Any] = {"head_dim": 8, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
        fields |= {"v_head_dim": 12, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        fields |= {"moe_intermediate_size": 40, "first_k_dense_replace": 1}
        fields["num_key_value_heads"] = changes.get("num_attention_heads", sizes["num_attention_heads"])
        fields = sizes | fields | changes
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**fields))
    else:
        experts: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
        experts["mlp_only_layers"] = [1]
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | experts | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.to(dtype=dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return model.eval()


def disk_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the names that lie in its safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            block = name.rsplit(".", 1)[0]
            for expert, part in enumerate(tensor):
                if name.endswith("down_proj"):
                    tensors[f"{block}.{expert}.down_proj.weight"] = part
                else:
                    tensors[f"{block}.{expert}.gate_proj.weight"], tensors[f"{block}.{expert}.up_proj.weight"] = part.chunk(2)
        else:
            tensors[name] = tensor
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def metas(tensors: Mapping[str, torch.Tensor]) -> list[TensorMeta]:
    return [TensorMeta(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in tensors.items()]


def buckets(tensors: Mapping[str, torch.Tensor], bucket_bytes: int) -> list[tuple[bytes, list[BucketEntry]]]:
    """Fill buckets in order; a tensor that does not fit is split over several."""
    filled: list[tuple[bytes, list[BucketEntry]]] = []
    data, entries = bytearray(), list[BucketEntry]()
    for name, tensor in tensors.items():
        raw = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        start = 0
        while start < len(raw):
            data.extend(bytes(-len(data) % 256))
            if len(data) >= bucket_bytes:
                filled.append((bytes(data), entries))
                data, entries = bytearray(), []
            part = raw[start : start + bucket_bytes - len(data)]
            entries.append(
                BucketEntry(
                    name=name, tensor_start=start, num_bytes=len(part), bucket_start=len(data), checksum=xxhash.xxh3_64_intdigest(part)
                )
            )
            data.extend(part)
            start += len(part)
    return [*filled, (bytes(data), entries)]


def send(
    engine: WeightSink,
    tensors: Mapping[str, torch.Tensor],
    policy_version: int,
    *,
    bucket_bytes: int = 1 << 15,
    corrupt: Callable[[int, bytearray], None] | None = None,
) -> None:
    """One swap without its commit; `corrupt(bucket number, bytes)` may damage what is sent."""
    engine.prepare(policy_version, metas(tensors))
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="tandem-test-") as file:
        for number, (data, entries) in enumerate(buckets(tensors, bucket_bytes)):
            damaged = bytearray(data)
            if corrupt:
                corrupt(number, damaged)
            file.seek(0)
            file.write(damaged)
            file.flush()
            engine.load(file.name, entries)


def serve(engine: WeightSink, model: PreTrainedModel, policy_version: int = 0) -> None:
    """A whole swap."""
    send(engine, disk_tensors(model), policy_version)
    engine.commit()
    engine.settle()


def reference_logprobs(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """[len(response)] log-probs of the response's tokens under softmax(logits / temperature)."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].float() / temperature
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def by_id(completions: Sequence[Completion]) -> dict[str, Completion]:
    return {completion.request_id: completion for completion in completions}


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
