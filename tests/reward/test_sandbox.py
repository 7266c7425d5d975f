"""Programs in the sandbox: what they get, what they may use, and how their end is told."""

import shutil
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from tandem.engine.reward.execution import MIB, Limits, Status
from tandem.engine.reward.languages import LanguageError
from tandem.engine.reward.sandbox import Sandbox
from tests.reward.sandboxes import sandbox_or_skip

WAIT_S = 120  # for what takes a moment on a quiet machine
ECHO = {
    "python": "print(input()[::-1])",
    "cpp": "#include <iostream>\n#include <algorithm>\n"
    'int main() { std::string s; std::cin >> s; std::reverse(s.begin(), s.end()); std::cout << s << "\\n"; }',
    "javascript": "console.log(require('fs').readFileSync(0, 'utf8').trim().split('').reverse().join(''))",
    "java": "import java.util.*;\npublic class Echo { public static void main(String[] a) {"
    " System.out.println(new StringBuilder(new Scanner(System.in).next()).reverse()); } }",
}
TOOL = {"cpp": "g++", "javascript": "node", "java": "javac"}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with sandbox_or_skip() as opened:
        yield opened


@pytest.mark.parametrize("language", ECHO)
def test_a_program_reads_stdin_and_writes_stdout(sandbox: Sandbox, language: str) -> None:
    if language in TOOL and shutil.which(TOOL[language]) is None:
        pytest.skip(f"{TOOL[language]} is not installed")
    done = sandbox.run(ECHO[language], language=language, stdin="abc\n")
    assert (done.status, done.stdout, done.exit_code) == (Status.OK, b"cba\n", 0), done.stderr.decode()
    assert 0 < done.cpu_s < sandbox.limits.cpu_s
    assert 0 < done.peak_bytes < 256 * MIB


def test_a_compiler_that_refuses_is_a_runtime_error_with_its_words(sandbox: Sandbox) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    done = sandbox.run("int main() { return nothing; }", language="cpp")
    assert done.status is Status.RUNTIME_ERROR
    assert done.compiling
    assert b"nothing" in done.stderr


