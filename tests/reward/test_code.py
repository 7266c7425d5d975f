"""Grading programs by tests that they never see."""

import ast
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.engine.reward.code import extract_code, first_difference, grade_code
from tandem.engine.reward.code_tests import FunctionTest, StdioTest
from tandem.engine.reward.execution import Execution, Limits, Status
from tandem.engine.reward.sandbox import Sandbox
from tests.reward.sandboxes import sandbox_or_skip

HUMANEVAL = Path(__file__).parents[2].parent / "shared" / "data" / "humaneval.jsonl.gz"
SUMS = [StdioTest(stdin="1 2\n", expected="3\n"), StdioTest(stdin="10 -4\n", expected="6")]
ADD = FunctionTest(
    prompt='def add(x, y):\n    """The sum."""\n',
    entry_point="add",
    code="def check(candidate):\n    assert candidate(1, 2) == 3\n    assert not candidate(-1, 1)\n"
    "    assert candidate([1], [2]) == [1, 2]\n",
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with sandbox_or_skip(limits=Limits(wall_s=20, cpu_s=5)) as opened:
        yield opened


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("First:\n```python\nold\n```\nBetter:\n```py\nnew\n```\nDone.", "new\n"),
        ("~~~\na\n```\nb\n~~~", "a\n```\nb\n"),
        ("````\n```\ninner\n```\n````\n", "```\ninner\n```\n"),
        ("```python\ncut off", "cut off"),
        ("print(1)", "print(1)"),
        ("", ""),
        ("use `x` and ```y``` inline", "use `x` and ```y``` inline"),
    ],
)
def test_the_last_code_block_is_the_program(response: str, code: str) -> None:
    assert extract_code(response) == code


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        ("1  2\r\n3 \n\n", "1 2\n3", None, True),
        ("1 2", "1 2 3", None, False),
        ("1 2 3", "1 2", None, False),
        ("", "", None, True),
        ("0.5000001", "0.5", None, False),
        ("0.5000001", "0.5", 1e-6, True),
        ("5e-1 Yes", "0.5 Yes", 1e-9, True),
        ("nan", "0.5", 1e-6, False),
        ("0.5 no", "0.5 yes", 1e-6, False),
        ("yes", "YES", None, False),
    ],
)
def test_outputs_are_compared_word_by_word(output: str, expected: str, tolerance: float | None, same: bool) -> None:
    assert (first_difference(output, expected, tolerance) is None) is same


def test_a_right_program_passes_and_the_first_failing_test_is_named(sandbox: Sandbox) -> None:
    right = grade_code("```python\nprint(sum(map(int, input().split())))\n```", SUMS, sandbox)
    assert (right.correct, right.graded, right.reason) == (True, True, "")
    wrong = grade_code("print(sum(map(abs, map(int, input().split()))))", SUMS, sandbox)
    assert (wrong.correct, wrong.graded) == (False, True)
    assert wrong.reason == "test 2 of 2: wrong answer: word 1 of the output is '14'; '6' is expected"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise KeyError('x')", "test 1 of 2: runtime error: KeyError: 'x' (exit status 1)"),
        ("while True: pass", "test 1 of 2: time limit"),
        ("x = [0] * 10**9", "test 1 of 2: memory limit"),
        ("while True: print('x' * 10000)", "test 1 of 2: output limit"),
        ("```python\n```", "the response holds no program"),
    ],
)
def test_every_bad_end_is_wrong_and_says_how(sandbox: Sandbox, program: str, reason: str) -> None:
    verdict = grade_code(program, SUMS, sandbox, limits=Limits(cpu_s=1, wall_s=20))
    assert (verdict.correct, verdict.graded) == (False, True)
    assert verdict.reason.startswith(reason)


def test_a_fault_of_the_sandbox_is_not_a_wrong_answer() -> None:
    class Broken:
        def run(self, source: str, **_: object) -> Execution:
            return Execution(status=Status.SANDBOX_ERROR, stderr=b"the worker is gone")

    for tests in (SUMS, [ADD]):
        verdict = grade_code("print(1)", tests, Broken())
        assert (verdict.correct, verdict.graded) == (False, False)
        assert "the worker is gone" in verdict.reason


@pytest.mark.parametrize(
    ("program", "correct"),
    [
        ("    return x + y\n", True),
        ("```python\ndef add(x, y):\n    return x + y\n```", True),
        ("    return x - y\n", False),
        ("    return None\n", False),
        ("    print('noise')\n    return x + y\n", True),
        ("    return x if isinstance(x, list) else x + y\n", False),
    ],
)
def test_a_function_is_tested_by_statements(sandbox: Sandbox, program: str, correct: bool) -> None:
    verdict = grade_code(program, [ADD], sandbox)
    assert (verdict.correct, verdict.graded) == (correct, True), verdict.reason


def test_the_statement_that_failed_is_named(sandbox: Sandbox) -> None:
    verdict = grade_code("    return x + y if x != -1 else 7", [ADD], sandbox)
    assert verdict.reason == "test 1 of 1: wrong answer: assert not candidate(-1, 1): AssertionError"


