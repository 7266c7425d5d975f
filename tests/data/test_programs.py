"""The toy task of the code domain: right programs pass in the sandbox, slips fail there, and sets share no prompt."""

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.engine.config import DataConfig, ProgramTask
from tandem.engine.data.generated import Split, split_of
from tandem.engine.data.programs import ProgramProblem, annotate, prompts, sft_examples
from tandem.engine.data.prompts import load_prompts
from tandem.engine.data.sft import load_sft
from tandem.engine.data.tasks import write_task
from tandem.engine.data.tokenizer import byte_tokenizer
from tandem.engine.reward.code import grade_code
from tandem.engine.reward.code_grader import read_code_tests
from tandem.engine.reward.domains import DOMAINS
from tandem.engine.reward.sandbox import Sandbox
from tests.reward.sandboxes import sandbox_or_skip

TASK = ProgramTask()
BRACKETS = ProgramProblem((("add", 3), ("mul", 2), ("div", 4), ("sub", 5), ("mod", 7)))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with sandbox_or_skip() as opened:
        yield opened


def program(expression: str) -> str:
    return f"for x in open(0):print({expression})"


def problem_of(text: str) -> ProgramProblem:
    return ProgramProblem(tuple((word, int(operand)) for word, operand in re.findall(r"(\w+) (\d+)", text)))


def test_a_careful_annotator_writes_brackets_where_a_sum_goes_on() -> None:
    assert BRACKETS.text == "add 3, mul 2, div 4, sub 5, mod 7."
    assert annotate(BRACKETS, 0.0, random.Random(0)) == program("((int(x)+3)*2//4-5)%7")
    assert annotate(problem_of("mul 2, div 3, mod 4, add 5, sub 6."), 0.0, random.Random(0)) == program("int(x)*2//3%4+5-6")


def test_slips_forget_brackets_and_divide_by_a_slash() -> None:
    assert annotate(BRACKETS, 1.0, random.Random(0)) == program("int(x)+3*2/4-5%7")
    examples = sft_examples(TASK, 3000, seed=0)
    divisions = [example["response"] for example in examples if "div" in example["prompt"]]
    single = [text for text in divisions if text.count("/") == text.count("//") * 2 or "//" not in text]
    assert sum("//" not in text for text in single) / len(single) == pytest.approx(TASK.slip_probability, abs=0.05)


def test_prompts_are_distinct_take_levels_in_turn_and_carry_a_hidden_test() -> None:
    records = prompts(TASK, 90, seed=5)
    assert records == prompts(TASK, 90, seed=5)
    assert records != prompts(TASK, 90, seed=6)
    assert len({record["question"] for record in records}) == 90
    for i, record in enumerate(records):
        assert (record["level"], record["domain"]) == (i % 3, "code")
        operations = record["question"].rstrip(".").split(", ")
        assert len(operations) == 2 + i % 3
        (test,) = record["grading"]["tests"]
        inputs = [int(line) for line in test["stdin"].splitlines()]
        assert len(set(inputs)) == TASK.num_inputs
        assert max(map(abs, inputs)) <= TASK.max_input
        for value, line in zip(inputs, test["expected"].splitlines(), strict=True):
            for operation in operations:
                word, operand = operation.split()
                assert 2 <= int(operand) <= 9
                symbol = {"add": "+", "sub": "-", "mul": "*", "div": "//", "mod": "%"}[word]
                value = eval(f"({value}){symbol}{operand}")
            assert str(value) == line


@pytest.mark.parametrize("seed", range(3))
def test_splits_share_no_prompt_whatever_the_seeds(seed: int) -> None:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    sets = {split: {record["question"] for s in (seed, seed + 1) for record in prompts(TASK, 200, s, split)} for split in splits}
    sets["train"] |= {example["prompt"] for example in sft_examples(TASK, 3000, seed)}
    for split, texts in sets.items():
        assert {split_of(TASK, text) for text in texts} == {split}


def test_right_programs_pass_in_the_sandbox_and_slips_fail_there(sandbox: Sandbox) -> None:
    records = prompts(TASK, 40, seed=1, split="test")
    num_slipped = 0
    for record in records:
        problem, tests = problem_of(record["question"]), read_code_tests(json.dumps(record["grading"])).tests
        right, wrong = (annotate(problem, slips, random.Random(0)) for slips in (0.0, 1.0))
        assert grade_code(right, tests, sandbox).correct, record
        if wrong != right:
            num_slipped += 1
            verdict = grade_code(wrong, tests, sandbox)
            assert (verdict.graded, verdict.correct) == (True, False), (record, wrong)
            assert "wrong answer" in verdict.reason
    assert 15 < num_slipped < 40


def test_what_is_no_program_is_wrong_and_says_why(sandbox: Sandbox) -> None:
    tests = read_code_tests(json.dumps(prompts(TASK, 1, seed=0)[0]["grading"])).tests
    for text, reason in ((program("int(x)+3*"), "SyntaxError"), ("", "no program"), (program("x+3"), "TypeError")):
        verdict = grade_code(text, tests, sandbox)
        assert (verdict.graded, verdict.correct) == (True, False)
        assert reason in verdict.reason


def test_written_files_load_as_a_users_own_would_and_held_out_prompts_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    task = ProgramTask(num_prompts=30, num_sft_examples=20, num_validation=10, num_test=15)
    write_task(task, tmp_path, seed=1)
    held_out = (tmp_path / "eval.jsonl").read_text()
    for name, n in (("prompts", 30), ("validation", 10), ("eval", 15)):
        loaded = load_prompts(tmp_path / f"{name}.jsonl", byte_tokenizer(), DataConfig(), context_length=64, domains=DOMAINS)
        assert len(loaded) == n
        assert all(len(read_code_tests(prompt.grading).tests) == 1 for prompt in loaded)
    assert len(load_sft(tmp_path / "sft.jsonl", byte_tokenizer(), DataConfig(), max_tokens=96)) == 20
    write_task(task, tmp_path, seed=2)
    assert (tmp_path / "eval.jsonl").read_text() == held_out


def test_a_task_that_cannot_be_made_says_which_field_to_change() -> None:
    small = ProgramTask(min_operations=1, max_operations=1)
    with pytest.raises(ValueError, match=r"found only \d+ of 100 different train prompts: those with 1 operations are used up"):
        prompts(small, 100, seed=0)
    for name, value, rule in (
        ("min_operations", 0, "at least 1"),
        ("min_operand", 0, "between 1 and max_operand"),
        ("slip_probability", 1.5, "lie in"),
        ("num_inputs", 0, "between 1 and 199"),
        ("num_inputs", 200, "between 1 and 199"),
        ("max_input", 0, "at least 1"),
        ("num_sft_examples", 0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=rf"data\.task\.{name} is .*{rule}"):
            dataclasses.replace(TASK, **{name: value})
