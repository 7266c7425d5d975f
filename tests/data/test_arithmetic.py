"""The toy task: its styles, its answers, and sets that share no prompt."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from tandem.engine.config import ArithmeticTask, DataConfig
from tandem.engine.data.arithmetic import Problem, annotate, prompts, sft_examples
from tandem.engine.data.generated import Split, split_of
from tandem.engine.data.prompts import load_prompts
from tandem.engine.data.sft import load_sft
from tandem.engine.data.tasks import write_task
from tandem.engine.data.tokenizer import byte_tokenizer

CAREFUL = ArithmeticTask(modulus=30, slip_probability=0.0)
CARELESS = ArithmeticTask(modulus=30, slip_probability=1.0)
PROBLEM = Problem(30, 8, (("*", 4), ("-", 9), ("*", 3), ("*", 2)))


def test_the_three_styles_are_written_as_documented() -> None:
    assert PROBLEM.text == "8*4-9*3*2?"
    assert annotate(CAREFUL, PROBLEM, "verbose", random.Random(0)) == "8*4=2;>2-9*3*2;2-9=23;>23*3*2;23*3=9;>9*2;9*2=18;A:18."
    assert annotate(CAREFUL, PROBLEM, "terse", random.Random(0)) == "8*4=2;2-9=23;23*3=9;9*2=18;A:18."
    assert annotate(CAREFUL, PROBLEM, "direct", random.Random(0)) == "A:18."


def test_slips_lose_a_sign_or_turn_seven_into_eight_and_reach_the_answer() -> None:
    assert annotate(CARELESS, Problem(30, 2, (("-", 9), ("*", 7), ("+", 1))), "terse", random.Random(0)) == "2-9=7;7*7=26;26+1=27;A:27."
    assert annotate(CARELESS, Problem(30, 2, (("-", 9),)), "direct", random.Random(0)) == "A:23."


def test_prompts_are_right_distinct_and_take_levels_in_turn() -> None:
    task = ArithmeticTask(modulus=13, min_operations=3, max_operations=4, direct_probability=(0.5, 0.5), operators="+*")
    records = prompts(task, 101, seed=5)
    assert len({record["question"] for record in records}) == 101
    for i, record in enumerate(records):
        assert (record["level"], record["domain"]) == (i % 2, "arithmetic")
        first, *operations = re.findall(r"[+*]?\d+", str(record["question"]).rstrip("?"))
        assert len(operations) == 3 + i % 2
        value = int(first)
        assert 1 <= value < 13
        for operation in operations:
            value = (value + int(operation[1:]) if operation[0] == "+" else value * int(operation[1:])) % 13
            assert 2 <= int(operation[1:]) <= 9
        assert record["answer"] == str(value)


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_prompt_whatever_the_seeds(seed: int) -> None:
    task = ArithmeticTask(modulus=10 + seed)
    splits: tuple[Split, ...] = ("train", "validation", "test")
    sets = {split: {str(record["question"]) for s in (seed, seed + 1) for record in prompts(task, 300, s, split)} for split in splits}
    sets["train"] |= {example["prompt"] for example in sft_examples(task, 3000, seed)}
    for split, texts in sets.items():
        assert {split_of(task, text) for text in texts} == {split}
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]


def test_a_split_holds_its_share_of_all_prompts() -> None:
    task = ArithmeticTask(validation_share=0.05, test_share=0.2)
    texts = [f"{start}+{a}-{b}?" for start in range(1, 100) for a in range(2, 10) for b in range(2, 10)]
    shares = {split: sum(split_of(task, text) == split for text in texts) / len(texts) for split in ("validation", "test")}
    assert shares["validation"] == pytest.approx(0.05, abs=0.015)  # five standard deviations of 6,336 draws
    assert shares["test"] == pytest.approx(0.2, abs=0.026)


def test_the_annotator_has_the_habits_it_is_given() -> None:
    task = ArithmeticTask(min_operations=2, max_operations=3, direct_probability=(0.0, 0.9), verbose_share=0.25)
    short, long = [], []
    for example in sft_examples(task, 4000, seed=0):
        (short if len(re.findall(r"[-+*]", example["prompt"])) == 2 else long).append(example["response"])
    assert not any(response.startswith("A:") for response in short)
    assert sum(">" in response for response in short) / len(short) == pytest.approx(0.25, abs=0.05)
    assert sum(response.startswith("A:") for response in long) / len(long) == pytest.approx(0.9, abs=0.04)


def test_the_same_seed_gives_the_same_data_and_another_gives_other() -> None:
    assert prompts(CAREFUL, 50, 1) == prompts(CAREFUL, 50, 1) != prompts(CAREFUL, 50, 2)
    assert sft_examples(CAREFUL, 50, 1) == sft_examples(CAREFUL, 50, 1) != sft_examples(CAREFUL, 50, 2)


def test_more_prompts_than_there_are_is_an_error_that_says_so() -> None:
    task = ArithmeticTask(modulus=2, min_operations=1, max_operations=1, direct_probability=(0.0,))
    with pytest.raises(ValueError, match="different train prompts: those with 1 operations are used up"):
        prompts(task, 100, seed=0)
    with pytest.raises(ValueError, match="the test split holds no prompt"):
        prompts(dataclasses.replace(task, test_share=0.0), 1, seed=0, split="test")


def test_impossible_tasks_are_refused() -> None:
    for name, value, rule in (
        ("modulus", 1, "at least 2"),
        ("max_operations", 1, "at least min_operations"),
        ("operators", "+/", "made of"),
        ("direct_probability", (0.5,), "one probability"),
        ("test_share", 0.95, "stay below 1"),
        ("num_test", 0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=rf"data\.task\.{name} is .*{rule}"):
            dataclasses.replace(ArithmeticTask(), **{name: value})


def test_written_files_load_as_a_users_own_would(tmp_path: Path) -> None:
    task = ArithmeticTask(num_prompts=30, num_sft_examples=20, num_validation=10, num_test=15)
    write_task(task, tmp_path / "data", seed=1)
    folder = tmp_path / "data"
    assert sorted(path.name for path in folder.iterdir()) == ["eval.jsonl", "prompts.jsonl", "sft.jsonl", "validation.jsonl"]
    for name, n in (("prompts", 30), ("validation", 10), ("eval", 15)):
        loaded = load_prompts(folder / f"{name}.jsonl", byte_tokenizer(), DataConfig(), context_length=64)
        assert len(loaded) == n
        assert {prompt.domain for prompt in loaded} == {"arithmetic"}
    assert len(load_sft(folder / "sft.jsonl", byte_tokenizer(), DataConfig(), max_tokens=256)) == 20
    held_out = (folder / "eval.jsonl").read_text()
    write_task(task, folder, seed=2)
    assert (folder / "eval.jsonl").read_text() == held_out
    assert json.loads(held_out.splitlines()[0]).keys() == {"question", "answer", "domain", "level"}
