"""Faults of the machine while programs run: none of them is ever the program's fault, and the sandbox goes on when they are over."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tandem.engine.reward.cgroups import CgroupError, find
from tandem.engine.reward.code import grade_code
from tandem.engine.reward.code_tests import StdioTest
from tandem.engine.reward.execution import MIB, Execution, Limits, Status
from tandem.engine.reward.sandbox import Sandbox
from tests.reward.chat_endpoint import wait_until
from tests.reward.sandboxes import sandbox_or_skip
from tests.reward.traces import Traces, settled

TESTS = [StdioTest(stdin="1", expected="2")]
RIGHT = "print(int(input()) + 1)"


def bubblewrap() -> psutil.Process:
    """Of the only worker."""
    return next(child for child in psutil.Process().children() if child.name() == "bwrap")


def zygote() -> psutil.Process:
    return bubblewrap().children()[0]


@contextlib.contextmanager
def mid_run(sandbox: Sandbox) -> Iterator[list[Execution]]:
    """The block happens while a program sleeps; its end is in the list after it."""
    ends: list[Execution] = []
    worker = bubblewrap()
    running = threading.Thread(target=lambda: ends.append(sandbox.run("import time; time.sleep(600)", limits=Limits(wall_s=900))))
    running.start()
    wait_until(lambda: len(worker.children(recursive=True)) >= 3, 60)  # zygote, supervisor, program
    yield ends
    running.join(60)


@pytest.mark.parametrize("part", ["zygote", "supervisor"])
def test_a_part_that_is_killed_in_mid_run_is_a_sandbox_error(part: str) -> None:
    with sandbox_or_skip() as sandbox:
        with mid_run(sandbox) as ends:
            (zygote() if part == "zygote" else zygote().children()[0]).kill()
        assert [end.status for end in ends] == [Status.SANDBOX_ERROR], ends
        assert grade_code(RIGHT, TESTS, sandbox).correct


def test_runs_go_on_without_the_process_that_made_the_namespaces_and_end_with_the_sandbox() -> None:
    with sandbox_or_skip() as sandbox:
        inside = zygote()
        bubblewrap().kill()
        assert grade_code(RIGHT, TESTS, sandbox).correct
    assert not psutil.wait_procs([inside], timeout=60)[1]


def test_without_bubblewrap_runs_are_not_graded_and_go_on_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed while the sandbox is in use: the worker that is there goes on; one that has to be replaced cannot be."""
    before = Traces.now()
    with sandbox_or_skip() as sandbox:
        with monkeypatch.context() as patched:
            patched.setenv("PATH", "/nonexistent")
            assert grade_code(RIGHT, TESTS, sandbox).correct
            zygote().kill()
            grade_code(RIGHT, TESTS, sandbox)  # which finds out
            for _ in range(2):
                verdict = grade_code(RIGHT, TESTS, sandbox)
                assert (verdict.correct, verdict.graded) == (False, False), verdict
                assert "bwrap is not on the PATH" in verdict.reason
        assert grade_code(RIGHT, TESTS, sandbox).correct
    assert settled(before) == before


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk without a free block."""
    folder = tmp_path / "full"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_for_temporary_files_changes_no_verdict(full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Traces.now()
    with sandbox_or_skip() as sandbox:
        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "tempdir", str(full_disk))
            assert grade_code(RIGHT, TESTS, sandbox).correct
            wrong = grade_code("print(1)", TESTS, sandbox)
            assert (wrong.correct, wrong.graded) == (False, True)
            filled = sandbox.run("open('/tmp/a', 'wb').write(bytes(1 << 20)); print(1)")
            assert filled.stdout == b"1\n", filled  # scratch space is the run's own
            zygote().kill()
            verdicts = [grade_code(RIGHT, TESTS, sandbox) for _ in range(2)]
            assert all(verdict.correct or not verdict.graded for verdict in verdicts), verdicts
        assert grade_code(RIGHT, TESTS, sandbox).correct
    assert settled(before) == before


def test_without_any_folder_for_temporary_files_a_worker_is_not_replaced_and_nothing_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Traces.now()
    with sandbox_or_skip() as sandbox:
        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "tempdir", "/nonexistent")
            zygote().kill()
            grade_code(RIGHT, TESTS, sandbox)  # which finds out
            for _ in range(2):
                verdict = grade_code(RIGHT, TESTS, sandbox)
                assert (verdict.correct, verdict.graded) == (False, False), verdict
                assert "did not start" in verdict.reason
        assert grade_code(RIGHT, TESTS, sandbox).correct
    assert settled(before) == before


IN_A_SMALL_CONTAINER = """
import sys, time
from pathlib import Path
from tandem.engine.reward.execution import MIB, Limits
from tandem.engine.reward.sandbox import Sandbox

