"""Every field of a run, one frozen dataclass per component. A recipe returns a `RunConfig`.

The text under a field is what `tandem train RECIPE --help` prints. Each class checks itself: an error names the field, the
value and the rule. What several fields, the model and the ranks must fulfil together is in `engine/feasibility.py`.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tandem.engine.model_config import MeshConfig, ModelConfig, SFTStage, TrainerConfig, check
from tandem.engine.model_config import OptimizerConfig as OptimizerConfig  # recipes find every class here
from tandem.engine.rollout_config import ElasticConfig as ElasticConfig
from tandem.engine.rollout_config import RepetitionConfig as RepetitionConfig
from tandem.engine.rollout_config import RolloutConfig
from tandem.engine.rollout_config import SGLangConfig as SGLangConfig
from tandem.engine.task_config import ArithmeticTask as ArithmeticTask
from tandem.engine.task_config import ProgramTask as ProgramTask

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The policy loss and the advantages it weighs."""

    variant: Literal["mirror_descent", "grpo", "ppo_clip", "gspo", "rest", "token_level"] = "mirror_descent"
    """mirror_descent: Kimi k1.5's squared surrogate on summed log-probs. grpo, ppo_clip: clipped token ratios. gspo: clipped sequence
    ratio. rest: fit correct responses only. token_level: token ratios clipped whatever the sign, with a squared log-ratio."""
    tau: float = 0.1
    """Weight of the squared log-ratio to the iteration's reference (mirror_descent, token_level; not given in the paper)."""
    baseline: Literal["mean", "log_mean_exp"] = "mean"
    """What is subtracted from a reward: the group's mean, or tau*log(mean(exp(reward/tau)))."""
    clip_low: float = 0.2
    """Ratio clip below 1 (grpo, ppo_clip, gspo, token_level)."""
    clip_high: float = 0.2
    """Ratio clip above 1 (grpo, ppo_clip, gspo, token_level)."""
    reference: Literal["recompute", "rollout"] = "recompute"
    """Log-probs of the policy at the iteration's start: computed by the trainer, or taken from the rollout."""
    stale_segments: Literal["mask", "train", "correct"] = "mask"
    """Tokens of earlier policies: left out of the loss, trained as they are, or weighted by a truncated importance ratio."""
    importance_cap: float = 2.0
    """Upper bound of the importance ratio (stale_segments=correct, reference=rollout)."""
    scale: float = 1.0
    """The loss is multiplied by this; matters where it meets optimizer.eps or clip_grad."""

    def __post_init__(self) -> None:
        check(self.tau >= 0, "loss.tau", self.tau, "it must not be negative")
        check(self.baseline != "log_mean_exp" or self.tau > 0, "loss.tau", self.tau, "baseline=log_mean_exp divides by it; set it above 0")
        check(0 <= self.clip_low < 1, "loss.clip_low", self.clip_low, "it must lie in [0, 1)")
        check(self.clip_high >= 0, "loss.clip_high", self.clip_high, "it must not be negative")
        check(self.importance_cap > 0, "loss.importance_cap", self.importance_cap, "it must be positive")


