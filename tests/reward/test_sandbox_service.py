"""The sandbox over HTTP, against the server that the command starts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tandem.engine import cli
from tandem.engine.reward.bubblewrap import UnavailableError, check_available
from tandem.engine.reward.code import grade_code
from tandem.engine.reward.code_tests import StdioTest
from tandem.engine.reward.execution import Execution, Limits, Status
from tandem.engine.reward.remote import RemoteSandbox
from tandem.engine.reward.service import to_json
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
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
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
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
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
    assert httpx.post(f"{server.url}/run", json={"source": "", "unknown": 1}, timeout=60).status_code == 422
    assert httpx.post(f"{server.url}/run", json={"source": "", "stdin": "*"}, timeout=60).status_code == 400
    assert httpx.post(f"{server.url}/run", json={"source": "", "limits": {"memory": 1}}, timeout=60).status_code == 400


def test_a_full_queue_turns_requests_away(server: Server) -> None:
    before = metric(server, "sandbox_refused_total")
    with ThreadPoolExecutor(6) as threads, httpx.Client(base_url=server.url, timeout=120) as client:

        def post(_: int) -> httpx.Response:
            return client.post("/run", json={"source": "import time; time.sleep(1)"})

        answers: list[httpx.Response] = []
        while not any(answer.status_code == 429 for answer in answers):  # once, unless the machine stands still for seconds
            answers += threads.map(post, range(6))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert metric(server, "sandbox_refused_total") == before + len(refused)


def test_a_client_that_is_turned_away_comes_back() -> None:
    answers = [(429, {"detail": "all workers are busy"}), (200, to_json(Execution(status=Status.OK, stdout=b"1\n")))]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = answers.pop(0)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        with RemoteSandbox(f"http://127.0.0.1:{http.server_address[1]}") as patient:
            done = patient.run("print(1)", limits=LIMITS)
        http.shutdown()
        thread.join()
    assert (done.stdout, answers) == (b"1\n", [])


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
