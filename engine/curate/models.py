"""Who answers the prompts: a model folder on the embedded engine, or a model behind an OpenAI-compatible endpoint."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from tandem.engine.build import stop_token_ids
from tandem.engine.checkpoint.hf_folder import read_hf_config
from tandem.engine.checkpoint.serve_folder import serve_folder
from tandem.engine.config import DataConfig, RolloutConfig
from tandem.engine.curate.config import CurateConfig
from tandem.engine.data.prompts import encode_prompt
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.reward.chat import ChatClient, Endpoint, RefusedError, Reply, read_key
from tandem.engine.rollout.budget import generate_groups, new_group, sample_seed
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import Group, Prompt, Response, Segment, StopState, Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One way to put every prompt to the model."""

    name: Literal["direct", "reasoned"]
    template: str
    prefix: str = ""
    num_samples: int
    max_response_tokens: int


class Answerer(Protocol):
    @property
    def tokenizer(self) -> Tokenizer:
        """Decodes the responses."""
        ...

    def problem(self, prompt: Prompt, task: Task) -> str:
        """Why the prompt cannot be put, "" if it can."""
        ...

    def settings(self) -> dict[str, Any]:
        """JSON: all that the responses depend on besides prompt, task, temperature and seed."""
        ...

    def answer(self, prompts: Sequence[Prompt], task: Task) -> Iterator[Group]:
        """One group of final responses per prompt, each as soon as it is finished."""
        ...


class FolderModel:
    """A Hugging Face folder in float32. What it answers to a prompt is the same in every run, whatever else is asked."""

    def __init__(self, folder: Path, config: CurateConfig, stack: contextlib.ExitStack) -> None:
        """Read, start and fill the engine, which `stack` closes.

        Raises: ValueError for a folder that is no model of a known family, and for responses that are longer than its context.
        """
        hf_config = read_hf_config(folder)
        self.tokenizer = load_tokenizer(folder)
        self._config = config
        self._context_length: int = hf_config["max_position_embeddings"]
        for name in ("max_response_tokens", "max_direct_tokens"):
            if getattr(config, name) >= self._context_length:
                longest = getattr(config, name)
                raise ValueError(f"{name} is {longest}; {folder} has a context of {self._context_length} tokens; set it below that")
        self._prefix_ids = tuple(self.tokenizer.encode(config.direct_prefix, add_special_tokens=False)) if config.direct_prefix else ()
        if len(self._prefix_ids) >= config.max_direct_tokens:
            have = len(self._prefix_ids)
            raise ValueError(f"max_direct_tokens is {config.max_direct_tokens}; direct_prefix alone has {have} tokens; raise it")
        self._rollout = RolloutConfig(
            temperature=config.temperature,
            max_response_tokens=max(config.max_response_tokens, config.max_direct_tokens),
            max_batch=config.max_batch,
            repetition=config.repetition,
        )
        self._stop_token_ids = stop_token_ids(self.tokenizer, folder)
        self._engine = stack.enter_context(
            EmbeddedEngine(
                hf_config,
                self._rollout,
                dtype="float32",
                context_length=self._context_length,
                stop_token_ids=self._stop_token_ids,
                num_threads=config.threads,
            )
        )
        serve_folder(folder, self._engine, torch.float32)

    def problem(self, prompt: Prompt, task: Task) -> str:
        num_tokens = len(self._encode(prompt, task))
        room = self._context_length - task.max_response_tokens
        if num_tokens <= room:
            return ""
        return f"{num_tokens} tokens; a context of {self._context_length} and responses of {task.max_response_tokens} leave {room}"

    def settings(self) -> dict[str, Any]:
        return {
            "weights": self._engine.weights_digest,
            "stop_token_ids": self._stop_token_ids,
            "context_length": self._context_length,
            "use_chat_template": self._config.use_chat_template,
            "repetition": dataclasses.asdict(self._config.repetition),
            "torch": torch.__version__,
        }

    def answer(self, prompts: Sequence[Prompt], task: Task) -> Iterator[Group]:
        groups = [self._group(dataclasses.replace(prompt, token_ids=self._encode(prompt, task)), task) for prompt in prompts]
        return generate_groups(
            self._engine,
            groups,
            config=dataclasses.replace(self._rollout, max_response_tokens=task.max_response_tokens),
            context_length=self._context_length,
            seed_of=lambda group, sample, segment: sample_seed(self._config.seed, 0, group, sample, segment),
            token_budget=None,
        )

    def _encode(self, prompt: Prompt, task: Task) -> tuple[int, ...]:
        data = DataConfig(prompt_template=task.template, use_chat_template=self._config.use_chat_template)
        return tuple(encode_prompt(prompt.text, self.tokenizer, data))

    def _group(self, prompt: Prompt, task: Task) -> Group:
        group = new_group(prompt, task.num_samples)
        if not task.prefix:
            return group
        # The prefix is a part of the response, which the grader reads, and not of the prompt.
        begun = Segment(token_ids=self._prefix_ids, logprobs=(0.0,) * len(self._prefix_ids), policy_version=0)
        return dataclasses.replace(group, responses=tuple(dataclasses.replace(one, segments=(begun,)) for one in group.responses))


