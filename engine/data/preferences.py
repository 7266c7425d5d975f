"""Preference pairs of a JSONL file, checked and tokenised."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.engine.config import DataConfig
from tandem.engine.data.jsonl import read_jsonl, text_field
from tandem.engine.data.prompts import encode_prompt
from tandem.engine.data.tokenizer import HFTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """A prompt with a response that is to score higher and one that is to score lower; both end in the end token."""

    prompt_ids: NDArray[np.int32]
    chosen_ids: NDArray[np.int32]
    rejected_ids: NDArray[np.int32]
    margin: float = 0.0  # by how much the score is to be higher

    @property
    def num_tokens(self) -> int:
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


def load_preferences(path: str | Path, tokenizer: HFTokenizer, config: DataConfig, *, max_tokens: int) -> list[PreferencePair]:
    """Read lines with `prompt`, `chosen`, `rejected` and optionally `margin`; the prompt goes through the same template as in RL.

    Raises: ValueError that names file and line for a bad line, two equal responses, and a response that with its prompt has more than
        `max_tokens` tokens.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token; a response could not be ended")
    pairs = []
    for line, record in read_jsonl(path):
        where = f"{path}:{line}"
        prompt_ids = encode_prompt(text_field(record, ("prompt",), where), tokenizer, config)
        texts = {name: text_field(record, (name,), where) for name in ("chosen", "rejected")}
        if texts["chosen"] == texts["rejected"]:
            raise ValueError(f"{where}: chosen and rejected are the same text; a pair needs two, leave the line out")
        ids = {name: [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for name, text in texts.items()}
        for name, tokens in ids.items():
            if len(prompt_ids) + len(tokens) > max_tokens:
                length = len(prompt_ids) + len(tokens)
                raise ValueError(f"{where}: prompt and {name} have {length} tokens; shorten them, or raise max_tokens ({max_tokens})")
        pair = PreferencePair(
            prompt_ids=np.array(prompt_ids, dtype=np.int32),
            chosen_ids=np.array(ids["chosen"], dtype=np.int32),
            rejected_ids=np.array(ids["rejected"], dtype=np.int32),
            margin=_margin_of(record, where),
        )
        pairs.append(pair)
    return pairs


def _margin_of(record: dict[str, Any], where: str) -> float:
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0:
        raise ValueError(f"{where}: field 'margin' is {margin!r:.80}; it must be a number that is not negative")
    return float(margin)
