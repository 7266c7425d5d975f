"""What a server leaves in shared memory when it is killed goes with its guard; what others have there stays."""

import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

# A process that has a named semaphore, as SGLang's spawned processes share them. Nobody else is left to remove it: Python's own tracker is
# killed here, as it is with the rest of the server.
SERVER = """
import multiprocessing, os, signal, time
from multiprocessing import resource_tracker
lock = multiprocessing.get_context("spawn").Lock()
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
if os.fork():
    print(os.getpid(), lock._semlock.name, flush=True)
time.sleep(600)
"""


def start_guard(folder: Path) -> subprocess.Popen[str]:
    guard = [sys.executable, "-m", "tandem.engine.rollout.sglang_guard", str(os.getpid()), str(folder)]
    return subprocess.Popen([*guard, sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, start_new_session=True)


def read(stream: IO[str] | None) -> tuple[int, Path]:
    """Process id and semaphore that the server says."""
    assert stream is not None
    pid, name = stream.readline().split()
    return int(pid), Path(f"/dev/shm/sem.{name.removeprefix('/')}")


@pytest.mark.parametrize("ends", ["the server is killed", "the guard is told to stop"])
def test_a_killed_server_s_semaphores_are_removed_and_no_others(ends: str, tmp_path: Path) -> None:
    ours = multiprocessing.get_context("spawn").Lock()
    (tmp_path / "server").mkdir()
    with start_guard(tmp_path / "server") as guard:
        pid, semaphore = read(guard.stdout)
        assert semaphore.exists()
        os.kill(pid if ends == "the server is killed" else guard.pid, signal.SIGKILL if ends == "the server is killed" else signal.SIGTERM)
        assert guard.wait(60) == 128 + signal.SIGKILL
    assert not semaphore.exists()
    assert not (tmp_path / "server").exists()
    assert Path(f"/dev/shm/sem.{ours._semlock.name.removeprefix('/')}").exists()  # pyright: ignore[reportAttributeAccessIssue]


def test_what_a_server_made_just_before_its_end_is_removed_and_what_others_have_mapped_stays(tmp_path: Path) -> None:
    """It ends before anybody has looked at what it has."""
    made, ours = (Path(f"/dev/shm/sglang_loads_test_{os.getpid()}_{name}.shm") for name in ("made", "ours"))
    server = f"open({str(made)!r}, 'w').write('left behind')"
    (tmp_path / "server").mkdir()
    ours.write_bytes(b"in use")
    try:
        with ours.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            command = [sys.executable, "-m", "tandem.engine.rollout.sglang_guard", str(os.getpid()), str(tmp_path / "server")]
            assert subprocess.run([*command, sys.executable, "-c", server], check=False, timeout=60).returncode == 0
            assert not made.exists()
            assert ours.exists()
    finally:
        ours.unlink()
        made.unlink(missing_ok=True)
