"""Real SGLang servers for tests. Starting one takes 15 s or more, so the tests of one model share it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tandem.engine.config import RolloutConfig, SGLangConfig
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_guard import SHARED_MEMORY
from tandem.engine.rollout.sglang_server import ServerSetup, SGLangServer
from tandem.engine.rollout.sglang_versions import find_python
from tests.rollout.models import CONTEXT_LENGTH

# Marks of a test that starts a server: on a busy machine that alone may take a minute or two.
MARKS = (pytest.mark.sglang, pytest.mark.timeout(400))
SGLANG = SGLangConfig(stream_interval=4, start_timeout_s=300.0)
MAX_RUNNING = 64


def marked(test: Any) -> Any:
    """The test with these marks."""
    for mark in MARKS:
        test = mark(test)
    return test


def need_sglang() -> None:
    """Skip the test where there is no environment for SGLang."""
    try:
        find_python(None)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def setup_of(model: PreTrainedModel, *, dtype: str = "float32", config: SGLangConfig = SGLANG, **fields: Any) -> ServerSetup:
    return ServerSetup(
        hf_config=model.config.to_dict() | {"architectures": [type(model).__name__]},
        config=config,
        dtype=dtype,
        context_length=CONTEXT_LENGTH,
        max_running=MAX_RUNNING,
        record_routing=model.config.model_type == "qwen3_moe",
        **fields,
    )


class Servers:
    """One for each model type and dtype. Engines of different configurations follow each other on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: dict[tuple[str, str], SGLangServer] = {}
        self._engines: dict[tuple[str, str], SGLangEngine] = {}

    def engine(
        self, model: PreTrainedModel, config: RolloutConfig, *, dtype: str = "float32", stop_token_ids: tuple[int, ...] = ()
    ) -> SGLangEngine:
        """An engine without weights; the one before it on the same server must not be used any more."""
        key = model.config.model_type, dtype
        server = self._servers.get(key)
        if server is None:
            server = SGLangServer(setup_of(model, dtype=dtype, log_path=self._folder / f"{key[0]}_{dtype}.log"))
            self._servers[key] = server
        before = self._engines.pop(key, None)
        if before is not None:
            before.disconnect()
        self._engines[key] = SGLangEngine(server, config, stop_token_ids=stop_token_ids, timeout_s=120.0)
        return self._engines[key]

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines, self._servers = {}, {}


@pytest.fixture(scope="session")
def sglang_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("sglang"))
    yield servers
    servers.close()


def server_processes() -> set[int]:
    """Process ids of guards and of SGLang's processes that these tests started, without zombies."""
    found, session = set[int](), f"TANDEM_TEST_SESSION={os.environ['TANDEM_TEST_SESSION']}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                is_server = b"sglang" in (entry / "cmdline").read_bytes().split(b"pytest")[0]
                if is_server and state != "Z" and session in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return found


def shared_files() -> set[str]:
    """What SGLang's servers have in shared memory under names."""
    return {str(path) for path in Path("/dev/shm").iterdir() if str(path).startswith(SHARED_MEMORY)}
