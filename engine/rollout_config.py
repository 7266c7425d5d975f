"""How responses are generated, and by which engine. Part of `RunConfig` (engine/config.py)."""

from dataclasses import dataclass, field
from typing import Literal

from tandem.engine.model_config import check

Quantization = Literal["block_fp8"]
"""Of the weights that an engine generates with (engine/quantised.py)."""


@dataclass(frozen=True, kw_only=True)
class RepetitionConfig:
    """When decoding is stopped because a response repeats itself."""

    max_period: int = 64
    """Longest period watched, in tokens; 0 turns the exact test off."""
    min_repeats: int = 8
    """A cycle is a repetition once it was seen this many times in a row."""
    min_tokens: int = 32
    """A cycle must also cover this many tokens, so that short runs of one token pass."""
    ngram: int = 8
    """Length of the n-grams of the statistical test; 0 turns it off."""
    ngram_threshold: float = 20.0
    """The statistical test fires when the running sum of seen-before minus new n-grams passes this."""

    def __post_init__(self) -> None:
        check(self.max_period >= 0, "repetition.max_period", self.max_period, "it must not be negative (0 turns it off)")
        check(self.min_repeats >= 2, "repetition.min_repeats", self.min_repeats, "it must be at least 2")
        check(self.ngram >= 0, "repetition.ngram", self.ngram, "it must not be negative (0 turns it off)")
        check(self.ngram_threshold >= 0, "repetition.ngram_threshold", self.ngram_threshold, "it must not be negative")


@dataclass(frozen=True, kw_only=True)
class SGLangConfig:
    """The SGLang servers, of which each leader rank starts one (rollout.engine=sglang)."""

    python: str | None = None
    """Interpreter of SGLang's environment. None: .sglang/bin/python, which `make sglang` sets up, of this folder or the repository."""
    port: int | None = None
    """Port of the server of a node's first leader, on 127.0.0.1; others add their rank on the node. None: any free one."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds. None: what memory_fraction leaves on a GPU; on a CPU max_batch contexts."""
    memory_fraction: float = 0.8
    """Share of a GPU's memory for SGLang's weights and KV cache, while it has the GPU."""
    release: Literal["auto", "all", "kv_cache", "nothing"] = "auto"
    """What a server gives up of its GPU while the trainer has it: cache, CUDA graphs and weights (all), or the cache alone. Weights are
    lost by it, and sent again by the next swap, which moves all of them anyway. auto: all on a GPU, nothing on a CPU."""
    attention_backend: str | None = None
    """SGLang's --attention-backend. None: its own choice on a GPU, torch_native on a CPU."""
    seed_sampling: bool = True
    """Let a request's seed decide its tokens (--enable-deterministic-inference, some slower). False: SGLang draws as it likes."""
    stream_interval: int = 8
    """Tokens that SGLang sends at a time; more cost less to read, but up to as many per response are thrown away where it is cut."""
    start_timeout_s: float = 900.0
    """Deadline for a server to become healthy, in seconds."""
    health_interval_s: float = 10.0
    """Time between two questions whether a running server still answers, in seconds."""
    health_timeout_s: float = 300.0
    """A server that does not answer such a question for so long is killed and replaced, in seconds: more than its longest step."""
    stall_timeout_s: float = 900.0
    """A server that generates nothing for so long is killed and replaced, in seconds."""
    extra_args: tuple[str, ...] = ()
    """Further arguments of `python -m sglang.launch_server`; on the command line one, as --rollout.sglang.extra_args=--name=value."""

    def __post_init__(self) -> None:
        rule = "it must lie between 1 and 65535, or be None"
        check(self.port is None or 0 < self.port < 1 << 16, "rollout.sglang.port", self.port, rule)
        rule = "it must be at least 1, or None"
        check(self.kv_tokens is None or self.kv_tokens >= 1, "rollout.sglang.kv_tokens", self.kv_tokens, rule)
        check(0 < self.memory_fraction < 1, "rollout.sglang.memory_fraction", self.memory_fraction, "it must lie between 0 and 1")
        check(self.stream_interval >= 1, "rollout.sglang.stream_interval", self.stream_interval, "it must be at least 1")
        for name in ("start_timeout_s", "health_interval_s", "health_timeout_s", "stall_timeout_s"):
            check(getattr(self, name) > 0, f"rollout.sglang.{name}", getattr(self, name), "it must be positive")


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """Engines that die, and nodes that join and leave, while the others go on (rollout.engine=sglang; docs/elastic.md)."""

    enabled: bool = False
    """Let other engines generate what a dead one was generating, and `tandem rollout-node` join. Each leader keeps a copy of the weights in
    host memory. Which engine has a request depends on the moment: responses are reproducible as far as SGLang's are, up to near ties."""
    timeout_s: float = 120.0
    """A rollout-only node that has not taken the weights by then is dropped, in seconds. (One that serves has 10 s for each question.)"""

    def __post_init__(self) -> None:
        check(self.timeout_s > 0, "rollout.elastic.timeout_s", self.timeout_s, "it must be positive")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are generated."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """embedded: the project's own engine for CPUs and debugging. sglang: an SGLang server per leader rank."""
    tp: int = 1
    """Consecutive ranks that share one engine; the first of them leads it."""
    token_budget: int | None = None
    """Output tokens per rollout phase over all ranks; what is unfinished then continues in the next. None: no limit."""
    max_response_tokens: int = 128
    """Longest response over all its segments, in tokens."""
    temperature: float = 1.0
    """Softmax temperature of sampling and of the trained log-probs."""
    top_p: float = 1.0
    """Nucleus sampling: keep the fewest tokens whose probabilities sum to this."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    max_batch: int = 512
    """Most responses that one engine decodes at the same time."""
    quantization: Quantization | None = None
    """Type of the matrices that responses are generated with. block_fp8: 8-bit floats (e4m3) with a scale for each block of 128 x 128, as
    DeepSeek-V3's checkpoints have them, quantised on their way to SGLang. None: that of the trainer's weights."""
    record_routing: bool = False
    """Keep the experts that each sampled token chose, for trainer.replay_routing. Mixtures of experts only."""
    repetition: RepetitionConfig = field(default_factory=RepetitionConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)

    def __post_init__(self) -> None:
        check(not self.elastic.enabled or self.engine == "sglang", "rollout.elastic.enabled", True, "it needs rollout.engine=sglang")
        check(self.tp >= 1, "rollout.tp", self.tp, "it must be at least 1")
        check(self.token_budget is None or self.token_budget >= 1, "rollout.token_budget", self.token_budget, "it must be at least 1")
        check(self.max_response_tokens >= 1, "rollout.max_response_tokens", self.max_response_tokens, "it must be at least 1")
        check(self.temperature > 0, "rollout.temperature", self.temperature, "it must be positive (evaluation is greedy by itself)")
        check(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "it must lie in (0, 1]")
        check(self.top_k >= 0, "rollout.top_k", self.top_k, "it must not be negative (0 keeps all)")
        rule = "it needs rollout.engine=sglang: the embedded engine computes with the trainer's types only"
        check(self.quantization is None or self.engine == "sglang", "rollout.quantization", self.quantization, rule)
        rule = "it needs rollout.elastic.enabled=False: nodes that join take the trainer's types only"
        check(self.quantization is None or not self.elastic.enabled, "rollout.quantization", self.quantization, rule)
        check(self.max_batch >= 1, "rollout.max_batch", self.max_batch, "it must be at least 1")
