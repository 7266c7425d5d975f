"""The byte-level tokenizer that the project brings, and loading one from a Hugging Face folder.

Transformers is imported inside the functions: it takes seconds, and a process that only packs or samples never needs it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from tandem.engine.types import Tokenizer

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


class HFTokenizer(Tokenizer, Protocol):
    """What is used of transformers' PreTrainedTokenizerBase beyond turning text into ids and back."""

    bos_token_id: int | None
    eos_token: str | None
    chat_template: str | None

    def __len__(self) -> int: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], *, tokenize: bool, add_generation_prompt: bool) -> str: ...

    def save_pretrained(self, save_directory: str | Path) -> object: ...


def byte_tokenizer() -> HFTokenizer:
    """One token per UTF-8 byte (ids 0–255), then <pad> 256, <bos> 257 and <eos> 258. Lossless on any text.

    `encode(text, add_special_tokens=True)` puts <bos> in front and nothing behind: it makes prompts. Text that spells a special
    token is that token, as with every Hugging Face tokenizer.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # A BPE without merges leaves single bytes; each is written as the printable character that byte-level BPE gives it.
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    return cast(HFTokenizer, made)


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself where it is printable Latin-1, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def load_tokenizer(path: str | Path | None) -> HFTokenizer:
    """The tokenizer of a Hugging Face folder; None: the byte-level one.

    Nothing is fetched: `path` is a local folder. Raises: ValueError when it is none, holds no tokenizer, or one without an end token.
    """
    if path is None:
        return byte_tokenizer()
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"tokenizer folder {folder} does not exist or is no folder; give a Hugging Face folder with tokenizer.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder} holds no tokenizer (found {found}); it needs tokenizer.json and tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        tokenizer = cast(HFTokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds a tokenizer that transformers cannot load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no eos_token; set it in tokenizer_config.json, or no response can end")
    return tokenizer


def padded_vocab_size(tokenizer: HFTokenizer) -> int:
    """Rows of the embedding for this tokenizer: its largest id plus one, rounded up to a multiple of 8."""
    return -(-len(tokenizer) // 8) * 8
