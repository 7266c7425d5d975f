"""What the rest must know of a model, read once from its Hugging Face config.json.

The trainer's layers, the name map and the embedded rollout engine build the same network from the same fields, so the parse lies below
all of them: it imports nothing of ours but the configuration's `check`. Defaults of absent fields, and their spellings in
transformers 4 and 5, are those of the transformers config class of the model type; transformers is imported only while one is parsed.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tandem.engine.config import check

# Kimi-K2 names a type of its own for DeepSeek-V3's layers.
TRANSFORMERS_TYPE = {
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "llama": "llama",
    "qwen2": "qwen2",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
}
# How the name of a reward model's class in config.json's `architectures` ends.
SCORE_HEAD = "ForSequenceClassification"
# Fields of config.json without which a model is not known; transformers' defaults for them are those of one published size.
NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "rms_norm_eps"),
)
NEEDED_OF: Mapping[str, tuple[str, ...]] = {
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads",),
    "qwen3_moe": ("num_key_value_heads", "num_experts_per_tok", "moe_intermediate_size"),
    "deepseek_v3": (
        *("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor"),
        *("first_k_dense_replace", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ),
}
# Where the number of experts stands: on the hub, and as transformers 5 writes it.
NUM_EXPERTS = {"qwen3_moe": ("num_experts", "num_local_experts"), "deepseek_v3": ("n_routed_experts", "num_local_experts")}
# What the layers compute, where a config could ask for something else.
PLAIN: Mapping[str, object] = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    # of DeepSeek's own code
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# transformers (and DeepSeek's own code) give the norms of the latents this eps, whatever rms_norm_eps is.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary embedding: a token at position p is rotated by the angles p * inverse_frequencies; cos and sin are scaled."""

    inverse_frequencies: tuple[float, ...]  # fp32 values; half as many as rotated dimensions
    attention_scaling: float  # factor of cos and sin
    interleaved: bool  # pairs are (x[2i], x[2i+1]), not (x[i], x[i + D/2])

    def inverse_frequencies_D(self, device: torch.device) -> torch.Tensor:
        """[D/2] fp32."""
        return torch.tensor(self.inverse_frequencies, dtype=torch.float32, device=device)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Sizes of DeepSeek's multi-head latent attention (arXiv:2412.19437, 2.1.1)."""

    q_lora_rank: int | None  # None: queries are projected in one step
    kv_lora_rank: int
    qk_nope_head_dim: int  # of a query's or key's part without position
    qk_rope_head_dim: int  # of the rotated part; all heads share that of the key
    v_head_dim: int
    norm_eps: float = LATENT_NORM_EPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture-of-experts layer: sizes, and how its router chooses and weighs experts."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int  # of the shared experts together; 0 without
    scoring: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool  # divide the chosen experts' scores by their sum
    num_groups: int  # of equally many experts each; 1 chooses among all
    num_groups_per_tok: int  # the groups, by their two best experts, that a token may choose from
    routed_scaling_factor: float
    has_expert_bias: bool  # added to the scores for the choice, not for the weights (e_score_correction_bias, fp32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The network of one model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    intermediate_size: int  # of a dense feed-forward layer
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool  # biases of the query, key and value projections
    qk_norm: bool  # RMSNorm of every query and key head
    rope: Rope
    softmax_scale: float
    sparse_layers: tuple[bool, ...]  # True where a layer is a mixture of experts
    latent: LatentAttention | None = None
    experts: Experts | None = None  # None: no layer is sparse
    has_score_head: bool = False  # a reward model: one number per sequence in place of next-token logits

    @property
    def num_experts(self) -> int:
        """Experts per sparse layer; 0 for a dense model."""
        return self.experts.num_experts if self.experts is not None else 0

    @property
    def v_head_dim(self) -> int:
        """Width of a value head."""
        return self.latent.v_head_dim if self.latent is not None else self.head_dim

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> "Architecture":
        """Read a config.json.

        Raises: ValueError naming the field, its value and the rule, for a model that the project does not compute.
        """
        config = _transformers_config(hf_config)
        family = TRANSFORMERS_TYPE[hf_config["model_type"]]
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            check(getattr(config, name) >= 1, name, getattr(config, name), "it must be at least 1")
        rule = f"it must divide num_attention_heads ({heads})"
        check(heads % config.num_key_value_heads == 0, "num_key_value_heads", config.num_key_value_heads, rule)
        latent = _latent(config) if family == "deepseek_v3" else None
        head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim if latent is not None else _head_dim(config)
        rotated = latent.qk_rope_head_dim if latent is not None else head_dim
        where = "head_dim" if latent is None else "qk_rope_head_dim"
        check(rotated % 2 == 0, where, rotated, "it must be even: the rotary embedding turns pairs")
        sparse = _sparse_layers(family, config)
        has_score_head = any(name.endswith(SCORE_HEAD) for name in hf_config.get("architectures") or ())
        rule = "a reward model gives one score"
        check(not has_score_head or config.num_labels == 1, "num_labels", config.num_labels, rule)
        return cls(
            model_type=hf_config["model_type"],
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=bool(config.tie_word_embeddings) and not has_score_head,  # there is nothing to tie the embedding to
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            rope=_rope(config, rotated, interleaved=family == "deepseek_v3" and bool(config.rope_interleave)),
            softmax_scale=head_dim**-0.5 * (_latent_mscale(config.rope_parameters) if latent is not None else 1.0),
            sparse_layers=sparse,
            latent=latent,
            experts=_experts(family, config) if any(sparse) else None,
            has_score_head=has_score_head,
        )


