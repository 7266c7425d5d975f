"""Hidden tests made by a generator and ten submissions: recorded and misbehaving models, real programs in the sandbox."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tandem.engine.reward.agreement import Checked, Fate, Submission, check_inputs, special_judge_phrase
from tandem.engine.reward.chat import Endpoint, Message, Reply
from tandem.engine.reward.code import grade_code
from tandem.engine.reward.code_grader import read_code_tests
from tandem.engine.reward.code_tests import Runner
from tandem.engine.reward.execution import Execution, Limits, Status
from tandem.engine.reward.generator import GeneratorError, SandboxFailedError, cyaron_files, make_inputs
from tandem.engine.reward.sandbox import Sandbox
from tandem.engine.reward.testgen import Ask, Problem, Settings, generator_messages, make_tests
from tandem.engine.testgen import generate_tests
from tests.reward.chat_endpoint import chat_server, read_exchanges, recorded
from tests.reward.made_tests import made_tests
from tests.reward.sandboxes import sandbox_or_skip

STATEMENT = "You are given n (1 <= n <= 100) and n integers between 1 and 1000. Print the largest of them."
LARGEST = "n = int(input())\nprint(max(map(int, input().split())))"
LAST = "n = int(input())\nprint(input().split()[-1])"
SLOW = "while True: pass"
SMALL = Settings(num_tests=6, min_valid=5)
GENERATOR = """
from cyaron import *

def generate(io, number):
    n = 1 if number == 1 else randint(2, 5 * number)
    io.input_writeln(n)
    io.input_writeln([randint(1, 1000) for _ in range(n)])
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with sandbox_or_skip(limits=Limits(wall_s=4, cpu_s=2)) as opened:
        yield opened


def problem_of(*programs: str, statement: str = STATEMENT) -> Problem:
    return Problem(id="largest", statement=statement, submissions=tuple(Submission(source=program) for program in programs))


def replying(*texts: str) -> tuple[list[Sequence[Message]], Ask]:
    asked: list[Sequence[Message]] = []

    def ask(messages: Sequence[Message]) -> Reply:
        asked.append(messages)
        return Reply(text=texts[min(len(asked), len(texts)) - 1], is_complete=True)

    return asked, ask


def fenced(code: str) -> str:
    return f"Here it is.\n```python\n{code}\n```\n"


class Scripted:
    """Programs that are named by their answers, one for each input in turn: for rules that are about answers alone."""

    def __init__(self, **of_program: list[str | Status]) -> None:
        self._of_program = of_program
        self.num_runs = 0

    def run(self, source: str, *, stdin: bytes | str = b"", **_: object) -> Execution:
        self.num_runs += 1
        answers = self._of_program[source]
        answer = answers[int(stdin) % len(answers)]
        return Execution(status=answer) if isinstance(answer, Status) else Execution(status=Status.OK, stdout=answer.encode())


def check(runner: Runner, programs: str, num_inputs: int, min_valid: int) -> Checked:
    submissions = [Submission(source=name) for name in programs]
    return check_inputs([f"{n}\n" for n in range(num_inputs)], submissions, runner, limits=None, min_valid=min_valid)


CRASH, SLOWLY = Status.RUNTIME_ERROR, Status.TIME_LIMIT


@pytest.mark.parametrize(
    ("programs", "num_valid", "fate"),
    [
        ("rrrrrrrrrr", 4, Fate.KEPT),
        ("rrrrrrrrrw", 4, Fate.KEPT),
        ("rrrrrrrrrc", 4, Fate.KEPT),
        ("rrrrrrrrrs", 4, Fate.KEPT),
        ("rrrrrrrrww", 1, Fate.SUBMISSIONS_FAIL),
        ("rrrrrrrwcs", 1, Fate.SUBMISSIONS_FAIL),
        ("rrrrrrwwww", 0, Fate.SPECIAL_JUDGE),
        ("rrrrrrcccc", 0, Fate.TOO_FEW_TESTS),
        ("cccccccccc", 0, Fate.TOO_FEW_TESTS),
        ("eeeeeeeeee", 0, Fate.TOO_FEW_TESTS),
    ],
)
def test_seven_agreeing_make_a_test_and_nine_passing_keep_a_problem(programs: str, num_valid: int, fate: Fate) -> None:
    """r: right, w: wrong, c: crashes, s: too slow, e: prints nothing."""
    runner = Scripted(r=["5"], w=["6"], c=[CRASH], s=[SLOWLY], e=[" \n"])
    checked = check(runner, programs, 4, 4)
    assert (checked.fate, len(checked.tests)) == (fate, num_valid)
    assert bool(checked.reason) == (fate is not Fate.KEPT)
    assert [test["expected"] for test in checked.tests] == ["5"] * num_valid


