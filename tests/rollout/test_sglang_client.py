"""HTTP to a server that counts connections and answers as told: what is reused, what is whole, and what counts as a server that is gone."""

import asyncio
import json
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from tandem.engine.rollout import sglang_client
from tandem.engine.rollout.sglang_client import ServerGoneError, SGLangClient

PATIENCE_S = 100.0
NUM_EVENTS = 5


class Counting:
    """Speaks HTTP/1.1 with kept connections, in the client's own thread."""

    def __init__(self) -> None:
        self.num_connections = self.num_open = 0
        self.holds_until = 0  # so many requests are there
        self.breaks_after: int | None = None  # events of an answer

    async def listen(self) -> str:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(next(line for line in head.split("\r\n") if line.startswith("content-length")).split(":")[1])
                body = json.loads(await reader.readexactly(length))
                self.num_open += 1
                await (self._stream(writer, body) if " /generate " in head else self._answer(writer, 200, body))
                self.num_open -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        if "refuse" in body:
            await self._answer(writer, 400, "no such thing")
            return
        while self.num_open < self.holds_until:
            await asyncio.sleep(0.001)
        self.holds_until = 0
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(NUM_EVENTS):
            if self.breaks_after == number:
                raise ConnectionError
            event = f"data: {json.dumps({'rid': body['rid'], 'number': number})}\n\n".encode()
            for part in (event[:7], event[7:]):  # an event may come in parts
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                await writer.drain()
                await asyncio.sleep(0)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()


@pytest.fixture
def server() -> Counting:
    return Counting()


@pytest.fixture
def client(server: Counting) -> Iterator[SGLangClient]:
    client = SGLangClient("")
    yield client.at(client.submit(server.listen()).result(PATIENCE_S))
    client.close()


def run(client: SGLangClient, work: Coroutine[Any, Any, Any]) -> Any:
    return client.submit(work).result(PATIENCE_S)


async def events_of(client: SGLangClient, rid: str) -> list[tuple[str, int]]:
    return [(event["rid"], event["number"]) async for event in client.stream(rid=rid)]


def test_many_responses_stream_at_once_each_whole_and_their_connections_are_used_again(server: Counting, client: SGLangClient) -> None:
    async def all_at_once(num: int) -> list[list[tuple[str, int]]]:
        return await asyncio.gather(*(events_of(client, str(i)) for i in range(num)))

    for num in (100, 30):
        server.holds_until = num
        found = run(client, all_at_once(num))
        assert found == [[(str(i), number) for number in range(NUM_EVENTS)] for i in range(num)]
    assert len(client._streams) == 100


def test_a_connection_that_was_idle_for_long_is_not_used_again(server: Counting, client: SGLangClient) -> None:
    """SGLang closes one after 5 s: a request that is on its way then would be taken for the server's death."""
    for num_connections in (2, 4):
        assert run(client, client.call("/x", a=1)) == {"a": 1}
        assert len(run(client, events_of(client, "r"))) == NUM_EVENTS
        assert server.num_connections == num_connections
        if num_connections == 2:
            time.sleep(1.1 * sglang_client._IDLE_S)
    assert sglang_client._IDLE_S < 5


def test_a_refusal_is_told_from_a_server_that_is_gone(server: Counting, client: SGLangClient) -> None:
    async def refused() -> None:
        async for _ in client.stream(rid="r", refuse=True):
            raise AssertionError("nothing is sent")

    with pytest.raises(RuntimeError, match=r"SGLang answered /generate with 400: .no such thing"):
        run(client, refused())
    server.breaks_after = 3
    with pytest.raises(ServerGoneError, match="/generate: "):
        run(client, events_of(client, "r"))
    server.breaks_after = None
    assert len(run(client, events_of(client, "r"))) == NUM_EVENTS
    with pytest.raises(ServerGoneError, match="/x: "):
        run(client, client.at("http://127.0.0.1:9").call("/x"))
