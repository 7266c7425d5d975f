"""Testing a function by Python statements, which must not run beside it: it could read them, or change what equality means.

Statements and function are therefore separate runs, and only calls and results, written as JSON, go between them. The statements run first
with a stand-in that writes down the arguments it is called with, and answers what passes for most things; assertions stop nothing then.
A second run calls the program's function with these arguments. The third repeats the statements as they are, with the results at hand.
Calls that show only then take another round.
"""

import json
from typing import Any

from tandem.engine.reward.code_tests import FunctionTest, Runner, TestOutcome, failed, shorten
from tandem.engine.reward.execution import Limits, Status

MAX_ROUNDS = 8
MARK = "\x1etandem "  # before the line that counts, among what the program itself prints

# JSON has no tuples, sets, bytes or infinities, and a program must not be able to hand over anything else.
VALUES = '''
import json


def encode(value):
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return {"int": hex(value)}
    if kind is float:
        return {"float": repr(value)}
    if kind is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if kind is bytes:
        return {"bytes": list(value)}
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [encode(item) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    return {"object": kind.__name__}


class Foreign:
    """Of a type that does not cross; equal to nothing."""

    __slots__ = ("kind",)

    def __init__(self, kind):
        self.kind = kind

    def __eq__(self, other):
        return False

    __hash__ = None


def decode(value):
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(float(content[0]), float(content[1]))
    if kind == "bytes":
        return bytes(content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "object":
        return Foreign(content)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in content)
'''

# The program's side. Whatever the program does here, it can only give results for the arguments that it sees.
CALLER = """
import sys
from values import decode, encode

with open("calls.json") as file:
    calls = __import__("json").load(file)
import program

function = getattr(program, calls["entry_point"])
results = []
for positional, named in calls["calls"]:
    try:
        results.append({"value": encode(function(*map(decode, positional), **{name: decode(item) for name, item in named.items()}))})
    except Exception as error:
        results.append({"raised": [type(error).__name__, str(error)[:200]]})
print("\\n" + calls["mark"] + __import__("json").dumps(results), flush=True)
"""

# The statements' side.
CHECKER = '''
import ast, builtins, json, random, traceback
from values import decode, encode

random.seed(0)  # the same calls in every round
with open("results.json") as file:
    given = json.load(file)
known = {json.dumps(call): result for call, result in given["results"]}
unknown, noted = [], set()


class Assertions(ast.NodeTransformer):
    """Evaluated for the calls in them, and nothing else."""

    def visit_Assert(self, node):
        ignore = ast.ExceptHandler(type=ast.Name("Exception", ast.Load()), name=None, body=[ast.Pass()])
        return ast.Try(body=[ast.Expr(node.test)], handlers=[ignore], orelse=[], finalbody=[])


class Anything:
    """Passes for every result, so that the statements go on to their next call."""

    def __call__(self, *args, **kwargs):
        return self

    def __bool__(self):
        return True

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self):
        return iter(())

    def __index__(self):
        return 0

    def __float__(self):
        return 0.0

    def __hash__(self):
        return 0


for name in "eq ne lt le gt ge".split():
    setattr(Anything, f"__{name}__", lambda self, other: True)
for name in "add sub mul truediv floordiv mod pow and or xor radd rsub rmul rtruediv rfloordiv rmod getitem".split():
    setattr(Anything, f"__{name}__", lambda self, other: self)
for name in "neg abs round len contains".split():
    setattr(Anything, f"__{name}__", lambda self, *_: self)
Anything.__len__ = lambda self: 0
Anything.__contains__ = lambda self, item: True


def candidate(*args, **kwargs):
    call = [[encode(arg) for arg in args], {name: encode(arg) for name, arg in kwargs.items()}]
    key = json.dumps(call)
    if key not in known:
        if key not in noted:
            noted.add(key)
            unknown.append(call)
        return Anything()
    result = known[key]
    if "raised" in result:
        kind, words = result["raised"]
        kind = getattr(builtins, kind, RuntimeError)
        raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(words)
    return decode(result["value"])


problem = None
try:
    scope = {"__name__": "statements"}
    exec(compile(given["prompt"], "prompt", "exec"), scope)
    scope[given["entry_point"]] = candidate
    statements = ast.parse(given["code"])
    if not known:
        statements = ast.fix_missing_locations(Assertions().visit(statements))
    exec(compile(statements, "test", "exec"), scope)
    scope["check"](candidate)
except BaseException as error:
    lines = given["code"].splitlines()
    places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "test"]
    line = lines[places[-1] - 1].strip() if places and places[-1] <= len(lines) else ""
    problem = [type(error).__name__, str(error)[:200], line]
print("\\n" + given["mark"] + json.dumps({"unknown": unknown, "problem": problem}), flush=True)
'''


