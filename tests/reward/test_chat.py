"""The client of OpenAI-compatible endpoints, against a real server that fails in every way."""

import socket
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.reward.chat import ChatClient, ChatError, Endpoint, MalformedReplyError, Reply, final_object, read_key
from tests.reward.chat_endpoint import Answer, chat_server, completion, saying, wait_until

WAIT_S = 120  # for what takes a moment on a quiet machine
QUESTION = [{"role": "user", "content": "How much is 2 + 3?"}]


def ask(client: ChatClient, *, num_tries: int = 1) -> "Future[str]":
    return client.submit(client.ask(QUESTION, lambda reply: reply.text, num_tries=num_tries))


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url=url, **{"attempt_s": 20.0, "deadline_s": 100.0, "max_tokens": 64, **options})


def test_a_reply_comes_back_and_the_request_has_the_fields_of_the_api() -> None:
    with chat_server(saying("5")) as server, ChatClient(endpoint(server.url, api_key="secret-1")) as client:
        assert ask(client).result(WAIT_S) == "5"
    (request,) = server.requests
    assert request == {"model": "grader", "messages": QUESTION, "max_tokens": 64, "seed": 1, "temperature": 0}
    assert server.headers[0]["Authorization"] == "Bearer secret-1"


def test_an_api_key_shows_in_no_representation() -> None:
    assert "secret" not in repr(Endpoint(url="http://x/v1", api_key="secret-1"))


@pytest.mark.parametrize(
    "bad",
    [
        Answer(body={"error": {"message": "overloaded"}}, status=503),
        Answer(body="<html>bad gateway</html>", status=502),
        Answer(body={"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0"}),
        Answer(body="<html>a proxy's page</html>"),
        Answer(body={"choices": []}),
        Answer(body=completion("too late"), delay_s=30.0),
    ],
    ids=["503", "502", "429", "no JSON", "no choice", "slow"],
)
def test_what_may_pass_by_itself_is_tried_again(bad: Answer) -> None:
    with chat_server(lambda body, number: bad if number == 0 else Answer(body=completion("5"))) as server:
        with ChatClient(endpoint(server.url, attempt_s=3.0)) as client:
            assert ask(client).result(WAIT_S) == "5"
        assert len(server.requests) == 2
        assert server.requests[0] == server.requests[1]


def test_a_refusal_is_final_and_says_what_the_endpoint_said() -> None:
    refusal = Answer(body={"error": {"message": "this model's context is 64 tokens"}}, status=400)
    with chat_server(lambda body, number: refusal) as server, ChatClient(endpoint(server.url)) as client:
        with pytest.raises(ChatError, match=r"status 400: .*context is 64 tokens"):
            ask(client).result(WAIT_S)
        assert len(server.requests) == 1


@pytest.mark.parametrize("bad", [Answer(body="", status=500), Answer(body=completion("5"), delay_s=60)], ids=["down", "hangs"])
def test_a_question_ends_by_its_deadline(bad: Answer) -> None:
    with chat_server(lambda body, number: bad) as server, ChatClient(endpoint(server.url, attempt_s=0.4, deadline_s=3)) as client:
        with pytest.raises(ChatError, match=r"no reply within 3 s; the last problem: (status 500|no answer within)"):
            ask(client).result(WAIT_S)
        assert len(server.requests) >= 2


def test_a_longer_wait_than_the_deadline_allows_is_not_begun() -> None:
    busy = Answer(body="", status=429, headers={"Retry-After": "3600"})
    with chat_server(lambda body, number: busy) as server, ChatClient(endpoint(server.url, deadline_s=1000.0)) as client:
        with pytest.raises(ChatError, match="status 429"):
            ask(client).result(WAIT_S)
        assert len(server.requests) == 1


def test_only_so_many_questions_are_asked_at_a_time_and_all_are_answered() -> None:
    second_came = threading.Event()

    def script(body: dict[str, Any], number: int) -> Answer:
        """The first answer is held back until there is a second question."""
        if number > 0:
            second_came.set()
        assert second_came.wait(WAIT_S)
        return Answer(body=completion(str(number)))

    with chat_server(script) as server:
        with ChatClient(endpoint(server.url, max_concurrent=3)) as client:
            replies = [future.result(WAIT_S) for future in [ask(client) for _ in range(24)]]
        assert sorted(map(int, replies)) == list(range(24))
        assert 1 < server.most_at_once <= 3


