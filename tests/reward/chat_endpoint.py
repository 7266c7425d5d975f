"""A real HTTP server that speaks the chat part of OpenAI's API and answers as a test tells it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

EXCHANGES = Path(__file__).with_name("exchanges")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of the server."""

    body: Any  # text is sent as it is, anything else as JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0


Script = Callable[[dict[str, Any], int], Answer]


@dataclass
class ChatServer:
    """Where it is, and the bodies of the requests so far."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


def completion(text: str | None, *, finish: str = "stop") -> dict[str, Any]:
    """A chat completion as OpenAI's API, SGLang and vLLM send it."""
    return {
        "id": "chatcmpl-5f1c",
        "object": "chat.completion",
        "created": 1763812000,
        "model": "grader",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": finish}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 40, "total_tokens": 340},
    }


def saying(*texts: str) -> Script:
    """One text after the other; the last again and again."""
    return lambda body, number: Answer(body=completion(texts[min(number, len(texts) - 1)]))


def read_exchanges(name: str) -> dict[str, Any]:
    return json.loads((EXCHANGES / name).read_text(encoding="utf-8"))


def recorded(name: str) -> Script:
    """Replays a file of exchanges, which says in its field `origin` where they are from.

    A request with the same messages gets the answer to it, any other status 422 and what differs.
    """
    exchanges = read_exchanges(name)["exchanges"]

    def answer(body: dict[str, Any], number: int) -> Answer:
        for exchange in exchanges:
            if exchange["request"]["messages"] == body["messages"] and exchange["request"].get("seed", body["seed"]) == body["seed"]:
                return Answer(body=exchange["response"]["body"], status=exchange["response"]["status"])
        return Answer(body={"error": {"message": f"{name} has no exchange with these messages: {json.dumps(body)}"}}, status=422)

    return answer


@contextlib.contextmanager
def chat_server(script: Script, *, models: Any = ("grader",)) -> Iterator[ChatServer]:
    """Answers POST /v1/chat/completions by the script, called with the body and how many requests there were before."""
    lock, stopped = threading.Lock(), threading.Event()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
            self._send(Answer(body=listed) if self.path == "/v1/models" else Answer(body="no such page", status=404))

        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions", self.path
            with lock:
                number = len(server.requests)
                server.requests.append(body)
                server.headers.append(dict(self.headers))
                running += 1
                server.most_at_once = max(server.most_at_once, running)
            answer = script(body, number)
            stopped.wait(answer.delay_s)
            with lock:
                running -= 1
            with contextlib.suppress(OSError):  # the client has given up
                self._send(answer)

        def _send(self, answer: Answer) -> None:
            data = (answer.body if isinstance(answer.body, str) else json.dumps(answer.body)).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        stopped.set()
        http.shutdown()
        thread.join()
        http.server_close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
