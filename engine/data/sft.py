"""Supervised examples: loading, and endless batches by token count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandem.engine.config import DataConfig
from tandem.engine.data.jsonl import read_jsonl, text_field
from tandem.engine.data.prompts import encode_prompt
from tandem.engine.data.tokenizer import HFTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTExample:
    """A prompt and the response to imitate, which ends in the end token."""

    prompt_ids: NDArray[np.int32]  # [P]
    response_ids: NDArray[np.int32]  # [N]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def load_sft(path: str | Path, tokenizer: HFTokenizer, config: DataConfig, *, max_tokens: int) -> list[SFTExample]:
    """Read lines with `prompt` and `response`; the prompt goes through the same template as in RL.

    Raises: ValueError that names file and line for a bad line and for an example of more than `max_tokens` tokens.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token; a response could not be ended")
    examples = []
    for line, record in read_jsonl(path):
        where = f"{path}:{line}"
        prompt_ids = encode_prompt(text_field(record, ("prompt",), where), tokenizer, config)
        response_ids = [*tokenizer.encode(text_field(record, ("response",), where), add_special_tokens=False), tokenizer.eos_token_id]
        example = SFTExample(prompt_ids=np.array(prompt_ids, dtype=np.int32), response_ids=np.array(response_ids, dtype=np.int32))
        if example.num_tokens > max_tokens:
            raise ValueError(f"{where}: the example has {example.num_tokens} tokens; shorten it, or raise max_tokens ({max_tokens})")
        examples.append(example)
    return examples


def sft_batches(lengths_R: Sequence[int], *, batch_tokens: int, seed: int, start_step: int = 0) -> Iterator[list[int]]:
    """Indices of the examples of each optimizer step, endlessly.

    Every epoch is a new seeded shuffle, read on without a cut at its end; a batch takes examples until the next would exceed
    `batch_tokens`. So every example comes once per epoch, and no batch is a short remainder.

    Args:
        lengths_R: tokens of each example.
        start_step: batches to pass over, on resume.
    Raises: ValueError without examples, or if one is longer than a batch.
    """
    if len(lengths_R) == 0:
        raise ValueError("there are no supervised examples; give at least one")
    lengths = np.asarray(lengths_R, dtype=np.int64)
    worst = int(lengths.argmax())
    if lengths[worst] > batch_tokens:
        raise ValueError(f"supervised example {worst} has {lengths[worst]} tokens, more than sft.batch_tokens ({batch_tokens}); raise it")
    return _batches(lengths, batch_tokens, seed, start_step)


def _batches(lengths: NDArray[np.int64], batch_tokens: int, seed: int, start_step: int) -> Iterator[list[int]]:
    batch: list[int] = []
    num_tokens, step = 0, 0
    for i in _endless_shuffles(len(lengths), seed):
        if num_tokens + lengths[i] > batch_tokens:
            if step >= start_step:
                yield batch
            batch, num_tokens, step = [], 0, step + 1
        batch.append(i)
        num_tokens += int(lengths[i])


def _endless_shuffles(n: int, seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, epoch]).permutation(n).tolist()
        epoch += 1