@dataclass(frozen=True, kw_only=True)
class LengthPenaltyConfig:
    """The length reward of the paper (2.3.3), added to the reward with a weight that warms up."""

    weight: float = 0.0
    """Final weight of the length reward; 0 turns it off (not given in the paper)."""
    start_step: int = 0
    """First iteration with a length reward (not given in the paper)."""
    warmup_steps: int = 1
    """Iterations over which the weight rises linearly to its final value."""

    def __post_init__(self) -> None:
        check(self.weight >= 0, "length_penalty.weight", self.weight, "it must not be negative")
        check(self.start_step >= 0, "length_penalty.start_step", self.start_step, "it must not be negative")
        check(self.warmup_steps >= 1, "length_penalty.warmup_steps", self.warmup_steps, "it must be at least 1")

    def weight_at(self, step: int) -> float:
        """The weight of the length reward in iteration `step`."""
        return self.weight * min(1.0, max(0, step - self.start_step + 1) / self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts come from."""

    prompts: str | None = None
    """JSONL file to train on: fields question|problem|prompt, answer; optional id, domain, level, grading. None: prompts of `task`."""
    eval_prompts: str | None = None
    """JSONL file of held-out prompts for pass@1. None: the test set of `task`, or no evaluation when `prompts` is given."""
    sft: str | None = None
    """JSONL file (prompt, response) of the warm start. None: the examples of `task`, or no warm start when `model.path` is given."""
    preferences: str | None = None
    """JSONL file (prompt, chosen, rejected, optionally margin) of a reward model. None: the pairs of `task`."""
    eval_preferences: str | None = None
    """JSONL file of held-out pairs. None: the test set of `task`, or none when `preferences` is given."""
    prompt_template: str = "{question}"
    """Text given to the tokenizer; {question} is replaced by the prompt."""
    use_chat_template: bool = False
    """Wrap the prompt as a user turn in the tokenizer's chat template."""
    max_prompt_tokens: int | None = None
    """Prompts with more tokens are an error or skipped (see long_prompts). None: what leaves one token of the context for the response."""
    long_prompts: Literal["error", "skip"] = "error"
    """What happens to a prompt that is too long."""
    task: ArithmeticTask | ProgramTask = field(default_factory=ArithmeticTask)
    """The generated task, where no files are given. Its kind is the recipe's."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which prompts are drawn, and how many responses each gets."""

    groups_in_flight: int = 64
    """Prompts worked on in one iteration over all ranks, resumed ones included."""
    num_samples: int = 8
    """Responses per prompt, the paper's k."""
    prioritised: bool = True
    """Draw prompt i with probability proportional to 1 - s_i, its success rate (2.3.4). False: uniformly."""
    priority_floor: float = 0.02
    """Added to 1 - s_i, so that a solved prompt is still seen now and then."""
    success_decay: float = 0.5
    """Weight of the newest success rate in a prompt's running mean; 1 keeps only the newest."""
    curriculum_steps: int = 0
    """Iterations over which the highest allowed level rises from the lowest to all; 0 allows all from the start."""

    def __post_init__(self) -> None:
        check(self.groups_in_flight >= 1, "sampling.groups_in_flight", self.groups_in_flight, "it must be at least 1")
        check(self.num_samples >= 1, "sampling.num_samples", self.num_samples, "it must be at least 1")
        check(self.priority_floor >= 0, "sampling.priority_floor", self.priority_floor, "it must not be negative")
        check(0 < self.success_decay <= 1, "sampling.success_decay", self.success_decay, "it must lie in (0, 1]")
        check(self.curriculum_steps >= 0, "sampling.curriculum_steps", self.curriculum_steps, "it must not be negative")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The replay buffer and how much of it an update needs."""

    groups_per_update: int = 1
    """Scored groups, over all ranks, that must be there before the trainer runs; all that are scored are then used."""

    def __post_init__(self) -> None:
        check(self.groups_per_update >= 1, "replay.groups_per_update", self.groups_per_update, "it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a response becomes a reward."""

    repetition_penalty: float = 0.0
    """Subtracted from the reward of a response that was stopped for repetition."""
    over_budget_penalty: float = 0.0
    """Subtracted from the reward of a response that was cut at its maximum length."""
    over_budget_start: float = 1.0
    """Fraction of rollout.max_response_tokens from which the over-budget penalty rises linearly; 1: only what was cut pays it."""
    format_penalty: float = 0.0
    """Subtracted from the reward of a response that lacks one of format_markers."""
    format_markers: tuple[str, ...] = ()
    """Texts that a response must hold, one after the other, special tokens left out: for example </think> and \\boxed{."""
    max_response_chars: int = 100_000
    """Graders read this many characters from the end of a response, where the answer stands."""
    max_retries: int = 1
    """How often a response that could not be graded is graded again."""
    not_graded: Literal["complete", "drop"] = "complete"
    """A group with a response that could not be graded, retries included: trained on the others, or dropped. Dropped anyway if none was."""
    timeout_s: float = 600.0
    """Once generation has ended and no verdict came for this long, what is still awaited counts as not graded; in seconds."""
    sandbox_url: str | None = None
    """Programs run on this `tandem sandbox-serve`, such as http://sandbox-1:8600. None: in a sandbox of each leader's own."""
    judge_url: str | None = None
    """OpenAI-compatible endpoint of a judge model, up to /v1, for domain judge and for long answers of k12. None: there is none."""
    judge_model: str | None = None
    """The judge model's name there. None: the first that the endpoint lists."""
    judge_key_file: str | None = None
    """File that holds the endpoint's API key. None: it asks for none."""
    judge_timeout_s: float = 300.0
    """A verdict that the judge model has not given by then, retries included, is not graded; in seconds, from its first request."""
    judge_max_tokens: int = 2048
    """Longest reply of the judge model, its reasoning included; one that is cut is asked for again."""
    judge_concurrency: int = 32
    """Responses that each leader has judged at a time."""
    preference_model: str | None = None
    """Reward model that domain preference scores with: a folder that `tandem export` made of its run. None: there is none."""
    preference_threshold: float | None = None
    """A response that scores at least this is correct. None: midway between chosen and rejected held-out responses of its training."""
    preference_timeout_s: float = 120.0
    """A response that the reward model has not scored by then is not graded; in seconds, from when a worker takes it."""
    alarm_jump: float = 0.3
    """Change of a domain's rate of zero scores, from its running mean over iterations, that raises an alarm."""
    alarm_not_graded: float = 0.05
    """Rise of a domain's rate of responses that could not be graded, over its running mean, that raises an alarm."""

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "over_budget_penalty", "format_penalty"):
            check(getattr(self, name) >= 0, f"reward.{name}", getattr(self, name), "it is subtracted, so it must not be negative")
        check(0 <= self.over_budget_start <= 1, "reward.over_budget_start", self.over_budget_start, "it must lie in [0, 1]")
        rule = "reward.format_penalty needs at least one"
        check(self.format_penalty == 0 or bool(self.format_markers), "reward.format_markers", self.format_markers, rule)
        check("" not in self.format_markers, "reward.format_markers", self.format_markers, "none may be empty")
        check(self.max_retries >= 0, "reward.max_retries", self.max_retries, "it must not be negative")
        for name in ("timeout_s", "judge_timeout_s"):
            check(getattr(self, name) > 0, f"reward.{name}", getattr(self, name), "it must be positive")
        for name in ("judge_max_tokens", "judge_concurrency"):
            check(getattr(self, name) >= 1, f"reward.{name}", getattr(self, name), "it must be at least 1")
        is_url = self.judge_url is None or self.judge_url.startswith(("http://", "https://"))
        check(is_url, "reward.judge_url", self.judge_url, "it must begin with http:// or https://")
        for name in ("alarm_jump", "alarm_not_graded"):
            check(0 < getattr(self, name) <= 1, f"reward.{name}", getattr(self, name), "it must lie in (0, 1]; 1 is never reached")
        check(self.preference_timeout_s > 0, "reward.preference_timeout_s", self.preference_timeout_s, "it must be positive")
        check(self.max_response_chars >= 1, "reward.max_response_chars", self.max_response_chars, "it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving to disk."""

    every: int = 10
    """Iterations between checkpoints; the last iteration is always saved. 0: only the last."""
    keep: int = 2
    """How many checkpoints are kept."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory: as much as a rank saves (weights and twice the same again in float32)."""
    timeout_s: float = 1800.0
    """A checkpoint that is not written by then has failed, and the run stops; in seconds."""

    def __post_init__(self) -> None:
        check(self.timeout_s > 0, "checkpoint.timeout_s", self.timeout_s, "it must be positive")
        check(self.every >= 0, "checkpoint.every", self.every, "it must not be negative (0 saves only the last)")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "it must be at least 1")


