"""Prompt files: what is read, and what every bad line says."""

import json
from pathlib import Path

import pytest

from tandem.engine.config import DataConfig
from tandem.engine.data.prompts import load_prompts
from tandem.engine.data.tokenizer import byte_tokenizer
from tandem.engine.types import Prompt

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"
GOOD = {"question": "1+1?", "answer": "2"}


def load(path: Path, *records: object, config: DataConfig | None = None, context_length: int = 64, **options: object) -> list[Prompt]:
    """Load a file of these records; text is written as it stands."""
    path = path / "prompts.jsonl" if path.is_dir() else path
    if records:
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return load_prompts(path, byte_tokenizer(), config or DataConfig(), context_length=context_length, **options)  # type: ignore[arg-type]


def test_fields_are_read_under_any_of_their_names(tmp_path: Path) -> None:
    problem = {"problem": "b", "answer": 27.0, "id": 7, "domain": "arithmetic", "level": 3}
    first, second, third = load(tmp_path, GOOD, problem, {"prompt": "c", "answer": 0.5, "other": []})
    assert (first.text, first.answer, first.domain, first.level) == ("1+1?", "2", "math", 0)
    assert first.token_ids == (257, *b"1+1?")
    assert (second.id, second.answer, second.domain, second.level) == ("7", "27", "arithmetic", 3)
    assert third.answer == "0.5"


def test_of_a_worked_solution_the_final_answer_is_kept(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"question": "q", "answer": "3 - 1 = <<3-1=2>>2\n#### 1,018 "})
    assert prompt.answer == "1,018"


def test_what_a_grader_needs_travels_as_json_and_may_stand_for_the_answer(tmp_path: Path) -> None:
    tests = {"tests": [{"stdin": "1", "expected": "é"}]}
    code, plain = load(tmp_path, {"question": "q", "domain": "code", "grading": tests}, GOOD)
    assert (code.answer, json.loads(code.grading)) == ("", tests)
    assert plain.grading == ""
    (both,) = load(tmp_path, {**GOOD, "grading": {"type": "exact"}})
    assert (both.answer, both.grading) == ("2", '{"type": "exact"}')


def test_the_default_id_depends_on_the_text_only(tmp_path: Path) -> None:
    one = load(tmp_path, GOOD, {"question": "other", "answer": "x"})
    two = load(tmp_path, {"question": "other", "answer": "x"}, {**GOOD, "level": 2})
    assert [prompt.id for prompt in one] == [prompt.id for prompt in reversed(two)]


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts\.jsonl:4: not JSON"):
        load(tmp_path, GOOD, "", "   ", "{")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer"', "not JSON"),
        ('["q", "a"]', "found a JSON list"),
        ({"answer": "2"}, "found answer; it needs a field question or problem or prompt"),
        ({}, "found no fields"),
        ({**GOOD, "grading": "exact"}, "field 'grading' is 'exact'; it must be a JSON object"),
        ({"question": "q"}, "found question; it needs a field answer"),
        ({"question": "  ", "answer": "2"}, "'question' is empty"),
        ({"question": 3, "answer": "2"}, "'question' is 3; it must be a string"),
        ({"question": "q", "answer": ""}, "'answer' is empty"),
        ({"question": "q", "answer": ["2"]}, r"'answer' is \['2'\]"),
        ({"question": "q", "answer": True}, "'answer' is True"),
        ('{"question": "q", "answer": NaN}', "'answer' is nan"),
        ({"question": "q", "answer": "steps ####"}, "nothing after its last ####"),
        ({"question": "q", "answer": "2", "level": 1.5}, "'level' is 1.5"),
        ({"question": "q", "answer": "2", "level": -1}, "'level' is -1"),
        ({"question": "q", "answer": "2", "id": None}, "'id' is None"),
        ({"question": "q", "answer": "2", "domain": 4}, "'domain' is 4"),
        (GOOD, "is already used in line 1"),
        ({"question": "x" * 64, "answer": "2"}, "the prompt has 65 tokens and 63 are allowed"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"prompts\.jsonl:2: .*{message}"):
        load(tmp_path, GOOD, line)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "q", "answer": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: byte 29 of the line is not UTF-8"):
        load(tmp_path / "latin.jsonl")


def test_a_missing_and_an_empty_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="is empty"):
        load(tmp_path / "empty.jsonl")


def test_a_domain_without_a_grader_is_an_error_that_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="domain 'code' has no grader; known are arithmetic, math"):
        load(tmp_path, {**GOOD, "domain": "code"}, domains=("math", "arithmetic"))
    with pytest.raises(ValueError, match="domain 'chess'"):
        load(tmp_path, GOOD, default_domain="chess", domains=("math",))


def test_long_prompts_are_skipped_and_counted_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skip = DataConfig(long_prompts="skip", max_prompt_tokens=5)
    prompts = load(tmp_path, GOOD, {"question": "12345", "answer": "2"}, {"question": "x" * 9, "answer": "2"}, config=skip)
    assert [prompt.text for prompt in prompts] == ["1+1?"]
    assert "skipped 2 prompts longer than 5 tokens (first in line 2)" in caplog.text
    with pytest.raises(ValueError, match="all 1 prompts are longer"):
        load(tmp_path, {"question": "12345", "answer": "2"}, config=skip)


def test_the_prompt_must_leave_room_for_a_response(tmp_path: Path) -> None:
    load(tmp_path, GOOD, context_length=6)
    with pytest.raises(ValueError, match="5 tokens and 4 are allowed"):
        load(tmp_path, GOOD, context_length=5)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens is 64; it must lie between 1 and 63"):
        load(tmp_path, GOOD, config=DataConfig(max_prompt_tokens=64))


def test_the_template_wraps_the_question_and_must_hold_its_place(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"question": "{x}", "answer": "2"}, config=DataConfig(prompt_template="Q {question} {A}"))
    assert bytes(prompt.token_ids[1:]) == b"Q {x} {A}"
    assert prompt.text == "{x}"
    with pytest.raises(ValueError, match=r"data\.prompt_template is 'Q'; it must contain"):
        load(tmp_path, GOOD, config=DataConfig(prompt_template="Q"))


def test_the_chat_template_writes_the_special_tokens_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        load(tmp_path, GOOD, config=DataConfig(use_chat_template=True))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}U:{{ messages[0].content }}{% if add_generation_prompt %}|A:{% endif %}"
    (prompt,) = load_prompts(tmp_path / "prompts.jsonl", tokenizer, DataConfig(use_chat_template=True), context_length=64)
    assert prompt.token_ids == (257, *b"U:1+1?|A:")


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not there")
def test_gsm8k_loads() -> None:
    prompts = load(GSM8K, context_length=2048)
    assert len(prompts) == 7473
    assert prompts[0].answer == "72"
    assert all(any(character.isdigit() for character in prompt.answer) for prompt in prompts)