class EndpointModel:
    """A model that only gives text. Its answers depend on the server, and may differ from one run to the next."""

    def __init__(self, config: CurateConfig, stack: contextlib.ExitStack) -> None:
        """Raises: ValueError if the endpoint does not answer, refuses the key or lacks the model."""
        self.tokenizer = CharacterTokens()
        self._config = config
        endpoint = Endpoint(
            url=config.model, model=config.endpoint_model, api_key=read_key(config.api_key_file), max_concurrent=config.max_batch
        )
        self._client = stack.enter_context(ChatClient(endpoint))

    def problem(self, prompt: Prompt, task: Task) -> str:
        return ""  # only the endpoint knows

    def settings(self) -> dict[str, Any]:
        return {"url": self._config.model, "model": self._client.model}

    def answer(self, prompts: Sequence[Prompt], task: Task) -> Iterator[Group]:
        """A prompt that the endpoint refuses gets no group. Raises: ChatError when the endpoint is down for long."""
        place: dict[Future[Reply], tuple[int, int]] = {}
        replies: list[dict[int, Reply]] = [{} for _ in prompts]
        try:
            for number, prompt in enumerate(prompts):
                group = new_group(prompt, task.num_samples)
                messages = [{"role": "user", "content": task.template.replace("{question}", prompt.text)}]
                for sample in range(task.num_samples):
                    asked = self._client.sample(
                        messages,
                        temperature=self._config.temperature,
                        seed=sample_seed(self._config.seed, 0, group, sample, 0) >> 32,  # endpoints take 32 bits, some of them signed
                        max_tokens=task.max_response_tokens,
                    )
                    place[self._client.submit(asked)] = number, sample
            for done in as_completed(place):
                number, sample = place[done]
                try:
                    replies[number][sample] = done.result()
                except RefusedError as error:
                    print(f"prompt {prompts[number].id}: {error}", flush=True)
                    continue
                if len(replies[number]) == task.num_samples:
                    yield Group(prompt=prompts[number], responses=tuple(_response(i, replies[number][i]) for i in range(task.num_samples)))
        finally:
            for future in place:
                future.cancel()


class CharacterTokens:
    """An endpoint gives text where the judge decodes token ids: here a character is a token."""

    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))


def _response(sample: int, reply: Reply) -> Response:
    token_ids = tuple(map(ord, reply.text))
    segment = Segment(token_ids=token_ids, logprobs=(0.0,) * len(token_ids), policy_version=0)
    return Response(sample=sample, segments=(segment,), stop=StopState.FINISHED if reply.is_complete else StopState.LENGTH)