def _transformers_config(hf_config: Mapping[str, Any]) -> Any:
    """transformers' config object, after the checks of what it would accept, ignore or fill in."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(hf_config.get("model_type"))
    check(model_type in TRANSFORMERS_TYPE, "model_type", model_type, f"known are {', '.join(TRANSFORMERS_TYPE)}")
    family = TRANSFORMERS_TYPE[model_type]
    missing = [name for name in NEEDED + NEEDED_OF.get(family, ()) if hf_config.get(name) is None]
    if family in NUM_EXPERTS and all(hf_config.get(name) is None for name in NUM_EXPERTS[family]):
        missing.append(" (or ".join(NUM_EXPERTS[family]) + ")")
    if family == "deepseek_v3" and "q_lora_rank" not in hf_config:
        missing.append("q_lora_rank (null where queries are projected in one step)")
    if missing:
        raise ValueError(f"the config of the {model_type} model lacks {', '.join(missing)}; add what its weights were trained with")
    for name, plain in PLAIN.items():
        if hf_config.get(name) is not None and hf_config[name] != plain:
            raise ValueError(f"{name} is {hf_config[name]!r}; only {name}={plain!r} is computed here, take a model with that")
    if "sliding_attention" in (hf_config.get("layer_types") or ()):
        raise ValueError("layer_types holds 'sliding_attention'; every layer attends to the whole context here, take a model that does")
    if hf_config.get("quantization_config") is not None:
        method = hf_config["quantization_config"].get("quant_method")
        raise ValueError(f"quantization_config is {method!r}; weights are trained as they are, convert the model to bfloat16 first")
    _check_rope_fields(hf_config)
    try:
        return CONFIG_MAPPING[family].from_dict(copy.deepcopy(dict(hf_config)))  # it writes into nested dictionaries
    except (StrictDataclassError, KeyError, ValueError) as error:
        raise ValueError(f"transformers refuses the config of the {model_type} model; correct it: {error}") from error


def _check_rope_fields(hf_config: Mapping[str, Any]) -> None:
    parameters = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    check(kind in ROPE_TYPES, "rope_type", kind, f"computed are {', '.join(ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor", 1.0)
    check(partial == 1.0, "rope_parameters.partial_rotary_factor", partial, "only whole heads are rotated here, take a model with 1.0")
    if parameters.get("rope_theta", hf_config.get("rope_theta")) is None:
        raise ValueError("the model's config has neither rope_theta nor rope_parameters.rope_theta; add one of them")


def _head_dim(config: Any) -> int:
    """Width of one head. Where config.json names none it is the family's default, or an equal part of the hidden width."""
    head_dim = config.to_dict().get("head_dim")
    if head_dim is None:
        rule = f"it must be a multiple of num_attention_heads ({config.num_attention_heads}), or head_dim must be given"
        check(config.hidden_size % config.num_attention_heads == 0, "hidden_size", config.hidden_size, rule)
        head_dim = config.hidden_size // config.num_attention_heads
    check(head_dim >= 1, "head_dim", head_dim, "it must be at least 1")
    return head_dim


