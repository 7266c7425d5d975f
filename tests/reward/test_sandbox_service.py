"""The sandbox over HTTP, against the server that the command starts."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tandem.engine import cli
from tandem.engine.reward.bubblewrap import UnavailableError, check_available
from tandem.engine.reward.code import grade_code
from tandem.engine.reward.code_tests import StdioTest
from tandem.engine.reward.execution import Limits, Status
from tandem.engine.reward.remote import RemoteSandbox
from tests.reward.chat_endpoint import wait_until

LIMITS = Limits(wall_s=10, cpu_s=3, output_bytes=1 << 16)


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(port: int) -> Server | None:
    """None if it ended."""
    words = [sys.executable, "-m", "tandem.engine.cli", "sandbox-serve", "--port", str(port), "--workers", "1", "--queue", "1"]
    words += ["--limits.wall-s", "10", "--limits.cpu-s", "3", "--limits.output-bytes", str(1 << 16)]
    process = subprocess.Popen(words)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            httpx.get(f"{url}/health", timeout=20)
            return Server(url, process)
        except httpx.HTTPError:
            time.sleep(0.1)
    return None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One worker, and one request may wait."""
    try:
        check_available(is_root=os.geteuid() == 0)
    except UnavailableError as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    started = None
    for _ in range(3):  # somebody else may get the port
        started = started or start_server(free_port())
    assert started is not None, "the server ended"
    yield started
    process = started.process
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) in (0, -signal.SIGTERM)
    assert not list(Path("/sys/fs/cgroup").rglob(f"tandem-{process.pid}-*"))


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def test_a_remote_sandbox_is_used_like_one_here(server: Server) -> None:
    with RemoteSandbox(server.url) as sandbox:
        done = sandbox.run(
            "import sys; sys.stdout.buffer.write(open('data', 'rb').read() + sys.stdin.buffer.read())",
            stdin=b"\xff\0",
            files={"data": b"\xfe"},
        )
        assert (done.status, done.stdout) == (Status.OK, b"\xfe\xff\0"), done
        assert sandbox.run("while True: pass", limits=Limits(wall_s=10, cpu_s=0.3, output_bytes=1)).status is Status.TIME_LIMIT
        assert sandbox.run("while True: print('x' * 1000)", limits=LIMITS).status is Status.OUTPUT_LIMIT
        assert grade_code("print(int(input()) + 1)", [StdioTest(stdin="1", expected="2")], sandbox).correct
        assert not grade_code("print(int(input()) + 2)", [StdioTest(stdin="1", expected="2")], sandbox).correct


def test_health_says_what_runs_here(server: Server) -> None:
    answer = httpx.get(f"{server.url}/health", timeout=20)
    assert answer.status_code == 200
    assert answer.json()["workers"] == 1
    assert "python" in answer.json()["languages"]


def test_metrics_count_runs_by_language_and_status(server: Server) -> None:
    before = metric(server, 'sandbox_runs_total{language="python",status="runtime_error"}'.replace("{", "\\{").replace("}", "\\}"))
    with RemoteSandbox(server.url) as sandbox:
        sandbox.run("1 / 0", limits=LIMITS)
    text = httpx.get(f"{server.url}/metrics").text
    assert f'sandbox_runs_total{{language="python",status="runtime_error"}} {int(before) + 1}' in text
    assert metric(server, "sandbox_run_seconds_count") == metric(server, "sandbox_runs_total")


def test_bad_requests_are_refused_with_the_rule(server: Server) -> None:
    with RemoteSandbox(server.url) as sandbox:
        with pytest.raises(ValueError, match="at most 10"):
            sandbox.run("", limits=Limits(wall_s=60))
        with pytest.raises(ValueError, match="'cobol'; it must be one of"):
            sandbox.run("", language="cobol")
        with pytest.raises(ValueError, match="must be relative"):
            sandbox.run("", files={"../x": b""})
    assert httpx.post(f"{server.url}/run", json={"source": "", "unknown": 1}).status_code == 422
    assert httpx.post(f"{server.url}/run", json={"source": "", "stdin": "*"}).status_code == 400
    assert httpx.post(f"{server.url}/run", json={"source": "", "limits": {"memory": 1}}).status_code == 400


def test_a_full_queue_turns_requests_away_and_clients_come_back(server: Server) -> None:
    sleeper = {"source": "import time; time.sleep(3)"}
    before = metric(server, "sandbox_refused_total")
    with ThreadPoolExecutor(2) as threads:

        def post() -> "Future[httpx.Response]":
            return threads.submit(httpx.post, f"{server.url}/run", json=sleeper, timeout=60)

        answers = [post()]
        wait_until(lambda: metric(server, "sandbox_running") == 1)
        answers.append(post())
        wait_until(lambda: metric(server, "sandbox_waiting") == 1)
        refused = httpx.post(f"{server.url}/run", json=sleeper, timeout=60)
        with RemoteSandbox(server.url) as patient:
            assert patient.run("print(1)", limits=LIMITS).stdout == b"1\n"
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert [answer.result().status_code for answer in answers] == [200, 200]
    assert metric(server, "sandbox_refused_total") >= before + 2  # the patient one too


def test_a_service_that_is_not_there_is_a_sandbox_error() -> None:
    with RemoteSandbox(f"http://127.0.0.1:{free_port()}", patience_s=0.5) as sandbox:
        done = sandbox.run("print(1)")
    assert done.status is Status.SANDBOX_ERROR
    assert b"ConnectError" in done.stderr


def test_without_bubblewrap_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit) as ended:
        cli.main(["sandbox-serve"])
    assert ended.value.code == 1
    assert "bwrap is not on the PATH; install bubblewrap" in capsys.readouterr().err


def test_sigterm_lets_a_run_end(server: Server) -> None:
    """Last: the server is stopping after it."""
    with RemoteSandbox(server.url) as sandbox:
        results = []
        running = threading.Thread(
            target=lambda: results.append(sandbox.run("import time; time.sleep(1.5); print('whole')", limits=LIMITS))
        )
        running.start()
        wait_until(lambda: metric(server, "sandbox_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        running.join(120)
    assert results[0].stdout == b"whole\n", results