SwapRoute = Literal["host_memory", "shard_to_shard", "gather_and_broadcast"]


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """Moving weights from the trainer to the rollout engine."""

    route: Literal["auto"] | SwapRoute = "auto"
    """How weights reach the engines. host_memory: through buckets that a node shares. shard_to_shard: every GPU's rank fills buckets of
    its own, and is sent what it lacks. gather_and_broadcast: the same, one rank sending to all. auto: the one that takes the least time by
    bandwidths measured at the first swap."""
    bucket_bytes: int = 2 << 20
    """Size of one bucket in host memory, in bytes. There are three, of a node, or of each rank where the route has them by rank: what a
    swap takes beside the weights."""
    device_bucket_bytes: int = 128 << 20
    """Size of one bucket in a GPU's memory, in bytes. Each GPU has three."""
    timeout_s: float = 300.0
    """Deadline of every wait during a swap, in seconds."""
    sleep_budget_bytes: int = 2 << 30
    """What the sleeping side, trainer or engine, may keep of a GPU, in bytes: contexts of CUDA and buffers of NCCL, for the most part.
    More is an error. Without a GPU only the trainer's tensors count."""

    def __post_init__(self) -> None:
        check(self.bucket_bytes >= 4096, "swap.bucket_bytes", self.bucket_bytes, "it must be at least 4096")
        check(self.device_bucket_bytes >= 4096, "swap.device_bucket_bytes", self.device_bucket_bytes, "it must be at least 4096")
        check(self.timeout_s > 0, "swap.timeout_s", self.timeout_s, "it must be positive")
        check(self.sleep_budget_bytes >= 0, "swap.sleep_budget_bytes", self.sleep_budget_bytes, "it must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Greedy pass@1 on held-out prompts during the run."""

    every: int = 5
    """Iterations between evaluations; the first and the last are always evaluated. 0: only those."""
    max_prompts: int | None = None
    """How many held-out prompts are used. None: all."""

    def __post_init__(self) -> None:
        check(self.every >= 0, "evaluation.every", self.every, "it must not be negative")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run writes and shows."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs the extra `wandb`)."""
    rollouts_every: int = 1
    """Iterations between Parquet files of rollouts; 0 writes none. The first and the last are written otherwise."""
    progress: bool = True
    """Show progress bars (on a terminal; plain lines otherwise)."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. The saved config.json holds these fields, resolved."""

    name: str
    """Name of the run; also the seed's namespace."""
    run_dir: str | None = None
    """Run folder. None: runs/NAME in the folder the command was started in. An existing run there is resumed."""
    steps: int = 40
    """Iterations of rollout and training."""
    seed: int = 0
    """Everything random is a hash of this and of what it is for."""
    timeout_s: float = 86400.0
    """Deadline of every wait between ranks outside a swap, in seconds: longer than the longest rollout phase."""
    watchdog_s: float = 3600.0
    """How long a rank may show no progress (a phase, a finished group, a supervised step) before it counts as hanging, in seconds."""
    grace_s: float = 25.0
    """How long the run may go on after SIGTERM, in seconds: less than the launcher waits before it kills (torchrun: 30)."""
    kernels: Literal["auto", "reference", "triton", "native"] = "auto"
    """Which kernels compute. auto: Triton on a GPU; on a CPU plain torch, and C++ where it was built. reference: plain torch. native:
    CUDA C++ or C++ where a kernel has it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: tuple[SFTStage, ...] = ()
    """Stages of the supervised warm start, in order; none skips it."""
    preference: tuple[SFTStage, ...] = ()
    """Stages of training a reward model on preference pairs, in order; with one, the run does that and nothing else."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    length_penalty: LengthPenaltyConfig = field(default_factory=LengthPenaltyConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check(self.steps >= 0, "steps", self.steps, "it must not be negative")
        check(self.seed >= 0, "seed", self.seed, "it must not be negative")
        for name in ("timeout_s", "watchdog_s"):
            check(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")
        check(self.grace_s >= 0, "grace_s", self.grace_s, "it must not be negative (0 ends the run at once)")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, for config.json."""
        return dataclasses.asdict(self)


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that `to_dict` and JSON made of one. Raises: ValueError naming a field that there is not."""
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(hints)}")
    return kind(**{name: _restored(hints[name], value) for name, value in values.items()})


def _restored(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value)
    if value is None:
        return None
    if typing.get_origin(hint) is types.UnionType:
        arms = [arm for arm in typing.get_args(hint) if arm is not types.NoneType]
        # Of several dataclasses, the one that has these fields.
        fitting = [arm for arm in arms if dataclasses.is_dataclass(arm) and set(value) <= {field.name for field in dataclasses.fields(arm)}]
        return _restored((fitting or arms)[0], value)
    if typing.get_origin(hint) is tuple:
        return tuple(_restored(typing.get_args(hint)[0], item) for item in value)
    return value