def _rope(config: Any, rotated: int, *, interleaved: bool) -> Rope:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind == "default":  # transformers leaves the plain one to each model
        exponent = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
        frequencies, scaling = 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Rope(inverse_frequencies=tuple(frequencies.tolist()), attention_scaling=float(scaling), interleaved=interleaved)


def _latent(config: Any) -> LatentAttention:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        check(getattr(config, name) >= 1, name, getattr(config, name), "it must be at least 1")
    rule = f"latent attention has one key head per query head, so it must be num_attention_heads ({config.num_attention_heads})"
    check(config.num_key_value_heads == config.num_attention_heads, "num_key_value_heads", config.num_key_value_heads, rule)
    return LatentAttention(
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
    )


def _latent_mscale(rope_parameters: Mapping[str, Any]) -> float:
    """YaRN's temperature on the softmax, which DeepSeek puts there by mscale_all_dim: (0.1 m ln(factor) + 1)², 1 without."""
    mscale, factor = rope_parameters.get("mscale_all_dim"), rope_parameters.get("factor")
    if rope_parameters["rope_type"] == "default" or not mscale or factor is None or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


def _sparse_layers(family: str, config: Any) -> tuple[bool, ...]:
    layers = range(config.num_hidden_layers)
    if family == "qwen3_moe":
        check(config.decoder_sparse_step >= 1, "decoder_sparse_step", config.decoder_sparse_step, "it must be at least 1")
        return tuple(i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0 for i in layers)
    if family == "deepseek_v3":
        return tuple(i >= config.first_k_dense_replace for i in layers)
    return (False,) * len(layers)


def _experts(family: str, config: Any) -> Experts:
    is_deepseek = family == "deepseek_v3"
    experts = Experts(
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        shared_intermediate_size=config.n_shared_experts * config.moe_intermediate_size if is_deepseek else 0,
        scoring="sigmoid" if is_deepseek else "softmax",
        norm_topk_prob=bool(config.norm_topk_prob),
        num_groups=config.n_group if is_deepseek else 1,
        num_groups_per_tok=config.topk_group if is_deepseek else 1,
        routed_scaling_factor=config.routed_scaling_factor if is_deepseek else 1.0,
        has_expert_bias=is_deepseek,
    )
    name, number = NUM_EXPERTS[family][0], experts.num_experts
    check(number >= 1, name, number, "it must be at least 1")
    check(experts.intermediate_size >= 1, "moe_intermediate_size", experts.intermediate_size, "it must be at least 1")
    check(not is_deepseek or config.n_shared_experts >= 1, "n_shared_experts", experts.shared_intermediate_size, "it must be at least 1")
    groups, chosen = experts.num_groups, experts.num_groups_per_tok
    check(groups >= 1 and number % groups == 0, "n_group", groups, f"it must divide {name} ({number})")
    # A group is judged by its two best experts.
    check(not is_deepseek or number // groups >= 2, "n_group", groups, f"it must leave each group at least 2 of {number} experts")
    check(1 <= chosen <= groups, "topk_group", chosen, f"it must lie between 1 and n_group ({groups})")
    most = chosen * (number // groups)
    rule = f"it must lie between 1 and the experts that a token may choose from ({most})"
    check(1 <= experts.num_experts_per_tok <= most, "num_experts_per_tok", experts.num_experts_per_tok, rule)
    return experts
