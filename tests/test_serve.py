"""The HTTP API, against the server that the command starts; answers against transformers in this process."""

import contextlib
import http.client
import json
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from tandem.engine.chat_api import APIError, ChatMessage, ChatRequest, TextPart, read_completion
from tandem.engine.data.tokenizer import byte_tokenizer
from tandem.engine.serve import serve
from tandem.engine.types import Completion, StopState
from tests.model_servers import CONTEXT_LENGTH, EOS, ModelServer, model_server, write_random_model
from tests.reward.chat_endpoint import wait_until
from tests.rollout.models import reference_logprobs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with model_server(tmp_path_factory.mktemp("served") / "tiny", "--queue", "24", "--batch", "8") as started:
        yield started


def post(server: ModelServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/{path}", json={"model": "tiny", **body}, timeout=60)


def complete(server: ModelServer, **body: Any) -> dict[str, Any]:
    answer = post(server, "completions", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def greedy(server: ModelServer, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates, up to its end token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens.append(int(server.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def test_a_greedy_completion_is_that_of_transformers(server: ModelServer) -> None:
    tokenizer = byte_tokenizer()
    prompt = tokenizer.encode("2 + 3 =", add_special_tokens=True)
    expected = [token for token in greedy(server, prompt, 12) if token != EOS]
    body = complete(server, prompt="2 + 3 =", max_tokens=12, temperature=0, logprobs=0)
    (choice,) = body["choices"]
    assert choice["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert choice["finish_reason"] == ("length" if len(expected) == 12 else "stop")
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": len(expected), "total_tokens": len(prompt) + len(expected)}
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(reference_logprobs(server.model, prompt, expected).tolist(), abs=1e-4)
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"]) == len(expected)
    assert complete(server, prompt=prompt, max_tokens=12, temperature=0)["choices"][0]["text"] == choice["text"], "as token ids"


def test_a_chat_completion_is_the_completion_of_its_rendered_prompt(server: ModelServer) -> None:
    """The model's folder has no chat template."""
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": [{"type": "text", "text": "2 + 3"}]}]
    answer = post(server, "chat/completions", messages=messages, max_completion_tokens=9, temperature=0.7, seed=4, logprobs=True, n=2)
    assert answer.status_code == 200, answer.text
    chat = answer.json()
    text = complete(server, prompt="system: Add.\nuser: 2 + 3\nassistant:", max_tokens=9, temperature=0.7, seed=4, logprobs=0, n=2)
    assert [choice["message"] for choice in chat["choices"]] == [{"role": "assistant", "content": c["text"]} for c in text["choices"]]
    assert chat["usage"] == text["usage"]
    assert (chat["object"], text["object"]) == ("chat.completion", "text_completion")
    for of_chat, of_text in zip(chat["choices"], text["choices"], strict=True):
        assert [token["logprob"] for token in of_chat["logprobs"]["content"]] == of_text["logprobs"]["token_logprobs"]


def test_samples_differ_and_a_seed_repeats_them_whatever_else_runs(server: ModelServer) -> None:
    def texts(**body: Any) -> list[str]:
        return [choice["text"] for choice in complete(server, prompt="Once", max_tokens=16, **body)["choices"]]

    with ThreadPoolExecutor(6) as threads:
        alone = texts(seed=7, n=3)
        beside = [threads.submit(texts, seed=seed, n=3) for seed in (7, 8, 7, 9, 7, 10)]
        several = [future.result() for future in beside]
    assert len(set(alone)) == 3
    assert several[0] == several[2] == several[4] == alone
    assert len({tuple(one) for one in several}) == 4
    assert texts() != texts()


def test_several_prompts_get_their_choices_in_order(server: ModelServer) -> None:
    prompts = ["a", "b", "c"]
    body = complete(server, prompt=prompts, max_tokens=6, temperature=0)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        assert choice["text"] == complete(server, prompt=prompt, max_tokens=6, temperature=0)["choices"][0]["text"]


def test_a_stop_text_cuts_the_answer_before_it(server: ModelServer) -> None:
    whole = complete(server, prompt=[5, 6, 7], max_tokens=40, seed=1, logprobs=0)["choices"][0]
    characters = [c for c in whole["text"][5:] if c.isascii() and c.isprintable()]
    stop = characters[0]
    cut = complete(server, prompt=[5, 6, 7], max_tokens=40, seed=1, logprobs=0, stop=[stop, "no such text"])
    (choice,) = cut["choices"]
    assert choice["text"] == whole["text"].partition(stop)[0]
    assert choice["finish_reason"] == "stop"
    num_tokens = cut["usage"]["completion_tokens"]
    assert num_tokens < 40
    assert choice["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][:num_tokens]


def completion_of(tokens: list[int], stop: StopState) -> Completion:
    return Completion(request_id="r", token_ids=tuple(tokens), logprobs=(-1.0,) * len(tokens), stop=stop, policy_version=0)


def test_of_several_stop_texts_the_first_in_the_answer_counts_and_the_end_token_is_no_text() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("한 bc\n\nd", add_special_tokens=False)
    choice = read_completion(completion_of([*tokens, EOS], StopState.FINISHED), ["\n\n", "b"], tokenizer)
    assert (choice.text, len(choice.token_ids), choice.finish) == ("한 ", 4, "stop")
    choice = read_completion(completion_of([*tokens, EOS], StopState.FINISHED), ["x"], tokenizer)
    assert (choice.text, len(choice.token_ids), choice.finish) == ("한 bc\n\nd", len(tokens), "stop")
    choice = read_completion(completion_of(tokens, StopState.LENGTH), [], tokenizer)
    assert (choice.text, choice.finish) == ("한 bc\n\nd", "length")
    choice = read_completion(completion_of(tokens, StopState.LENGTH), ["한"], tokenizer)
    assert (choice.text, choice.token_ids, choice.finish) == ("", (), "stop")


def test_the_chat_template_of_the_tokenizer_is_used_and_its_refusal_is_the_clients_error() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}[{{ m.role }}]{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    user = ChatMessage(role="user", content=[TextPart(type="text", text="a"), TextPart(type="text", text="b")])
    (tokens,) = ChatRequest(model="tiny", messages=[user]).prompts(tokenizer)
    assert tokenizer.decode(tokens) == "[user]ab[assistant]"
    with pytest.raises(APIError, match="no tools"):
        ChatRequest(model="tiny", messages=[ChatMessage(role="tool", content="x")]).prompts(tokenizer)


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"prompt": "a", "model": "other"}, 404, "there is no model 'other'; this server has 'tiny'"),
        ("completions", {}, 400, "prompt: Field required"),
        ("completions", {"prompt": ""}, 200, ""),
        ("completions", {"prompt": []}, 400, "prompt 0 is empty"),
        ("completions", {"prompt": [1, 9999]}, 400, "token ids outside of [0, 264)"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ("completions", {"prompt": "a", "max_tokens": CONTEXT_LENGTH}, 400, "exceed the context of 512 tokens"),
        ("completions", {"prompt": [1] * CONTEXT_LENGTH}, 400, "512 tokens of prompt and max_tokens=1 exceed the context"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "a", "n": 0}, 400, "n: Input should be greater"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "stop holds an empty text"),
        ("completions", {"prompt": "a", "logprobs": 5}, 400, "logprobs"),
        ("completions", {"prompt": "a", "top_p": 0.5}, 400, "top_p is 0.5; this server has only 1"),
        ("completions", {"prompt": "a", "top_p": 1.0, "user": "me", "echo": None, "max_tokens": 1}, 200, ""),
        ("completions", {"prompt": "a", "maxtokens": 5}, 400, "maxtokens is not known"),
        ("chat/completions", {"messages": MESSAGES, "stream": True}, 400, "stream is True; this server has only False"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "type 'image_url'"),
        ("embeddings", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered_gets_an_error_object_and_the_right_status(
    server: ModelServer, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    answer = post(server, path, **{**({"max_tokens": 1} if status == 200 else {}), **body})
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert message in error["message"]
        assert error["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_is_the_clients_error(server: ModelServer) -> None:
    answer = httpx.post(f"{server.url}/completions", content=b"{", headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


def test_models_and_health_are_told(server: ModelServer) -> None:
    (model,) = httpx.get(f"{server.url}/models", timeout=30).json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", CONTEXT_LENGTH)
    health = httpx.get(f"{server.url.removesuffix('/v1')}/health", timeout=30)
    assert (health.status_code, health.json()) == (200, {"model": "tiny", "open_requests": 0})


def num_open(server: ModelServer) -> int:
    return httpx.get(f"{server.url.removesuffix('/v1')}/health", timeout=30).json()["open_requests"]


def test_more_open_requests_than_allowed_get_429_until_some_are_done(server: ModelServer) -> None:
    body = json.dumps({"model": "tiny", "prompt": ["a"] * 64, "max_tokens": 500, "n": 4})
    connections = [http.client.HTTPConnection(server.url.split("/")[2]) for _ in range(24)]
    for connection in connections:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    wait_until(lambda: num_open(server) == 24)
    answer = post(server, "completions", prompt="a")
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    assert "24 requests are open, as many as this server takes" in answer.json()["error"]["message"]
    for connection in connections:
        connection.close()
    wait_until(lambda: num_open(server) == 0)
    assert complete(server, prompt="a", max_tokens=1)


def test_a_client_that_goes_away_frees_the_engine(server: ModelServer) -> None:
    """Its answer would take far longer than the next one, which does not wait for it."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/completions", json={"model": "tiny", "prompt": ["a"] * 64, "max_tokens": 500, "n": 16}, timeout=1.0)
    assert len(complete(server, prompt="a", max_tokens=1)["choices"]) == 1
    wait_until(lambda: num_open(server) == 0)


def engine_of(server: ModelServer) -> psutil.Process:
    (child,) = [p for p in psutil.Process(server.process.pid).children() if "embedded_worker" in " ".join(p.cmdline())]
    return child


def test_an_engine_that_dies_costs_its_wave_an_error_and_is_replaced(server: ModelServer) -> None:
    before = complete(server, prompt="a", max_tokens=8, seed=3)["choices"]
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(post, server, "completions", prompt=["a"] * 64, max_tokens=400, n=16)
        wait_until(lambda: num_open(server) == 1)
        while not lost.done():  # a kill before the wave has begun costs a restart, and the next one meets it
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                engine_of(server).kill()
            wait([lost], timeout=2)
        answer = lost.result()
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"
    assert "died" in answer.json()["error"]["message"]
    assert complete(server, prompt="a", max_tokens=8, seed=3)["choices"] == before


def test_sigterm_in_the_middle_of_a_wave_leaves_no_process_and_answers_everybody(tmp_path: Path) -> None:
    with model_server(tmp_path / "tiny") as server, ThreadPoolExecutor(1) as threads:
        engine = engine_of(server)
        lost = threads.submit(post, server, "completions", prompt=["a"] * 64, max_tokens=500, n=64)
        wait_until(lambda: num_open(server) == 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) in (0, -signal.SIGTERM)
        with_answer = lost.exception(30)
        assert isinstance(with_answer, httpx.TransportError) if with_answer else lost.result().status_code == 503
        psutil.wait_procs([engine], timeout=60)
        assert not engine.is_running()


def test_a_folder_without_a_model_or_a_taken_port_is_an_error_at_once(tmp_path: Path) -> None:
    def start(folder: Path, port: int, context_length: int | None = None) -> None:
        counts = {"num_threads": 1, "max_batch": 4, "max_waiting": 4, "max_tokens": 4}
        serve(folder, "127.0.0.1", port, context_length=context_length, **counts)

    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        start(tmp_path, 0)
    write_random_model(tmp_path / "tiny")
    with pytest.raises(ValueError, match="context_length is 513; it must lie between 2 and the model's 512"):
        start(tmp_path / "tiny", 0, context_length=513)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"cannot be listened on: .*choose another port, or 0 for any"):
            start(tmp_path / "tiny", taken.getsockname()[1])
