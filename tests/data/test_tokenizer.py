"""The byte-level tokenizer, and loading one from a folder."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tandem.engine.data.tokenizer import byte_tokenizer, load_tokenizer, padded_vocab_size


def random_text(generator: random.Random) -> str:
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randrange(40)))


def test_every_text_comes_back_unchanged_one_token_a_byte() -> None:
    tokenizer = byte_tokenizer()
    generator = random.Random(0)
    for text in ["", " a  b .\n ,", "don 't", "\x00\r\n", "é́", *(random_text(generator) for _ in range(200))]:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert token_ids == list(text.encode())
        assert tokenizer.decode(token_ids) == text


def test_prompts_start_with_bos_and_special_tokens_can_be_left_out_of_text() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert tokenizer.encode("8?") == [257, ord("8"), ord("?")]
    assert tokenizer.decode([257, 65, 258, 256], skip_special_tokens=True) == "A"


def test_the_vocabulary_is_padded_to_a_multiple_of_eight() -> None:
    assert len(byte_tokenizer()) == 259
    assert padded_vocab_size(byte_tokenizer()) == 264


def test_a_saved_tokenizer_loads_as_a_hugging_face_folder(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.encode("2 é, .") == byte_tokenizer().encode("2 é, .")
        assert loaded.decode(loaded.encode(" a , b ."), skip_special_tokens=True) == " a , b ."
        assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (258, 256, 259)
    assert load_tokenizer(None).encode("x") == [257, ord("x")]


def test_a_folder_that_is_no_tokenizer_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no tokenizer \(found notes.txt\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_an_error(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(tmp_path)
