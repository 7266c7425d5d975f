"""Hidden tests for a programming problem that has accepted solutions and no tests (Kimi k1.5, arXiv:2501.12599, 2.3.5).

A model writes a generator of inputs from the statement, the sandbox runs it, and accepted submissions say what is expected.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tandem.engine.reward.agreement import NUM_SUBMISSIONS, Fate, Submission, check_inputs, special_judge_phrase
from tandem.engine.reward.chat import Message, Reply
from tandem.engine.reward.code import extract_code
from tandem.engine.reward.code_tests import Runner
from tandem.engine.reward.execution import Limits
from tandem.engine.reward.generator import GeneratorError, make_inputs, seed_of

NUM_GENERATORS = 3  # that a model may write for a problem, each told what was wrong with the one before
MAX_REPLY_CHARS = 8000  # of an earlier reply, when the model is asked again

Ask = Callable[[Sequence[Message]], Reply]

INSTRUCTIONS = """You write generators of test inputs for programming problems, in Python with the library CYaRon. You get the statement \
of a problem. Write a program that defines

    def generate(io, number):

which writes one whole input of the problem to `io`, a cyaron.IO, for number = 1, 2, ... {num_tests}. Write input only, never the \
expected output. Every input must fulfil all constraints of the statement, in its format. The first few are the smallest and the \
degenerate cases; then come random ones of growing size, and cases that defeat slow or wrong solutions. No two inputs are the same. Keep \
each below {max_chars} characters. Take random numbers from `random` or CYaRon only, and set no seed.

CYaRon in short, with everything from `from cyaron import *`:
    io.input_writeln(n, randint(1, 9), [1, 2])              # one line; items of a list are separated by spaces, too
    io.input_writeln(Vector.random(n, [(1, 1000)], mode=1)) # n numbers from 1 to 1000
    io.input_writeln(Vector.random(n, [(1, 1000)]))         # n different ones
    io.input_writeln(String.random(n, charset="abc"))
    io.input_writeln(Graph.tree(n).to_str(output=Edge.unweighted_edge))  # its edges, one line "u v" each; also chain, flower, binary_tree
    io.input_writeln(Graph.graph(n, n, self_loop=False, repeated_edges=False, weight_limit=(1, 9)))  # lines "u v weight"; also DAG
    io.input_writeln(Sequence(lambda i, f: f(i - 1) + 2, [1]).get(1, n))

Answer with the program in one block ```python ... ```."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A statement and programs that were accepted for it."""

    id: str
    statement: str
    submissions: tuple[Submission, ...]
    limits: Limits | None = None  # of a run; None: the sandbox's


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides about a problem, besides the model's replies."""

    num_tests: int = 50
    """Inputs that a generator makes."""
    min_valid: int = 40
    """Valid tests that a problem needs (the paper's funnel counts those with at least 40)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_valid <= self.num_tests:
            raise ValueError(f"min_valid is {self.min_valid}; it must lie between 1 and num_tests, {self.num_tests}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a problem."""

    fate: Fate
    reason: str = ""
    generator: str = ""
    num_generators: int = 0
    tests: tuple[dict[str, str], ...] = ()
    num_invalid: int = 0
    num_disputed: int = 0
    failing: tuple[int, ...] = field(default=())  # submissions, counted from 0 in the order in which they were drawn


def make_tests(problem: Problem, ask: Ask, sandbox: Runner, settings: Settings) -> Outcome:
    """Everything for one problem. A function of its arguments and of what the model replies.

    Raises: what `ask` raises; SandboxFailedError. Then nothing is known of the problem.
    """
    phrase = special_judge_phrase(problem.statement)
    if phrase is not None:
        return Outcome(fate=Fate.SPECIAL_JUDGE, reason=f"the statement says {phrase!r}")
    if len(problem.submissions) < NUM_SUBMISSIONS:
        reason = f"{len(problem.submissions)} submissions can run here; {NUM_SUBMISSIONS} are needed"
        return Outcome(fate=Fate.TOO_FEW_SUBMISSIONS, reason=reason)
    seed = seed_of(problem.id, settings.seed)
    drawn = random.Random(seed).sample(problem.submissions, NUM_SUBMISSIONS)
    messages, code, complaint = generator_messages(problem, settings), "", ""
    for number in range(1, NUM_GENERATORS + 1):
        reply = ask(messages)
        code = extract_code(reply.text)
        try:
            inputs = make_inputs(code, sandbox, seed=seed, num_tests=settings.num_tests)
            if len(inputs.texts) >= settings.min_valid:
                checked = check_inputs(inputs.texts, drawn, sandbox, limits=problem.limits, min_valid=settings.min_valid)
                return Outcome(
                    fate=checked.fate,
                    reason=checked.reason,
                    generator=code,
                    num_generators=number,
                    tests=tuple(checked.tests) if checked.fate is Fate.KEPT else (),
                    num_invalid=checked.num_invalid,
                    num_disputed=checked.num_disputed,
                    failing=tuple(sorted(checked.failing)),
                )
            complaint = f"{inputs.num_left_out} of {settings.num_tests} inputs are of no use; {inputs.problem}"
        except GeneratorError as error:
            complaint = str(error)
        messages = [*generator_messages(problem, settings), *_again(reply.text, complaint)]
    return Outcome(fate=Fate.NO_GENERATOR, reason=complaint, generator=code, num_generators=NUM_GENERATORS)


def generator_messages(problem: Problem, settings: Settings) -> list[Message]:
    """The first question to the model."""
    instructions = INSTRUCTIONS.format(num_tests=settings.num_tests, max_chars=100_000)
    return [{"role": "system", "content": instructions}, {"role": "user", "content": problem.statement}]


def _again(reply: str, complaint: str) -> list[Message]:
    return [
        {"role": "assistant", "content": reply[:MAX_REPLY_CHARS]},
        {"role": "user", "content": f"That does not work: {complaint}. Write the whole program again."},
    ]