Path(sys.argv[1], "cgroup.procs").write_text("0")  # everything below is in the small group, the sandbox's own groups too
with Sandbox(Limits(memory_bytes=1024 * MIB), num_workers=1) as sandbox:
    for size in (900, 1):
        done = sandbox.run(f"x = bytearray({size} << 20); x[::4096] = x[::4096]; print(len(x))")
        print(done.status.value, "|", done.stderr.decode(), flush=True)
"""


def test_a_program_that_dies_because_the_machine_has_no_memory_is_not_graded() -> None:
    """The kernel ends programs first. A group around the whole engine stands for the machine: it has less than the program may have."""
    try:
        hierarchies = find()
    except CgroupError as error:
        pytest.skip(f"no cgroups on this machine: {error}")
    if hierarchies.version != 1:
        pytest.skip("a group of version 2 that holds the engine cannot hand its controllers down")
    with sandbox_or_skip():
        pass
    container = hierarchies.folders["memory"] / f"tandem-test-{os.getpid()}"
    container.mkdir()
    try:
        (container / "memory.limit_in_bytes").write_text(str(400 * MIB))
        done = subprocess.run([sys.executable, "-c", IN_A_SMALL_CONTAINER, container], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        ends = done.stdout.splitlines()
        assert ends[0].startswith("sandbox error | the machine, or a control group around the sandbox, ran out of memory"), ends
        assert ends[1].startswith("ok |"), ends
    finally:
        wait_until(lambda: not (container / "cgroup.procs").read_text(), 60)
        container.rmdir()


HEAD_CPP = "#include <bits/stdc++.h>\n#include <unistd.h>\n"
JAVA = "public class Main {{ public static void main(String[] a) throws Exception {{ {} }} }}"
PROGRAMS = {
    "python": {
        Status.OK: RIGHT,
        Status.WRONG_ANSWER: "print(1)",
        Status.RUNTIME_ERROR: "1 / 0",
        Status.TIME_LIMIT: "while True: pass",
        Status.MEMORY_LIMIT: "x = bytearray(4 << 30)",
        Status.OUTPUT_LIMIT: "while True: print('x' * 1000)",
    },
    "cpp": {
        Status.OK: HEAD_CPP + "int main() { int n; std::cin >> n; std::cout << n + 1; }",
        Status.WRONG_ANSWER: HEAD_CPP + "int main() { std::cout << 1; }",
        Status.RUNTIME_ERROR: HEAD_CPP + "int main() { std::vector<int> x; return x.at(3); }",
        Status.TIME_LIMIT: HEAD_CPP + "int main() { for (volatile int i = 0;;) i = i + 1; }",
        Status.MEMORY_LIMIT: HEAD_CPP + "int main() { for (;;) memset(malloc(1 << 20), 1, 1 << 20); }",
        Status.OUTPUT_LIMIT: HEAD_CPP + "int main() { for (;;) puts(std::string(1000, 'x').c_str()); }",
    },
    "javascript": {
        Status.OK: "console.log(Number(require('fs').readFileSync(0, 'utf8')) + 1)",
        Status.WRONG_ANSWER: "console.log(1)",
        Status.RUNTIME_ERROR: "null.x",
        Status.TIME_LIMIT: "for (;;) ;",
        Status.MEMORY_LIMIT: "const x = []; for (;;) x.push(Buffer.alloc(1 << 20, 1))",
        Status.OUTPUT_LIMIT: "for (;;) require('fs').writeSync(1, 'x'.repeat(1000))",
    },
    "java": {
        Status.OK: JAVA.format("System.out.println(new java.util.Scanner(System.in).nextInt() + 1);"),
        Status.WRONG_ANSWER: JAVA.format("System.out.println(1);"),
        Status.RUNTIME_ERROR: JAVA.format("System.out.println(new int[1][2][3][4][5].length / (a.length));"),
        Status.TIME_LIMIT: JAVA.format("for (long i = 0; i >= 0; i = (i + 1) % 7) ;"),
        Status.MEMORY_LIMIT: JAVA.format("java.util.List<Object> x = new java.util.ArrayList<>(); for (;;) x.add(new byte[1 << 20]);"),
        Status.OUTPUT_LIMIT: JAVA.format('String x = "x".repeat(1000); for (;;) System.out.println(x);'),
    },
}  # fmt: skip
TOOL = {"cpp": "g++", "javascript": "node", "java": "javac"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("language", PROGRAMS)
def test_every_language_has_every_end(language: str) -> None:
    if language in TOOL and shutil.which(TOOL[language]) is None:
        pytest.skip(f"{TOOL[language]} is not installed")
    with sandbox_or_skip(limits=Limits(wall_s=60, cpu_s=4)) as sandbox:
        for status, program in PROGRAMS[language].items():
            verdict = grade_code(program, TESTS, sandbox, language=language)
            assert verdict.graded, (status, verdict)
            assert verdict.correct == (status is Status.OK), (status, verdict)
            if status is not Status.OK:
                assert verdict.reason.startswith(f"test 1 of 1: {status.value}"), (status, verdict)
