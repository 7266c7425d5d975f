"""Running a generator of test inputs, written with CYaRon, in the sandbox. Same generator and seed, same inputs, to the last byte.

The sandbox's root holds no packages: CYaRon travels as files of the run, and is imported from the program's own folder.
"""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.engine.reward.code_tests import Runner, failed, shorten
from tandem.engine.reward.execution import MIB, Limits, Status

MAX_TEST_CHARS = 200_000  # of an input, and of the output to it
GENERATOR_LIMITS = Limits(wall_s=60, cpu_s=60, output_bytes=32 * MIB)
PACKAGES = ("cyaron", "xeger")  # CYaRon's third package only colours its log, which it does without
INSTALL = "it comes with Tandem; install it with `pip install cyaron`"

# One process makes all inputs. Each begins with a seed of its own, and Xeger, which draws from a generator of its own, gets ours.
DRIVER = """
import io, json, os, random, sys
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
import xeger.xeger
sys.modules["xeger.xeger"].Random = lambda: random
import cyaron
seed, num_tests = json.loads(sys.stdin.readline())
names = {"__name__": "generator"}
random.seed(f"{seed} 0")
with open("generator.py", encoding="utf-8") as file:
    exec(compile(file.read(), "generator.py", "exec"), names)
generate = names["generate"]
for number in range(1, num_tests + 1):
    random.seed(f"{seed} {number}")
    text = io.StringIO()
    try:
        written = cyaron.IO(text, disable_output=True)  # which closes its text once nobody holds it
        generate(written, number)
        answer = {"stdin": text.getvalue()}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""


class SandboxFailedError(RuntimeError):
    """The sandbox failed, not the program: nothing is known."""


class GeneratorError(RuntimeError):
    """The generator gives no inputs, or not the same ones twice; says so in words that help to write another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a generator made."""

    texts: tuple[str, ...]  # all different, none empty or too long
    num_left_out: int
    problem: str  # of the first one left out


def make_inputs(code: str, sandbox: Runner, *, seed: int, num_tests: int) -> Inputs:
    """Call `generate(io, number)` of the generator for number 1 to `num_tests`, twice over, to see whether it repeats itself.

    Raises: GeneratorError; SandboxFailedError.
    """
    first = _run(code, sandbox, seed, num_tests)
    if _run(code, sandbox, seed, num_tests) != first:
        raise GeneratorError("two runs with the same seed gave different inputs; take random numbers from CYaRon and random only")
    texts, problems = [], []
    for number, answer in enumerate(first, start=1):
        text = answer.get("stdin", "")
        if "error" in answer:
            problems.append(f"test {number}: {answer['error']}")
        elif not text.strip():
            problems.append(f"test {number} is empty; write it with io.input_writeln(...)")
        elif len(text) > MAX_TEST_CHARS:
            problems.append(f"test {number} has {len(text)} characters; at most {MAX_TEST_CHARS} are taken")
        elif text in texts:
            problems.append(f"test {number} is the same as test {texts.index(text) + 1}")
        else:
            texts.append(text)
    missing = num_tests - len(first)
    if missing:
        problems.append(f"the generator ended before test {len(first) + 1}")
    return Inputs(texts=tuple(texts), num_left_out=num_tests - len(texts), problem=shorten(problems[0], 300) if problems else "")


def _run(code: str, sandbox: Runner, seed: int, num_tests: int) -> list[dict[str, str]]:
    files = {**cyaron_files(), "generator.py": code.encode(errors="replace")}
    stdin = json.dumps([seed, num_tests]) + "\n"
    done = sandbox.run(DRIVER, stdin=stdin, files=files, limits=GENERATOR_LIMITS)
    if done.status is Status.SANDBOX_ERROR:
        raise SandboxFailedError(done.stderr.decode(errors="replace"))
    answers = []
    for line in done.stdout.decode(errors="replace").splitlines():
        try:
            answer = json.loads(line)
        except ValueError:  # cut where the run ended
            break
        answers.append({name: str(value) for name, value in answer.items()})
    if not answers:
        raise GeneratorError(f"the generator ended with {done.status}: {failed(done).reason}")
    return answers


@functools.cache
def cyaron_files() -> Mapping[str, bytes]:
    """Sources of CYaRon and of what it needs, by path. Raises: ValueError where it is not installed."""
    files: dict[str, bytes] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"the package {package} is missing; {INSTALL}")
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root.parent)
            if "tests" not in relative.parts:
                files[relative.as_posix()] = path.read_bytes()
    return files


def seed_of(problem_id: str, seed: int) -> int:
    """A problem's own seed in a run with this one."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {problem_id}".encode(errors="surrogatepass"), digest_size=6).digest(), "little")