def test_white_space_is_no_disagreement_and_the_first_agreeing_output_is_expected() -> None:
    runner = Scripted(a=["1 2\n3\n"], b=["1  2 3"])
    checked = check(runner, "aaaaabbbbb", 2, 2)
    assert checked.tests == [{"stdin": "0\n", "expected": "1 2\n3\n"}, {"stdin": "1\n", "expected": "1 2\n3\n"}]


def test_a_submission_need_fail_only_one_valid_test_and_none_that_is_invalid() -> None:
    runner = Scripted(r=["5"], x=["5", "5", "9"], y=[CRASH, "5", "5"])
    assert check(runner, "rrrrrrrrrx", 3, 3).failing == {9}
    assert check(runner, "rrrrrrrryx", 3, 3).fate is Fate.SUBMISSIONS_FAIL
    # the first input makes all crash: it is no test, and nobody fails it
    checked = check(Scripted(y=[CRASH, "5", "5"], r=["5"]), "yyyyyyyyyy", 3, 2)
    assert (checked.fate, checked.failing, len(checked.tests), checked.num_disputed) == (Fate.KEPT, set(), 2, 0)


def test_tests_that_are_disputed_here_and_there_do_not_make_a_special_judge() -> None:
    runner = Scripted(r=["5", "5", "5", "5"], w=["5", "6", "5", "5"])
    assert check(runner, "rrrrrwwwww", 4, 3).fate is Fate.KEPT
    checked = check(Scripted(r=["5"], w=["5", "6", "7", "5"]), "rrrrrwwwww", 4, 3)
    assert (checked.fate, checked.num_disputed) == (Fate.SPECIAL_JUDGE, 2)


def test_a_slow_submission_is_run_three_times_at_most() -> None:
    runner = Scripted(r=["5"], s=[SLOWLY])
    checked = check(runner, "rrrrrrrrrs", 20, 20)
    assert (checked.fate, checked.failing) == (Fate.KEPT, {9})
    assert runner.num_runs == 20 * 9 + 3


def test_nothing_more_is_run_once_a_problem_is_out() -> None:
    runner = Scripted(c=[CRASH])
    assert check(runner, "cccccccccc", 50, 40).fate is Fate.TOO_FEW_TESTS
    assert runner.num_runs == 11 * 10


def test_a_fault_of_the_sandbox_says_nothing_of_the_problem() -> None:
    with pytest.raises(SandboxFailedError):
        check(Scripted(r=["5", Status.SANDBOX_ERROR]), "rrrrrrrrrr", 2, 2)


@pytest.mark.parametrize(
    ("statement", "phrase"),
    [
        ("If there are multiple solutions, print any of them.", "print any"),
        ("You may output  any valid sequence.", "output  any"),
        ("If several exist, any one of them is accepted.", "any one of them"),
        ("Print the vertices in any order.", "in any order"),
        ("Your answer is right if its absolute or relative error is at most 1e-6.", "absolute or relative error"),
        ("This is an interactive problem.", "interactive problem"),
        ("A special judge is used.", "special judge"),
        ("If any of the numbers is even, print YES.", None),
        ("For any i, a_i <= n. Print the largest.", None),
        ("If there are many answers, print the lexicographically smallest.", None),
    ],
)
def test_a_statement_that_allows_several_outputs_is_left_out_by_its_words(statement: str, phrase: str | None) -> None:
    assert special_judge_phrase(statement) == phrase
    if phrase is not None:
        asked, ask = replying("")
        outcome = make_tests(problem_of(*[LARGEST] * 10, statement=statement), ask, Scripted(), SMALL)
        assert (outcome.fate, asked) == (Fate.SPECIAL_JUDGE, [])
        assert phrase in outcome.reason