def run_function_test(program: str, test: FunctionTest, sandbox: Runner, *, limits: Limits | None) -> TestOutcome:
    """All of `check`'s statements. A test of which the statements themselves do not run is a SANDBOX_ERROR: not the program's fault."""
    whole = whole_program(program, test)
    results: list[tuple[Any, Any]] = []
    for _ in range(MAX_ROUNDS):
        said = _check(test, results, sandbox)
        if isinstance(said, TestOutcome):
            return said
        if said["unknown"]:
            answers = _call(whole, test, said["unknown"], sandbox, limits)
            if isinstance(answers, TestOutcome):
                return answers
            results += zip(said["unknown"], answers, strict=True)
        elif said["problem"] is None:
            return TestOutcome(status=Status.OK)
        elif not results:
            return TestOutcome(status=Status.SANDBOX_ERROR, reason=f"the test fails before its first call: {': '.join(said['problem'])}")
        else:
            kind, words, line = said["problem"]
            return TestOutcome(status=Status.WRONG_ANSWER, reason=f"{shorten(line, 200)}: {kind}{': ' + words if words else ''}")
    return TestOutcome(status=Status.SANDBOX_ERROR, reason=f"the test makes new calls after {MAX_ROUNDS} rounds; it must be deterministic")


def whole_program(program: str, test: FunctionTest) -> str:
    """The prompt, continued by the program, or by one that has the function whole."""
    return f"{test.prompt.rstrip()}\n{program}" if program[:1].isspace() else f"{test.prompt}\n{program}"


def _check(test: FunctionTest, results: list[tuple[Any, Any]], sandbox: Runner) -> dict[str, Any] | TestOutcome:
    given = {"prompt": _definitions(test), "code": test.code, "entry_point": test.entry_point, "results": results, "mark": MARK}
    done = sandbox.run(CHECKER, files={"values.py": VALUES.encode(), "results.json": json.dumps(given).encode()})
    said = _marked(done.stdout)
    if done.status is not Status.OK or not isinstance(said, dict):
        return TestOutcome(status=Status.SANDBOX_ERROR, reason=f"the test's statements: {done.status}: {failed(done).reason}")
    return said


def _definitions(test: FunctionTest) -> str:
    """The prompt as a program of its own: a function that ends with its docstring is one; a bare signature gets a body."""
    try:
        compile(test.prompt, "prompt", "exec")
    except SyntaxError:
        return f"{test.prompt.rstrip()}\n    pass\n"
    return test.prompt


def _call(program: str, test: FunctionTest, calls: list[Any], sandbox: Runner, limits: Limits | None) -> list[Any] | TestOutcome:
    asked = {"entry_point": test.entry_point, "calls": calls, "mark": MARK}
    files = {"values.py": VALUES.encode(), "program.py": program.encode(errors="replace"), "calls.json": json.dumps(asked).encode()}
    done = sandbox.run(CALLER, files=files, limits=limits)
    if done.status is not Status.OK:
        return failed(done)
    answers = _marked(done.stdout)
    if not isinstance(answers, list) or len(answers) != len(calls) or not all(_is_answer(answer) for answer in answers):
        return TestOutcome(status=Status.WRONG_ANSWER, reason="the program ended without a result for every call")
    return answers


def _is_answer(answer: object) -> bool:
    return isinstance(answer, dict) and len(answer) == 1 and next(iter(answer)) in ("value", "raised")


def _marked(stdout: bytes) -> object:
    """The JSON of the last marked line; None without one. The program may have written it, so anything is possible."""
    start = stdout.rfind(MARK.encode())
    if start < 0:
        return None
    try:
        return json.loads(stdout[start + len(MARK) :].split(b"\n")[0])
    except (ValueError, RecursionError):
        return None