def test_a_reply_that_cannot_be_read_is_asked_for_again_with_another_seed() -> None:
    def read(reply: Reply) -> int:
        try:
            return int(reply.text)
        except ValueError as error:
            raise MalformedReplyError(f"{reply.text!r} is no number") from error

    with chat_server(saying("five", "5?", "5")) as server, ChatClient(endpoint(server.url)) as client:
        assert client.submit(client.ask(QUESTION, read, num_tries=3)).result(WAIT_S) == 5
        assert [(request["seed"], request["temperature"]) for request in server.requests] == [(1, 0), (2, 0.7), (3, 0.7)]
    with chat_server(saying("five")) as server, ChatClient(endpoint(server.url)) as client:
        with pytest.raises(MalformedReplyError, match=r"'five' is no number \(reply 2 of 2\)"):
            client.submit(client.ask(QUESTION, read, num_tries=2)).result(WAIT_S)
        assert len(server.requests) == 2


def test_closing_cancels_what_runs_and_refuses_more() -> None:
    with chat_server(lambda body, number: Answer(body=completion("5"), delay_s=60)) as server:
        client = ChatClient(endpoint(server.url, attempt_s=60.0))
        future = ask(client)
        wait_until(lambda: len(server.requests) == 1)
        client.close()
        client.close()
        with pytest.raises(CancelledError):
            future.result(10)
        with pytest.raises(ChatError, match="closed"):
            ask(client)


def test_an_endpoint_that_is_not_there_is_an_error_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ValueError, match=r"/v1/models does not answer .*start the server"):
            ChatClient(Endpoint(url=url))


@pytest.mark.parametrize(
    ("models", "path", "model", "message"),
    [
        (("a", "b"), "/v1", "c", "has no model 'c'; it has a, b"),
        ((), "/v1", None, "has no model None; it has none"),
        (("a",), "", None, "answers with status 404 .*ends with /v1"),
    ],
)
def test_a_model_that_is_not_there_is_an_error_at_once(models: Sequence[str], path: str, model: str | None, message: str) -> None:
    with chat_server(saying("5"), models=models) as server, pytest.raises(ValueError, match=message):
        ChatClient(Endpoint(url=server.url.removesuffix("/v1") + path, model=model))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('Both are 5.\n{"correct": true}', {"correct": True}),
        ('Both are 5.\n```json\n{"correct": false}\n```\n', {"correct": False}),
        ('{"a": {"b": [1, {"c": 2}]}, "d": "}{"}', {"a": {"b": [1, {"c": 2}]}, "d": "}{"}),
        ('It says {"correct": true}, which is a lie.\n{"correct": false}', {"correct": False}),
        ("{" * 3000 + '{"correct": true}', {"correct": True}),
        ("x" * 1_000_000 + '\n{"correct": true}', {"correct": True}),
    ],
)
def test_the_object_at_the_end_of_a_reply_is_found(text: str, found: dict[str, Any]) -> None:
    assert final_object(Reply(text=text, is_complete=True)) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no object",
        '{"correct": true',
        "{'correct': true}",
        '{"correct": true} is what the response claims, and that is wrong.',
        '[{"correct": true}]',
        '{"correct": true}}',
        '{"a":' * 50_000,
        '{"a":' * 600 + "1" + "}" * 100_000,
    ],
)
def test_a_reply_that_does_not_end_with_an_object_is_malformed(text: str) -> None:
    with pytest.raises(MalformedReplyError, match="does not end with a JSON object"):
        final_object(Reply(text=text, is_complete=True))


def test_a_reply_that_was_cut_is_malformed_even_where_an_object_stands_at_its_end() -> None:
    with pytest.raises(MalformedReplyError, match="cut"):
        final_object(Reply(text='The response says {"correct": true}', is_complete=False))


def test_a_key_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-123\n")
    assert read_key(file) == "sk-123"
    assert read_key(None) is None
    file.write_text("")
    with pytest.raises(ValueError, match="holds 0 words"):
        read_key(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_key(tmp_path / "none")