def test_fewer_than_ten_submissions_are_too_few() -> None:
    asked, ask = replying("")
    outcome = make_tests(problem_of(*[LARGEST] * 9), ask, Scripted(), SMALL)
    assert (outcome.fate, outcome.reason, asked) == (Fate.TOO_FEW_SUBMISSIONS, "9 submissions can run here; 10 are needed", [])


def test_cyaron_travels_as_its_sources_alone() -> None:
    files = cyaron_files()
    assert {"cyaron/__init__.py", "cyaron/io.py", "cyaron/graders/__init__.py", "xeger/xeger.py"} <= set(files)
    assert all(name.endswith(".py") for name in files)
    assert sum(map(len, files.values())) < 1 << 20


def test_a_generator_makes_the_same_inputs_from_the_same_seed(sandbox: Sandbox) -> None:
    code = (
        "from cyaron import *\nimport random\ndef generate(io, number):\n"
        "    io.input_writeln(number, randint(1, 10**9), random.random())\n"
        "    io.input_writeln(Graph.tree(number + 1))\n    io.input_writeln(String.random_regular('[a-z]{20}'))\n"
        "    io.input_writeln(Vector.random(3, [(1, 10**6)]), String.random(12), Graph.graph(4, 3, weight_limit=(1, 9)))\n"
        "    print('to the log')\n"
    )
    first = make_inputs(code, sandbox, seed=5, num_tests=4)
    assert (len(first.texts), first.num_left_out, first.problem) == (4, 0, "")
    assert make_inputs(code, sandbox, seed=5, num_tests=4) == first
    assert not set(make_inputs(code, sandbox, seed=6, num_tests=4).texts) & set(first.texts)
    assert make_inputs(code, sandbox, seed=5, num_tests=2).texts == first.texts[:2]
    assert "log" not in "".join(first.texts)


def test_what_the_model_is_told_about_cyaron_is_so(sandbox: Sandbox) -> None:
    (instructions, _) = generator_messages(problem_of(), SMALL)
    lines = [line for line in instructions["content"].splitlines() if line.startswith("    io.")]
    code = "\n".join(["from cyaron import *", "def generate(io, number):", "    n = 5", *lines])
    inputs = make_inputs(code, sandbox, seed=1, num_tests=1)
    written = inputs.texts[0].splitlines()
    assert len(lines) == 7
    assert [len(line.split()) for line in written] == [4, 5, 5, 1, *[2] * 4, *[3] * 5, 5]
    assert len(set(written[2].split())) == 5
    assert set(written[3]) <= set("abc")
    assert all(line.split()[0] != line.split()[1] for line in written[8:13])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def generate(io, number)\n    pass", "SyntaxError"),
        ("this is no program", "SyntaxError"),
        ("x = 1", "KeyError: 'generate'"),
        ("from cyaron import *\nimport os\ndef generate(io, number):\n    io.input_writeln(os.urandom(8).hex())", "different inputs"),
        ("import numpy\ndef generate(io, number): pass", "No module named 'numpy'"),
        ("import os\nos._exit(0)", "the generator ended with ok"),
    ],
    ids=["syntax", "prose", "no function", "no determinism", "other library", "gone"],
)
def test_a_generator_that_gives_nothing_says_why(sandbox: Sandbox, code: str, message: str) -> None:
    with pytest.raises(GeneratorError, match=message):
        make_inputs(code, sandbox, seed=1, num_tests=3)


def test_inputs_of_no_use_are_left_out_and_counted(sandbox: Sandbox) -> None:
    code = (
        "def generate(io, number):\n    if number == 2: raise ValueError('n is 0')\n    if number == 3: return\n"
        "    if number == 5: io.input_writeln('x' * 300000)\n    if number == 7: import os; os._exit(3)\n"
        "    io.input_writeln(min(number, 5) if number != 6 else 1)\n"
    )
    inputs = make_inputs(code, sandbox, seed=1, num_tests=8)
    assert inputs.texts == ("1\n", "4\n")
    assert (inputs.num_left_out, inputs.problem) == (6, "test 2: ValueError: n is 0")


