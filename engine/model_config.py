"""The trainer's fields: the network, how ranks divide it, its optimisation and warm start. Part of `RunConfig` (engine/config.py)."""

import math
from dataclasses import dataclass, field
from typing import Literal


def check(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise ValueError "name is value; rule" unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; {rule}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network is trained: a Hugging Face folder, or a Qwen3 from scratch."""

    path: str | None = None
    """Hugging Face folder (config.json, safetensors, tokenizer). None: a random Qwen3 of the sizes below, with a byte-level tokenizer."""
    num_layers: int = 4
    """Transformer layers (from scratch)."""
    hidden_size: int = 160
    """Width of the residual stream (from scratch)."""
    num_attention_heads: int = 5
    """Query heads (from scratch)."""
    num_key_value_heads: int = 1
    """Key/value heads; divides num_attention_heads (from scratch)."""
    head_dim: int = 32
    """Width of one head (from scratch)."""
    intermediate_size: int = 448
    """Width of the feed-forward layer (from scratch)."""
    num_experts: int = 0
    """Experts per layer; 0 is a dense Qwen3, more a Qwen3-MoE (from scratch)."""
    num_experts_per_tok: int = 2
    """Experts each token is sent to (from scratch)."""
    moe_intermediate_size: int = 128
    """Width of one expert (from scratch)."""
    tie_word_embeddings: bool = True
    """Share the embedding and the output matrix (from scratch)."""
    context_length: int = 256
    """Most tokens of prompt plus response. With `path`: must not exceed the model's max_position_embeddings."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding (from scratch)."""

    def __post_init__(self) -> None:
        sizes = "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"
        for name in (*sizes, "moe_intermediate_size", "context_length"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "it must be at least 1")
        check(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "it must be even: the rotary embedding turns pairs")
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"it must divide model.num_attention_heads ({self.num_attention_heads})",
        )
        check(self.num_experts >= 0, "model.num_experts", self.num_experts, "it must not be negative")
        if self.num_experts:
            check(
                1 <= self.num_experts_per_tok <= self.num_experts,
                "model.num_experts_per_tok",
                self.num_experts_per_tok,
                f"it must lie between 1 and model.num_experts ({self.num_experts})",
            )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the ranks divide the model; what is left over is data parallel."""

    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual pipeline stages per rank (interleaved schedule)."""
    cp: int = 1
    """Context-parallel ranks: parts that a sequence is cut into."""
    ep: int = 1
    """Expert-parallel ranks."""
    etp: int | None = None
    """Tensor-parallel ranks within an expert. None: 1, or tp when ep is 1."""
    sequence_parallel: bool = False
    """Split activations outside attention and MLP over the tp ranks."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep"):
            check(getattr(self, name) >= 1, f"mesh.{name}", getattr(self, name), "it must be at least 1")
        check(self.etp is None or self.etp >= 1, "mesh.etp", self.etp, "it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule over the iterations of the run."""

    lr: float = 1e-6
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0: iterations in reinforcement, optimizer steps in supervised stages."""
    decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay from lr to min_lr after the warm-up."""
    decay_start: float = 0.0
    """Fraction of the schedule after which the decay begins (linear and cosine)."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the second moment. An optimizer that is reset each iteration wants far more than 1e-8."""
    weight_decay: float = 0.0
    """Decoupled weight decay per unit of learning rate."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""

    def __post_init__(self) -> None:
        check(self.lr >= 0, "optimizer.lr", self.lr, "it must not be negative")
        check(0 <= self.min_lr <= max(self.lr, 0), "optimizer.min_lr", self.min_lr, f"it must lie between 0 and lr ({self.lr})")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "it must not be negative")
        check(0 <= self.decay_start <= 1, "optimizer.decay_start", self.decay_start, "it must lie between 0 and 1")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "it must lie in [0, 1)")
        check(self.eps > 0, "optimizer.eps", self.eps, "it must be positive")
        check(self.clip_grad >= 0, "optimizer.clip_grad", self.clip_grad, "it must not be negative (0 turns it off)")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Megatron-core: precision, memory and batching."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; gradients and optimizer state are always float32."""
    microbatch_tokens: int = 4096
    """Most tokens packed into one microbatch on one rank; one longer sequence makes a microbatch of its own."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of attention, or all of a layer."""
    distributed_optimizer: bool = True
    """Split optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs. (Gathering updated weights during the next forward pass is not offered: the
    weights go to the rollout engine after the last update, and the experts' modules, of which Megatron's hooks wait, are not called.)"""
    moe_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts."""
    moe_aux_loss_coef: float = 0.0
    """Weight of the experts' balance loss (DeepSeek-V3's: of every sequence; summed over layers, averaged over sequences)."""
    moe_bias_update_rate: float = 0.0
    """How far each expert's bias moves towards balance after an optimizer step (DeepSeek-V3; models with such biases); 0 keeps them."""
    replay_routing: bool = False
    """Send response tokens to the experts that the rollout engine chose for them, where it recorded them."""
    share_prompts: Literal["auto", "always", "never"] = "auto"
    """The responses of a prompt attend to one copy of it, and are trained on in the same update. auto: prompts of at least 128 tokens,
    in iterations where that saves more than a fifth of the busiest rank's work (layers and attention). An update's gradient is the same
    sum over its rows; expert biases (moe_bias_update_rate) count a shared token once."""
    cp_attention: Literal["auto", "ulysses", "all_gather"] = "auto"
    """How context-parallel ranks (mesh.cp) attend: ulysses, each with a part of the heads to all tokens, or all_gather, each with its own
    tokens to the keys of all. auto: ulysses where tp * cp divides the key/value heads, else all_gather."""
    single_pass_logprobs: bool = False
    """Compute the logits once and their gradient with them where the loss's coefficients are known before (the warm start; the first update
    of an iteration with loss.reference=recompute; all of loss.variant=rest): three products with the output layer in place of four, for a
    gradient of its size that is held from a microbatch's forward to its backward pass. Rounding differs, so runs with and without it do."""
    updates_per_iteration: int = 4
    """Optimizer steps on the responses of one iteration (not given in the paper)."""
    reset_optimizer: bool = True
    """Start every iteration with a fresh optimizer, as the paper does."""
    sleep: Literal["auto", "on", "off"] = "auto"
    """Whether optimizer state, gradients and parameters leave the device while the rollout engines have it: into as much host memory as
    optimizer state and parameters take. With it the engines release memory too (rollout.sglang.release); off: both sides keep what they
    have. auto: on where trainer and engines share GPUs."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is NaN or infinite: end the run, or leave the update out and count it."""
    max_nonfinite_skips: int = 10
    """With on_nonfinite=skip: more updates in a row than this end the run."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check(self.max_nonfinite_skips >= 0, "trainer.max_nonfinite_skips", self.max_nonfinite_skips, "it must not be negative")
        check(self.microbatch_tokens >= 1, "trainer.microbatch_tokens", self.microbatch_tokens, "it must be at least 1")
        check(self.updates_per_iteration >= 1, "trainer.updates_per_iteration", self.updates_per_iteration, "it must be at least 1")
        for name in ("moe_aux_loss_coef", "moe_bias_update_rate"):
            check(getattr(self, name) >= 0, f"trainer.{name}", getattr(self, name), "it must not be negative (0 turns it off)")


@dataclass(frozen=True, kw_only=True)
class SFTStage:
    """One stage of the supervised warm start (2.5.2: 32k tokens, 2e-5 to 2e-6; then 128k, 1e-5 to 1e-6)."""

    steps: int = 0
    """Optimizer steps; 0: as many as `epochs` take."""
    epochs: float = 0.0
    """Passes over the examples; 0: `steps` says how long."""
    batch_tokens: int
    """Tokens per optimizer step over all ranks, prompts included."""
    max_tokens: int
    """Longest example, in tokens; a longer one is an error."""
    optimizer: OptimizerConfig
    """Learning rate and schedule of this stage."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_tokens"):
            check(getattr(self, name) >= 1, f"sft.{name}", getattr(self, name), "it must be at least 1")
        rule = f"steps or epochs must be positive, and the other 0 (epochs is {self.epochs})"
        check(min(self.steps, self.epochs) == 0 and max(self.steps, self.epochs) > 0, "sft.steps", self.steps, rule)

    def num_steps(self, num_tokens: int) -> int:
        """Optimizer steps on examples of `num_tokens` tokens in all."""
        return self.steps or math.ceil(self.epochs * num_tokens / self.batch_tokens)