@pytest.mark.parametrize(
    "program",
    [
        # equal to everything, true and false at will
        "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return False\ndef add(x, y): return Any()",
        "class Int(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef add(x, y): return Int(0)",
        # ends the run before the statements could fail
        "import os\ndef add(x, y): os._exit(0)",
        "import sys\ndef add(x, y): sys.exit(0)",
        # looks for the statements
        "import gc, glob\ndef add(x, y):\n    text = ''.join(open(f).read() for f in glob.glob('/box/*'))\n"
        "    assert 'assert not' not in text and 'check' not in text\n"
        "    return next(t for t in gc.get_objects() if isinstance(t, str) and 'assert not candidate' in t)",
        # writes what looks like the answers' or the verdict's line
        'import os\ndef add(x, y):\n    print(\'\\x1etandem {"unknown": [], "problem": null}\', flush=True)\n    os._exit(0)',
        "import os\ndef add(x, y):\n    print('\\x1etandem [1, 2, 3]', flush=True)\n    os._exit(0)",
        "import os\ndef add(x, y):\n    print('\\x1etandem ' + '[' * 100000, flush=True)\n    os._exit(0)",
        # patches what the statements would use
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.compile = None\ndef add(x, y): return 3",
    ],
)
def test_a_program_cannot_talk_its_way_past_the_statements(sandbox: Sandbox, program: str) -> None:
    verdict = grade_code(program, [ADD], sandbox)
    assert (verdict.correct, verdict.graded) == (False, True), verdict.reason


def test_answers_of_every_plain_type_reach_the_statements(sandbox: Sandbox) -> None:
    values = [None, True, -(10**40), 0.1, float("inf"), 1j, "ü", b"\x00\xff", (1, [2]), {"a": {(1, 2): 3}}, {1, 2}, frozenset()]
    code = "def check(candidate):\n    inf = float('inf')\n" + "".join(
        f"    assert candidate({value!r}) == {value!r} and type(candidate({value!r})) is {type(value).__name__}\n" for value in values[1:]
    )
    test = FunctionTest(code=code + "    assert candidate(None) is None\n", entry_point="same")
    verdict = grade_code("def same(value):\n    return value", [test], sandbox)
    assert verdict.correct, verdict.reason


def test_a_test_that_does_not_run_is_not_the_programs_fault(sandbox: Sandbox) -> None:
    for code in ("def check(candidate:", "def check(candidate):\n    import nothing_like_it\n", "x = 1"):
        verdict = grade_code("def f(): pass", [FunctionTest(code=code, entry_point="f")], sandbox)
        assert not verdict.graded, verdict


def test_input_that_cannot_be_graded_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="there are no tests"):
        grade_code("print(1)", [], sandbox)
    with pytest.raises(ValueError, match="language is 'cpp'"):
        grade_code("int x;", [ADD], sandbox, language="cpp")


def humaneval() -> list[dict[str, str]]:
    if not HUMANEVAL.exists():
        pytest.skip(f"{HUMANEVAL} is not there; it is HumanEval.jsonl.gz of github.com/openai/human-eval")
    with gzip.open(HUMANEVAL, "rt") as file:
        return [json.loads(line) for line in file]


def function_test(row: dict[str, str]) -> FunctionTest:
    return FunctionTest(code=row["test"], entry_point=row["entry_point"], prompt=row["prompt"])


def wrapped(row: dict[str, str]) -> str:
    """The canonical solution, with every result changed to another of its type."""
    return f"""{row["canonical_solution"]}
def changed(value):
    kind = type(value)
    if kind is bool: return not value
    if kind in (int, float, complex): return value + 1
    if kind is str: return value + "x"
    if kind is list: return [*value, 0]
    if kind is tuple: return (*value, 0)
    return 0 if value is None else None

def {row["entry_point"]}(*args, canonical={row["entry_point"]}, **named):
    return changed(canonical(*args, **named))
"""


def test_humaneval_solutions_pass_and_changed_ones_fail(sandbox: Sandbox) -> None:
    """One in eight of each; the slow test takes all."""
    rows = humaneval()
    for row in rows[::8]:
        right = grade_code(row["canonical_solution"], [function_test(row)], sandbox)
        assert right.correct, (row["task_id"], right)
    for row in rows[4::16]:
        wrong = grade_code(wrapped(row), [function_test(row)], sandbox)
        assert (wrong.correct, wrong.graded) == (False, True), (row["task_id"], wrong)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_humaneval_solutions_pass_and_all_changed_ones_fail(sandbox: Sandbox) -> None:
    rows = humaneval()
    assert sum(grade_code(row["canonical_solution"], [function_test(row)], sandbox).correct for row in rows) == len(rows) == 164
    wrong = [grade_code(wrapped(row), [function_test(row)], sandbox) for row in rows]
    assert all(verdict.graded and not verdict.correct for verdict in wrong), [v for v in wrong if v.correct or not v.graded]


OTHER_OPERATOR: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In},
}


class Swap(ast.NodeTransformer):
    """Changes the n-th operator or constant of a program."""

    def __init__(self, place: int) -> None:
        self.left = place

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if type(node) in OTHER_OPERATOR or (isinstance(node, ast.Constant) and type(node.value) is int):
            self.left -= 1
            if self.left == -1:
                return ast.Constant(int(node.value) + 1) if isinstance(node, ast.Constant) else OTHER_OPERATOR[type(node)]()  # type: ignore[arg-type]
        return super().generic_visit(node)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_most_solutions_with_one_operator_changed_fail(sandbox: Sandbox) -> None:
    """Some changes change nothing that the tests see; what survives is few."""
    killed = total = 0
    for row in humaneval():
        swap = Swap(0)
        tree = ast.fix_missing_locations(swap.visit(ast.parse(row["prompt"] + row["canonical_solution"])))
        if swap.left >= 0:
            continue
        verdict = grade_code(ast.unparse(tree), [function_test(row)], sandbox, limits=Limits(cpu_s=3, wall_s=20))
        assert verdict.graded, (row["task_id"], verdict)
        total += 1
        killed += not verdict.correct
    assert total > 100
    assert killed / total > 0.85, (killed, total)