def test_a_recorded_exchange_gives_the_tests_that_it_gave(sandbox: Sandbox, tmp_path: Path) -> None:
    """Of a model that we trained, behind `tandem serve` (record_exchange.py). Its first generator for one problem does not run."""
    record = read_exchanges("testgen.json")
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in record["problems"]))
    settings = Settings(**record["settings"])
    with chat_server(recorded("testgen.json")) as server:
        endpoint = Endpoint(url=server.url, max_tokens=record["max_tokens"])
        counts = generate_tests(tmp_path / "problems.jsonl", tmp_path / "out", endpoint, settings, num_workers=1)
    assert counts == record["counts"]
    assert counts["kept"] == 2
    made = made_tests(tmp_path / "out")
    assert made == record["tests"]
    for test in made["largest"]:
        n, numbers = test["stdin"].split("\n")[:2]
        assert len(numbers.split()) == int(n)
        assert test["expected"].split() == [str(max(map(int, numbers.split())))]
    tests = read_code_tests(json.dumps({"tests": made["largest"]})).tests
    assert grade_code(fenced(LARGEST), tests, sandbox).correct
    assert not grade_code(fenced(LAST), tests, sandbox).correct
    [again] = [body["messages"] for body in server.requests if len(body["messages"]) > 2]
    assert [message["role"] for message in again] == ["system", "user", "assistant", "user"]
    assert "SyntaxError" in again[3]["content"]
    assert list(again[:2]) == generator_messages(problem_of(statement=record["problems"][0]["question"]), settings)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_taught_and_served_anew_gives_the_tests_of_the_record(sandbox: Sandbox, tmp_path: Path) -> None:
    """Trainer, export, `tandem serve` and the testgen command: everything that the record is of."""
    from tests.reward.record_exchange import STEPS, record  # which imports the trainer

    assert record(tmp_path, STEPS)["tests"] == read_exchanges("testgen.json")["tests"]


def test_planted_slow_and_crashing_submissions_are_told_from_right_ones(sandbox: Sandbox) -> None:
    _, ask = replying(fenced(GENERATOR))
    quick = dataclasses.replace(problem_of(*[LARGEST] * 9, SLOW), limits=Limits(wall_s=1, cpu_s=0.5))
    kept = make_tests(quick, ask, sandbox, SMALL)
    assert (kept.fate, len(kept.failing), len(kept.tests)) == (Fate.KEPT, 1, 6)
    out = make_tests(problem_of(*[LARGEST] * 8, LAST, "raise SystemExit(1)"), ask, sandbox, SMALL)
    assert (out.fate, out.tests) == (Fate.SUBMISSIONS_FAIL, ())


def test_a_problem_with_several_right_outputs_is_found_by_its_submissions(sandbox: Sandbox) -> None:
    """Any number of the list is right, and the statement does not say so."""
    _, ask = replying(fenced(GENERATOR))
    choices = [f"input()\nnumbers = sorted(map(int, input().split()))\nprint(numbers[{i} % len(numbers)])" for i in range(10)]
    outcome = make_tests(problem_of(*choices, statement="Print a number of the list."), ask, sandbox, SMALL)
    assert outcome.fate is Fate.SPECIAL_JUDGE
    assert "end well but disagree" in outcome.reason


def test_a_model_that_writes_no_generator_is_told_three_times_and_given_up(sandbox: Sandbox) -> None:
    asked, ask = replying("I cannot do that.", fenced("x = 1"), fenced("def generate(io, number): io.input_writeln(7)"))
    outcome = make_tests(problem_of(*[LARGEST] * 10), ask, sandbox, SMALL)
    assert (outcome.fate, len(asked)) == (Fate.NO_GENERATOR, 3)
    assert outcome.reason == "5 of 6 inputs are of no use; test 2 is the same as test 1"
    assert "KeyError: 'generate'" in asked[2][-1]["content"]


def test_settings_that_ask_for_more_than_there_is_are_refused() -> None:
    with pytest.raises(ValueError, match="min_valid is 51; it must lie between 1 and num_tests, 50"):
        Settings(min_valid=51)
    assert (Settings().num_tests, Settings().min_valid) == (50, 40)
