"""OpenAI's chat and text completions as data: what a request may hold, its token ids, and what is answered.

Fields that would change the answer and that the engine does not have are refused unless they ask for nothing; those that only describe
the caller are ignored.
"""

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tandem.engine.data.tokenizer import HFTokenizer
from tandem.engine.types import Completion, StopState

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
# Fields that are not supported, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **{"stream": (False,), "echo": (False,), "suffix": ("",), "best_of": (1,), "top_p": (1,), "top_logprobs": (0,)},
    **{"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},)},
    **{"tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto")},
}


class APIError(Exception):
    """Answered as an error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if 400 <= self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Sampling(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = None
    stop: str | list[str] | None = None

    def check(self) -> None:
        """Raises: APIError for a field that is unknown, or asks for what there is not."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED:
                continue
            if name not in NEUTRAL:
                raise APIError(400, f"{name} is not known here", param=name)
            if value not in NEUTRAL[name]:
                neutral = " or ".join(repr(one) for one in NEUTRAL[name])
                raise APIError(400, f"{name} is {value!r:.80}; this server has only {neutral}", param=name)
        if "" in self.stops:
            raise APIError(400, "stop holds an empty text; leave it out", param="stop")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextPart(BaseModel):
    type: str
    text: str = ""


class ChatMessage(BaseModel):
    role: str
    content: str | list[TextPart]

    def text(self) -> str:
        """Raises: APIError for a part that is not text."""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.type != "text":
                raise APIError(400, f"a message has a part of type {part.type!r}; this server reads text only", param="messages")
        return "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None

    def prompts(self, tokenizer: HFTokenizer) -> list[list[int]]:
        """One: the conversation in the tokenizer's chat template; without a template one line "role: text" per message, and "assistant:".

        Raises: APIError if the template refuses the conversation.
        """
        turns = [{"role": message.role, "content": message.text()} for message in self.messages]
        if tokenizer.chat_template is None:
            lines = [f"{turn['role']}: {turn['content']}\n" for turn in turns]
            return [tokenizer.encode("".join(lines) + "assistant:", add_special_tokens=True)]
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise APIError(400, f"the model's chat template refuses the messages: {error}", param="messages") from error
        return [tokenizer.encode(text, add_special_tokens=False)]  # the template writes them itself

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TextRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=0)

    def prompts(self, tokenizer: HFTokenizer) -> list[list[int]]:
        """Token ids of each."""
        if isinstance(self.prompt, str):
            several: list[Any] = [self.prompt]
        else:
            several = [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else list(self.prompt)
        return [tokenizer.encode(one, add_special_tokens=True) if isinstance(one, str) else one for one in several]

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One completion as it is answered: cut before a stop text, without the stop token."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str


def read_completion(completion: Completion, stops: Sequence[str], tokenizer: HFTokenizer) -> Choice:
    """Of several stop texts, the one that begins first counts."""

    def decode(num_tokens: int) -> str:
        return tokenizer.decode(list(completion.token_ids[:num_tokens]), skip_special_tokens=True)

    is_finished = completion.stop is StopState.FINISHED
    num_tokens = len(completion.token_ids) - is_finished
    text = decode(num_tokens)
    found = [start for start in (text.find(stop) for stop in stops) if start >= 0]
    if found:
        num_tokens = bisect_left(range(num_tokens), min(found), key=lambda n: len(decode(n)))
        text = text[: min(found)]
    return Choice(
        text=text,
        token_ids=completion.token_ids[:num_tokens],
        logprobs=completion.logprobs[:num_tokens],
        finish="stop" if found or is_finished else "length",
    )


def chat_answer(name: str, model: str, num_prompt_tokens: int, choices: Sequence[Choice], tokenizer: HFTokenizer | None) -> dict[str, Any]:
    """Body of a chat completion. `tokenizer`: None leaves log-probs out."""
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": None if tokenizer is None else {"content": _token_logprobs(choice, tokenizer)},
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": _usage(num_prompt_tokens, choices),
    }


def text_answer(name: str, model: str, num_prompt_tokens: int, choices: Sequence[Choice], tokenizer: HFTokenizer | None) -> dict[str, Any]:
    """Body of a text completion; as `chat_answer`."""
    return {
        "id": f"cmpl-{name}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "logprobs": None if tokenizer is None else _text_logprobs(choice, tokenizer),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": _usage(num_prompt_tokens, choices),
    }


def _usage(num_prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    num_tokens = sum(len(choice.token_ids) for choice in choices)
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens, "total_tokens": num_prompt_tokens + num_tokens}


def _token_logprobs(choice: Choice, tokenizer: HFTokenizer) -> list[dict[str, Any]]:
    tokens = [tokenizer.decode([token], skip_special_tokens=False) for token in choice.token_ids]
    return [
        # a token that is a part of a character has no text, and its bytes are not known
        {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode()), "top_logprobs": []}
        for token, logprob in zip(tokens, choice.logprobs, strict=True)
    ]


def _text_logprobs(choice: Choice, tokenizer: HFTokenizer) -> dict[str, Any]:
    starts = [len(tokenizer.decode(list(choice.token_ids[:n]), skip_special_tokens=True)) for n in range(len(choice.token_ids))]
    tokens = [tokenizer.decode([token], skip_special_tokens=False) for token in choice.token_ids]
    return {"tokens": tokens, "token_logprobs": list(choice.logprobs), "top_logprobs": None, "text_offset": starts}
