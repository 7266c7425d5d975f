"""Prompts of a JSONL file, checked and tokenised."""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tandem.engine.config import DataConfig, check
from tandem.engine.data.images import read_images
from tandem.engine.data.jsonl import read_jsonl, text_field
from tandem.engine.data.tokenizer import HFTokenizer
from tandem.engine.types import Prompt

logger = logging.getLogger(__name__)


def load_prompts(
    path: str | Path,
    tokenizer: HFTokenizer,
    config: DataConfig,
    *,
    context_length: int,
    default_domain: str = "math",
    domains: Collection[str] | None = None,
) -> list[Prompt]:
    """Read prompts: a question (`question`, `problem` or `prompt`), its `answer`; optionally id, domain, level, grading, image.

    An answer is text or a number; of GSM8K's worked solutions ("… #### 18") only what follows the last #### is kept. `grading` is a
    JSON object for the domain's grader, such as hidden tests; with it the answer may be left out, and is then empty. Without an
    id a prompt gets a hash of its text, so it is the same in every run and in every order of the file. `image`, or `images` for several,
    names files beside the prompts file; the chat template puts the model's placeholders for them before the question, and without one the
    question must hold them.

    Args:
        context_length: most tokens of prompt plus response; a prompt must leave room for at least one token.
        default_domain: of lines without the field.
        domains: those that can be graded; None accepts any.
    Raises: ValueError that names file and line for everything that is wrong with a line, and for a prompt that is too long unless
        config.long_prompts is "skip"; skipped ones are counted and logged.
    """
    longest = _longest_prompt(config, context_length)
    prompts: list[Prompt] = []
    line_of_id: dict[str, int] = {}
    too_long: list[int] = []
    for line, record in read_jsonl(path):
        where = f"{path}:{line}"
        prompt = parse_prompt(record, where, default_domain=default_domain, domains=domains, folder=Path(path).parent)
        token_ids = encode_prompt(prompt.text, tokenizer, config, num_images=len(prompt.images))
        prompt = dataclasses.replace(prompt, token_ids=tuple(token_ids))
        if prompt.id in line_of_id:
            raise ValueError(f"{where}: id {prompt.id!r} is already used in line {line_of_id[prompt.id]}; ids (or texts) must differ")
        line_of_id[prompt.id] = line
        if len(prompt.token_ids) > longest:
            if config.long_prompts == "error":
                raise ValueError(
                    f"{where}: the prompt has {len(prompt.token_ids)} tokens and {longest} are allowed; "
                    "shorten it, raise model.context_length or data.max_prompt_tokens, or set data.long_prompts=skip"
                )
            too_long.append(line)
            continue
        prompts.append(prompt)
    if too_long:
        logger.warning("%s: skipped %d prompts longer than %d tokens (first in line %d)", path, len(too_long), longest, too_long[0])
    if not prompts:
        raise ValueError(f"{path}: all {len(too_long)} prompts are longer than {longest} tokens; raise model.context_length")
    return prompts


def parse_prompt(
    record: dict[str, Any],
    where: str,
    *,
    default_domain: str = "math",
    domains: Collection[str] | None = None,
    folder: Path = Path(),
) -> Prompt:
    """The prompt of one line as `load_prompts` reads it, without its tokens. `folder`: from where relative paths of images count.

    Raises: ValueError that begins with `where`.
    """
    text = text_field(record, ("question", "problem", "prompt"), where)
    images = read_images(record, where, folder)
    return Prompt(
        id=_id_of(record, text + "".join(image.digest for image in images), where),
        text=text,
        token_ids=(),
        answer=_answer_of(record, where),
        domain=_domain_of(record, default_domain, domains, where),
        level=_level_of(record, where),
        grading=_grading_of(record, where),
        images=images,
    )


def encode_prompt(text: str, tokenizer: HFTokenizer, config: DataConfig, *, num_images: int = 0) -> list[int]:
    """Token ids of a question under the configured template, special tokens included; what RL and SFT both start from.

    Raises: ValueError if the template lacks {question}, or a chat template is asked for and the tokenizer has none.
    """
    check("{question}" in config.prompt_template, "data.prompt_template", config.prompt_template, "it must contain {question}")
    text = config.prompt_template.replace("{question}", text)
    if not config.use_chat_template:
        return tokenizer.encode(text, add_special_tokens=True)
    if tokenizer.chat_template is None:
        raise ValueError("data.use_chat_template is True but the tokenizer has no chat template; set it to False, or use another tokenizer")
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}] if num_images else text
    turns = [{"role": "user", "content": content}]
    # The template writes its special tokens itself.
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(rendered, add_special_tokens=False)


def _longest_prompt(config: DataConfig, context_length: int) -> int:
    if config.max_prompt_tokens is None:
        return context_length - 1
    rule = f"it must lie between 1 and {context_length - 1}, one less than the context"
    check(1 <= config.max_prompt_tokens < context_length, "data.max_prompt_tokens", config.max_prompt_tokens, rule)
    return config.max_prompt_tokens


def _id_of(record: dict[str, Any], text: str, where: str) -> str:
    if "id" not in record:
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    value = record["id"]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{where}: field 'id' is {value!r:.80}; it must be text or a whole number")
    return str(value)


def _grading_of(record: dict[str, Any], where: str) -> str:
    if "grading" not in record:
        return ""
    value = record["grading"]
    if not isinstance(value, dict):
        raise ValueError(f"{where}: field 'grading' is {value!r:.80}; it must be a JSON object for the domain's grader")
    return json.dumps(value, ensure_ascii=False)


def _answer_of(record: dict[str, Any], where: str) -> str:
    if "answer" not in record and "grading" in record:
        return ""
    value = record.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{where}: field 'answer' is {value}; it must be finite")
        return str(int(value)) if value == int(value) else repr(value)
    text = text_field(record, ("answer",), where).strip()
    if "####" not in text:
        return text
    final = text.rsplit("####", 1)[1].strip()
    if not final:
        raise ValueError(f"{where}: field 'answer' has nothing after its last ####; the final answer must stand there")
    return final


def _domain_of(record: dict[str, Any], default: str, domains: Collection[str] | None, where: str) -> str:
    domain = text_field(record, ("domain",), where) if "domain" in record else default
    if domains is not None and domain not in domains:
        raise ValueError(f"{where}: domain {domain!r} has no grader; known are {', '.join(sorted(domains))}")
    return domain


def _level_of(record: dict[str, Any], where: str) -> int:
    level = record.get("level", 0)
    if isinstance(level, bool) or not isinstance(level, int) or level < 0:
        raise ValueError(f"{where}: field 'level' is {level!r:.80}; it must be a whole number, 0 for the easiest")
    return level
