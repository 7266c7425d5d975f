"""What `tandem curate` is told: one field per option."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from tandem.engine.config import RepetitionConfig, RewardConfig, check

DIRECT_TEMPLATE = "{question}\nGive the final answer only, without any reasoning."


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """How raw prompt files become a curated one. All but `files`, `to` and `api_key_file` decides what is measured."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """JSONL files of raw prompts: question|problem|prompt and answer; optional domain, discipline, grading, id. The first of duplicates
    stays."""
    to: Path
    """Folder for prompts.jsonl, excluded.jsonl, the report and the journal. The same command goes on where it was killed."""
    model: str
    """Hugging Face folder (for example of `tandem export`), or the URL of an OpenAI-compatible endpoint up to /v1."""
    endpoint_model: str | None = None
    """The model's name at the endpoint. None: the first that it lists."""
    api_key_file: Path | None = None
    """File that holds the endpoint's API key. None: it asks for none."""
    against: tuple[Path, ...] = ()
    """JSONL files of benchmarks: a prompt that repeats one of their questions is excluded."""
    num_samples: int = 10
    """Responses per prompt from which the pass rate is taken (2.1)."""
    num_direct: int = 8
    """Tries without reasoning; a prompt that one of them answers is excluded (2.1). 0: no such filter."""
    temperature: float = 1.0
    """Softmax temperature of all responses (high in 2.1; the value is not given)."""
    max_response_tokens: int = 1024
    """Longest response, in tokens. A prompt must leave room for it in the model's context."""
    max_direct_tokens: int = 24
    """Longest response without reasoning, direct_prefix included: too short to reason in."""
    prompt_template: str = "{question}"
    """Text given to the model; {question} is replaced by the prompt. Best that of the runs that will train on the prompts."""
    direct_template: str = DIRECT_TEMPLATE
    """The same for the tries without reasoning."""
    direct_prefix: str = ""
    """What a response without reasoning begins with, such as \\boxed{ or A:. Not with an endpoint."""
    use_chat_template: bool = False
    """Wrap the prompt as a user turn in the tokenizer's chat template (an endpoint does so by itself)."""
    default_domain: str = "math"
    """Domain of prompts that name none and that no rule of engine/curate/tags.py tells."""
    level_bounds: tuple[float, ...] = (0.9, 0.6, 0.3, 0.1)
    """Curriculum: the level is the number of these that the pass rate stays below, so 0 is the easiest and 4 was hardly ever solved."""
    seed: int = 0
    """Of the samples."""
    threads: int = 1
    """CPU threads of the rollout engine, and programs that graders run at a time."""
    max_batch: int = 512
    """Responses that the rollout engine decodes at a time, or requests at the endpoint."""
    repetition: RepetitionConfig = field(default_factory=RepetitionConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        check(len(self.files) > 0, "files", self.files, "name at least one JSONL file of prompts")
        for name in ("num_samples", "max_response_tokens", "max_direct_tokens", "threads", "max_batch"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        for name in ("num_direct", "seed"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "it must not be negative")
        check(self.temperature > 0, "temperature", self.temperature, "it must be positive: greedy samples would all be the same")
        for name in ("prompt_template", "direct_template"):
            check("{question}" in getattr(self, name), name, getattr(self, name), "it must contain {question}")
        falls = all(0 < bound <= 1 for bound in self.level_bounds) and list(self.level_bounds) == sorted(
            set(self.level_bounds), reverse=True
        )
        check(falls, "level_bounds", self.level_bounds, "they must lie in (0, 1] and fall")
        check(
            not (self.direct_prefix and self.is_endpoint),
            "direct_prefix",
            self.direct_prefix,
            "an endpoint cannot be given one; leave it out",
        )

    @property
    def is_endpoint(self) -> bool:
        return self.model.startswith(("http://", "https://"))