@pytest.mark.parametrize(
    ("source", "exit_code", "stderr"),
    [
        ("raise ValueError('no')", 1, b'File "/box/main.py", line 1, in <module>'),
        ("import sys; sys.exit(7)", 7, b""),
        ("exit(3)", 3, b""),
        ("import sys; sys.exit('words')", 1, b"words\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, b""),
        ("def f(:", 1, b"SyntaxError"),
        ("import ctypes; ctypes.string_at(0)", -11, b""),
    ],
)
def test_an_exit_status_other_than_0_is_a_runtime_error(sandbox: Sandbox, source: str, exit_code: int, stderr: bytes) -> None:
    done = sandbox.run(source)
    assert (done.status, done.exit_code) == (Status.RUNTIME_ERROR, exit_code)
    assert stderr in done.stderr
    assert b"zygote" not in done.stderr


def test_python_programs_are_started_as_the_interpreter_would(sandbox: Sandbox) -> None:
    source = """
import atexit, sys, threading, other
from dataclasses import dataclass
@dataclass
class Pair:
    left: int
atexit.register(lambda: print("exit function"))
print(__name__, __file__, sys.argv, other.VALUE, Pair(1), sys.path[0], len(sys.stdin.read()))
threading.Timer(0.05, lambda: print("thread")).start()
"""
    done = sandbox.run(source, files={"other.py": b"VALUE = 3"}, stdin="x" * 300_000)
    assert done.status is Status.OK, done.stderr
    assert done.stdout == (b"__main__ /box/main.py ['/box/main.py'] 3 Pair(left=1) /box 300000\nthread\nexit function\n")


def test_a_deep_recursion_has_the_stack_it_was_promised(sandbox: Sandbox) -> None:
    source = """
import sys
sys.setrecursionlimit(10**6)
def f(n): return 0 if n == 0 else 1 + max([n], key=lambda _: f(n - 1)) - n  # through C, which takes C stack
f(20000)
print(1)
"""
    done = sandbox.run(source)
    assert (done.status, done.stdout) == (Status.OK, b"1\n"), done


@pytest.mark.parametrize(
    ("source", "limits", "status"),
    [
        ("while True: pass", Limits(cpu_s=0.3), Status.TIME_LIMIT),
        ("import time; time.sleep(60)", Limits(wall_s=0.3), Status.TIME_LIMIT),
        ("import os\nfor _ in range(4): os.fork()\nwhile True: pass", Limits(cpu_s=0.5), Status.TIME_LIMIT),
        ("x = bytearray(200 << 20); print(len(x))", Limits(memory_bytes=64 * MIB), Status.MEMORY_LIMIT),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", Limits(output_bytes=MIB), Status.OUTPUT_LIMIT),
        ("import sys\nwhile True: sys.stderr.write('x' * 65536)", Limits(output_bytes=MIB), Status.OUTPUT_LIMIT),
        (
            "import signal; signal.signal(25, 0)\nf = open('a', 'wb')\nwhile True: f.write(bytes(4096))",
            Limits(file_bytes=MIB),
            Status.OUTPUT_LIMIT,
        ),
    ],
)
def test_each_limit_has_its_own_status(sandbox: Sandbox, source: str, limits: Limits, status: Status) -> None:
    done = sandbox.run(source, limits=limits)
    assert done.status is status, done
    assert len(done.stdout) <= limits.output_bytes
    assert sandbox.run("print(1)").stdout == b"1\n"


def test_memory_is_measured(sandbox: Sandbox) -> None:
    small, large = (sandbox.run(f"x = bytearray({size} << 20); x[::4096] = x[::4096]").peak_bytes for size in (1, 100))
    assert 95 * MIB < large - small < 105 * MIB


def test_output_up_to_the_limit_is_kept_whole(sandbox: Sandbox) -> None:
    done = sandbox.run("print('x' * (1 << 20), end='')", limits=Limits(output_bytes=MIB))
    assert (done.status, len(done.stdout)) == (Status.OK, MIB)


def test_threads_share_the_workers_and_each_gets_its_own_result() -> None:
    with sandbox_or_skip(num_workers=2) as sandbox:
        results: dict[int, bytes] = {}

        def run(number: int) -> None:
            results[number] = sandbox.run("print(int(input()) ** 2)", stdin=str(number)).stdout

        threads = [threading.Thread(target=run, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {number: b"%d\n" % number**2 for number in range(24)}


def zygote_with_a_program(others: list[psutil.Process]) -> psutil.Process:
    """The zygote of the sandbox that is not among the others, once it runs a program."""
    [bubblewrap] = [child for child in psutil.Process().children() if child not in others]
    deadline = time.monotonic() + WAIT_S
    while len(bubblewrap.children(recursive=True)) < 3:  # zygote, supervisor, program
        assert time.monotonic() < deadline, "no program was started"
        time.sleep(0.01)
    [zygote] = bubblewrap.children()
    return zygote


def test_a_worker_that_died_is_a_sandbox_error_and_is_replaced() -> None:
    others = psutil.Process().children()
    with sandbox_or_skip(limits=Limits(wall_s=WAIT_S)) as sandbox:
        results = []
        running = threading.Thread(target=lambda: results.append(sandbox.run("import time; time.sleep(600)")))
        running.start()
        zygote_with_a_program(others).kill()
        running.join(WAIT_S)
        assert results[0].status is Status.SANDBOX_ERROR
        assert sandbox.run("print(1)").stdout == b"1\n"


def test_a_closed_sandbox_ends_those_who_wait_and_refuses_others() -> None:
    others = psutil.Process().children()
    with sandbox_or_skip() as sandbox:
        results: list[Status] = []
        threads = [threading.Thread(target=lambda: results.append(sandbox.run("import time; time.sleep(0.5)").status)) for _ in range(4)]
        for thread in threads:
            thread.start()
        zygote_with_a_program(others)
        sandbox.close()
        for thread in threads:
            thread.join(WAIT_S)
        assert results.count(Status.OK) >= 1
        assert set(results) <= {Status.OK, Status.SANDBOX_ERROR}
        assert len(results) == 4
        assert b"closed" in sandbox.run("print(1)").stderr


def test_a_sandbox_without_cgroups_says_what_it_does_not_enforce_and_limits_the_rest() -> None:
    with sandbox_or_skip(use_cgroups=False) as sandbox:
        assert "memory" in sandbox.not_enforced[0]
        assert sandbox.run("x = bytearray(1 << 30)").status is Status.MEMORY_LIMIT
        assert sandbox.run("while True: pass", limits=Limits(cpu_s=1, wall_s=30)).status is Status.TIME_LIMIT
        assert sandbox.run("print(1)").status is Status.OK


def test_bad_input_is_refused_with_the_rule(sandbox: Sandbox) -> None:
    with pytest.raises(LanguageError, match="'cobol'; it must be one of python, cpp, javascript, java"):
        sandbox.run("", language="cobol")
    for path in ("/etc/passwd", "../main.py", ""):
        with pytest.raises(ValueError, match="must be relative"):
            sandbox.run("", files={path: b""})
    with pytest.raises(ValueError, match="at most 67108864"):
        sandbox.run("", stdin=bytes(65 * MIB))
    with pytest.raises(ValueError, match=r"limits.wall_s is 0; it must be above 0"):
        Limits(wall_s=0)


def test_the_sandbox_has_none_of_the_engines_packages(sandbox: Sandbox) -> None:
    done = sandbox.run("import torch")
    assert b"No module named 'torch'" in done.stderr
    assert sys.prefix.encode() not in sandbox.run("import sys; print(sys.path)").stdout
