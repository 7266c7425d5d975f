"""Programs that attack the sandbox, its host, other runs, or the tests: none succeeds, and nothing of them is left."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tandem.engine.reward.execution import MIB, Limits, Status
from tandem.engine.reward.sandbox import Sandbox
from tests.reward.hostile import ATTACKS, SECRET, Attack
from tests.reward.sandboxes import SYSTEM_PYTHON, sandbox_or_skip
from tests.reward.traces import Traces, settled

LIMITS = Limits(wall_s=30, memory_bytes=128 * MIB, output_bytes=MIB, scratch_bytes=16 * MIB)
SHORT = dataclasses.replace(LIMITS, wall_s=0.8, cpu_s=0.5)


def limits_of(attack: Attack) -> Limits:
    """Little time for those that would take any; the others end by themselves, which takes as long as the machine needs."""
    return SHORT if Status.TIME_LIMIT in attack.ends else LIMITS


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = Traces.now()
    yield
    assert settled(before) == before


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with sandbox_or_skip(limits=LIMITS) as opened:
        yield opened


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_fails_and_leaves_nothing(sandbox: Sandbox, attack: Attack, tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    expected.write_text(SECRET)
    sandbox.run("pass")
    before = Traces.now()
    done = sandbox.run(attack.source, stdin=str(expected), limits=limits_of(attack))
    assert done.status in attack.ends, done
    assert b"BROKEN" not in done.stdout, done.stdout.decode()
    assert SECRET.encode() not in done.stdout + done.stderr
    assert expected.read_text() == SECRET
    assert settled(before) == before
    again = sandbox.run(
        "import os; print(sorted(os.listdir('/box') + os.listdir('/tmp') + os.listdir('/dev/shm')), len(os.listdir('/proc')) > 9)"
    )
    assert again.stdout == b"['main.py'] True\n", again


def test_a_program_finds_nothing_of_earlier_runs_in_its_memory(sandbox: Sandbox) -> None:
    source = """
import re, sys
wanted = bytes.fromhex(sys.stdin.read())[::-1]
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps:
        start, end, rights = re.match(r"(\\w+)-(\\w+) (\\S+)", line).groups()
        if rights.startswith("rw"):
            memory.seek(int(start, 16))
            pages = memory.read(int(end, 16) - int(start, 16))
            for match in re.finditer(re.escape(wanted[:-1]), pages):
                if pages[match.end() : match.end() + 1] == wanted[-1:]:
                    print("BROKEN")
print("searched")
"""
    secret = b"only-the-earlier-run-knows-this"
    reversed_hex = secret[::-1].hex()  # so that the search does not find itself
    for _ in range(3):
        earlier = sandbox.run(
            "import sys; print(len(sys.stdin.read())) #" + secret.decode(), stdin=secret * 1000, files={"f": secret * 1000}
        )
        assert earlier.status is Status.OK
    done = sandbox.run(source, stdin=reversed_hex)
    assert done.stdout.splitlines()[-1:] == [b"searched"], done
    assert done.stdout.count(b"BROKEN") <= 2, done  # its own `wanted`, and a copy of it


def test_nothing_but_scratch_space_can_be_written(sandbox: Sandbox) -> None:
    source = """
import os
for folder, names, files in os.walk("/"):
    if folder.startswith(("/proc", "/box", "/tmp", "/dev/shm")):
        names.clear()
        continue
    try:
        open(os.path.join(folder, "hostile"), "w")
        print("BROKEN", folder)
    except OSError:
        pass
    if folder.count("/") > 3:
        names.clear()
print("walked")
"""
    done = sandbox.run(source)
    assert done.stdout == b"walked\n", done


def test_without_cgroups_attacks_leave_nothing_either() -> None:
    before = Traces.now()
    with sandbox_or_skip(limits=LIMITS, use_cgroups=False) as sandbox:
        for attack in ATTACKS:
            done = sandbox.run(attack.source, stdin=__file__, limits=limits_of(attack))
            assert b"BROKEN" not in done.stdout, (attack.name, done.stdout.decode())
            assert done.status is not Status.SANDBOX_ERROR, (attack.name, done.stderr.decode())
        assert sandbox.run("print(1)").stdout == b"1\n"
    assert settled(before) == before


def test_in_a_user_namespace_attacks_fail_too() -> None:
    if not SYSTEM_PYTHON.exists():
        pytest.skip(f"{SYSTEM_PYTHON}, which every user may read, is not there")
    with sandbox_or_skip(limits=LIMITS, user_namespace=True, python=SYSTEM_PYTHON) as sandbox:
        for attack in ATTACKS:
            done = sandbox.run(attack.source, stdin=__file__, limits=limits_of(attack))
            assert b"BROKEN" not in done.stdout, (attack.name, done.stdout.decode())
            assert done.status in attack.ends, (attack.name, done)
        assert sandbox.run("print(1)").stdout == b"1\n"


@pytest.mark.parametrize("end", ["return", "SIGKILL"])
def test_an_engine_that_ends_without_closing_leaves_nothing(end: str, sandbox: Sandbox) -> None:
    """Killed, its groups stay until the next sandbox is made; no process does."""
    source = """
import psutil, sys, threading, time
from tandem.engine.reward.execution import Limits
from tandem.engine.reward.sandbox import Sandbox
sandbox = Sandbox(num_workers=1)
if sys.argv[1] == "SIGKILL":
    threading.Thread(target=sandbox.run, args=("import time; time.sleep(600)",), kwargs={"limits": Limits(wall_s=600)}, daemon=True).start()
    while len(psutil.Process().children(recursive=True)) < 4:  # bubblewrap, zygote, supervisor, program
        time.sleep(0.01)
print("ready", flush=True)
if sys.argv[1] == "SIGKILL":
    time.sleep(600)
"""
    engine = subprocess.Popen([sys.executable, "-c", source, end], stdout=subprocess.PIPE)
    assert engine.stdout is not None
    with engine:
        assert engine.stdout.readline() == b"ready\n"
        below = psutil.Process(engine.pid).children(recursive=True) if end == "SIGKILL" else []
        if end == "SIGKILL":
            assert len(below) >= 4, below
            engine.kill()
        engine.wait(60)
    assert not psutil.wait_procs(below, timeout=60)[1]
    with sandbox_or_skip():
        assert not [path for path in Path("/sys/fs/cgroup").rglob(f"tandem-{engine.pid}-*") if path.is_dir()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_hundreds_of_attacks_in_a_row_leave_nothing() -> None:
    before = Traces.now()
    with sandbox_or_skip(limits=Limits(wall_s=0.5, cpu_s=0.4, memory_bytes=64 * MIB, output_bytes=MIB, scratch_bytes=16 * MIB)) as sandbox:
        for number in range(400):
            attack = ATTACKS[number % len(ATTACKS)]
            done = sandbox.run(attack.source, stdin=__file__)
            assert b"BROKEN" not in done.stdout, (attack.name, done.stdout.decode())
        assert sandbox.run("print(1)").stdout == b"1\n"
    assert settled(before) == before
