"""What is noticed of a server that hangs or ended: by its leader's questions, and from its log."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tandem.engine.config import SGLangConfig
from tandem.engine.rollout.sglang_client import SGLangClient
from tandem.engine.rollout.sglang_health import cause_in, stacks, watch

CONFIG = SGLangConfig(health_interval_s=0.01, health_timeout_s=0.2)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        listener.setblocking(False)
        yield listener


@pytest.fixture
def client(silent: socket.socket) -> Iterator[SGLangClient]:
    client = SGLangClient(f"http://127.0.0.1:{silent.getsockname()[1]}")
    yield client
    client.close()


def test_a_server_that_does_not_answer_is_told_from_one_that_is_gone(silent: socket.socket, client: SGLangClient) -> None:
    said = client.submit(watch(client, CONFIG)).result(60)
    assert said == "answered no health check for rollout.sglang.health_timeout_s=0.2 s"
    silent.close()
    assert client.submit(watch(client, CONFIG)).result(60) == ""


def test_while_a_command_runs_its_own_deadline_counts(silent: socket.socket, client: SGLangClient) -> None:
    async def ends_with_the_command() -> str:
        command = asyncio.create_task(client.call("/pause_generation"))
        watching = asyncio.create_task(watch(client, CONFIG))
        num_connections = 0
        while num_connections < 4:  # the command's, and three questions that nobody answered
            with suppress(BlockingIOError):
                connections.append(silent.accept()[0])
                num_connections += 1
            await asyncio.sleep(0.01)
        assert not watching.done()
        command.cancel()
        return await watching

    connections: list[socket.socket] = []
    assert client.submit(ends_with_the_command()).result(60).startswith("answered no health check")
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
            "it ran out of memory: lower rollout.sglang.memory_fraction",
        ),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "it ran out of memory: lower"),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 1 bytes",
            "it ran out of memory: lower",
        ),
        ("ERROR: [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use", "its port was taken"),
    ],
)
def test_the_line_of_the_log_that_tells_the_cause_is_quoted(line: str, advice: str) -> None:
    said = cause_in(f"Loading weights\n{line}\nTraceback (most recent call last):\n  File\n")
    assert said.startswith(advice)
    assert line in said


def test_a_log_without_a_known_cause_is_not_interpreted() -> None:
    assert cause_in("Loading weights\nKeyError: 'q_proj'\n") == ""


def test_a_process_that_cannot_be_looked_into_is_told_by_its_state(tmp_path: Path) -> None:
    """The guard's place is taken by this process: its child is a session of its own. No py-spy lies beside `tmp_path / "python"`."""
    command = [sys.executable, "-c", "import os; print('up', flush=True); os.kill(os.getpid(), 19)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        said = stacks(os.getpid(), tmp_path / "python")
        process.kill()
    assert f"process {process.pid}, " in said
    assert "stopped by a signal" in said
