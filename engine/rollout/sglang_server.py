"""One SGLang server: started in its own environment, watched, and stopped with everything that it started or wrote.

Nothing of the trainer's environment reaches it but a link to `tandem.engine`, from which its processes run the receiver of the weights.
"""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tandem.engine.architecture import Architecture
from tandem.engine.config import SGLangConfig
from tandem.engine.quantised import problem_of_engine, quantization_config
from tandem.engine.rollout.sglang_guard import mapped_files, orphans
from tandem.engine.rollout.sglang_health import cause_in, sessions, stacks
from tandem.engine.rollout.sglang_versions import SGLangVersion, find_python, version_of
from tandem.engine.rollout_config import Quantization
from tandem.engine.types import EngineDiedError
from tandem.kernels import checksum

RECEIVER = "tandem.engine.rollout.sglang_receiver.serve"  # how the server's processes import it
_LOG_TAIL_BYTES = 3000
_LOG_BYTES = 1 << 20  # of its end, in which the cause of a death is looked for
_HEALTH_POLL_S = 0.2
_HEALTH_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 20.0
_CONTEXT_MARGIN = 8  # SGLang ends a response some tokens before its context is full
# What a rank knows of its launcher, of no use to a server: told that torchrun holds the store of its process group, it would wait for one
# for ever. The memory saver does not work with the allocator's own settings.
_OF_THE_RANK = (
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID"),
    *("TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "GROUP_RANK"),
    *("ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTHONHOME", "VIRTUAL_ENV"),
)
# The token that ends a response is the engine's business: the server must know none of its own.
_END_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class ServerSetup:
    """What a server is started with."""

    hf_config: Mapping[str, Any]
    config: SGLangConfig
    dtype: str  # "float32" or "bfloat16"
    context_length: int
    max_running: int  # requests
    quantization: Quantization | None = None  # of its matrices
    seed_sampling: bool = True
    record_routing: bool = False
    tp: int = 1
    num_threads: int = 1  # of each of the tp processes, on a CPU
    node_rank: int = 0  # of the leader among its node's ranks, each of which has a GPU: on GPUs node_rank to node_rank + tp - 1
    on_gpu: bool = False
    host: str = "127.0.0.1"  # address that it listens on
    log_path: Path | None = None  # where the server's output is appended; None: a temporary file


class SGLangServer:
    """The process. `start` returns at once; `wait_until_healthy` waits for it.

    Raises: FileNotFoundError or ValueError if there is no environment, its SGLang is of an unknown version, the port is in use, or tp
        processes cannot hold the model's blocks.
    """

    def __init__(self, setup: ServerSetup) -> None:
        if not setup.hf_config.get("architectures"):
            raise ValueError('the model\'s config.json has no `architectures`; SGLang needs it, for example ["Qwen3ForCausalLM"]')
        if setup.quantization is not None and (why := problem_of_engine(Architecture.from_hf(setup.hf_config), setup.tp)):
            raise ValueError(f"{why}; set rollout.quantization to None, or choose another rollout.tp")
        self.setup = setup
        self.python = find_python(setup.config.python)
        self.version: SGLangVersion = version_of(self.python)
        self.start()

    def start(self) -> None:
        """Start the guard (sglang_guard.py), which starts the server with weights of no meaning."""
        first = self.setup.config.port
        self.port = free_port(None if first is None else first + self.setup.node_rank, self.setup.host)
        self.is_healthy = False
        folder = Path(tempfile.mkdtemp(prefix="tandem-sglang-"))  # a short path: SGLang's sockets are in it
        _fill(folder, self.setup)
        log_path = self.setup.log_path
        self._log: IO[bytes] = tempfile.TemporaryFile() if log_path is None else log_path.open("a+b")  # noqa: SIM115
        self._log_start = self._log.seek(0, os.SEEK_END)
        self._killed_for = self._doing = ""
        command = [sys.executable, "-m", "tandem.engine.rollout.sglang_guard", str(os.getpid()), str(folder), *self._command(folder)]
        self._guard = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True)
        self._started_s = time.monotonic()
        self._files = set[str]()  # in shared memory
        self._finalizer = weakref.finalize(self, _stop, self._guard, folder, self._files, time.time(), os.getpid())

    def _command(self, folder: Path) -> list[str]:
        setup, config = self.setup, self.setup.config
        path = [folder / "python"]
        context_length = setup.context_length + _CONTEXT_MARGIN
        variables = {
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            "TMPDIR": str(folder / "tmp"),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        }
        arguments: dict[str, object] = {
            "model-path": folder / "model",
            "load-format": "dummy",
            "dtype": setup.dtype,
            "host": setup.host,
            "port": self.port,
            "tp-size": setup.tp,
            "context-length": context_length,
            "max-running-requests": setup.max_running,
            "custom-weight-loader": RECEIVER,
            "random-seed": 0,
            "log-level": "warning",
        }
        flags = ["skip-tokenizer-init", "skip-server-warmup", "incremental-streaming-output"]
        flags += ["enable-deterministic-inference"] if setup.seed_sampling else []
        flags += ["enable-return-routed-experts"] if setup.record_routing else []
        kv_tokens = config.kv_tokens
        if not setup.on_gpu:
            path.append(Path(__file__).parent / "sglang_cpu")
            # One entry for each tensor-parallel process; without a compiled sgl_kernel nothing is bound to the cores.
            binding = "|".join(["0"] * setup.tp)
            variables |= {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": binding, "OMP_NUM_THREADS": str(setup.num_threads)}
            variables["TORCHDYNAMO_DISABLE"] = "1"  # the stand-in for sgl_kernel computes hashes in NumPy, which torch.compile rewrites
            arguments |= {"device": "cpu", "attention-backend": "torch_native", "mem-fraction-static": 0.3}
            flags.append("sleep-on-idle")
            kv_tokens = setup.max_running * context_length if kv_tokens is None else kv_tokens
        else:
            arguments |= {"base-gpu-id": setup.node_rank, "mem-fraction-static": config.memory_fraction}
            flags.append("enable-memory-saver")
        if config.attention_backend is not None:
            arguments["attention-backend"] = config.attention_backend
        if kv_tokens is not None:
            arguments["max-total-tokens"] = kv_tokens
        environment = ["env", *(part for name in _OF_THE_RANK for part in ("-u", name))]
        environment += [f"PYTHONPATH={':'.join(map(str, path))}", *(f"{name}={value}" for name, value in variables.items())]
        options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        options += [f"--{flag}" for flag in flags]
        return [*environment, str(self.python), "-m", "sglang.launch_server", *options, *config.extra_args]

    @property
    def url(self) -> str:
        return f"http://[{self.setup.host}]:{self.port}" if ":" in self.setup.host else f"http://{self.setup.host}:{self.port}"

    @property
    def name(self) -> str:
        return f"SGLang {self.version.text} server (process {self._guard.pid}, port {self.port})"

    @property
    def is_alive(self) -> bool:
        """Whether the server runs; it need not be healthy yet."""
        return self._finalizer.alive and self._guard.poll() is None

    @property
    def is_closed(self) -> bool:
        return not self._finalizer.alive

    @property
    def pid(self) -> int:
        """Process id of the guard."""
        return self._guard.pid

    def wait_until_healthy(self) -> None:
        """Return once the server answers, or has. Raises: EngineDiedError if it ended, or was killed after `start_timeout_s`."""
        timeout_s = self.setup.config.start_timeout_s
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not self.is_healthy:
            if not self.is_alive:
                raise self.died("ended before it was healthy")
            if time.monotonic() > self._started_s + timeout_s:
                self.kill(f"was not healthy within rollout.sglang.start_timeout_s={timeout_s:g} s and was killed")
                raise self.died()
            try:
                with direct.open(f"{self.url}/health", timeout=_HEALTH_TIMEOUT_S) as answer:
                    self._files.update(*map(mapped_files, sessions(self._guard.pid)))
                    self.is_healthy = answer.status == 200
            except (OSError, urllib.error.URLError):
                time.sleep(_HEALTH_POLL_S)
        if not self.is_alive:
            raise self.died()

    def died(self, how: str = "") -> EngineDiedError:
        """The error for a server that is gone: why it was killed, the likely cause in its log, and the log's end."""
        how = self._killed_for or how
        if not how:
            try:
                how = f"died (exit status {self._guard.wait(_STOP_TIMEOUT_S)})"
            except subprocess.TimeoutExpired:
                how = "closed its connection"
        cause = cause_in(self._read_log(_LOG_BYTES))
        lines = [f"{self.name} {how}; call restart() and send the weights again", cause, self._doing, self.log_tail()]
        return EngineDiedError("\n".join(line for line in lines if line))

    def _read_log(self, num_bytes: int) -> str:
        """The end of what this server has said."""
        if self._log.closed:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._log_start, size - num_bytes))
        return self._log.read().decode(errors="replace").strip()

    def log_tail(self) -> str:
        if self._log.closed:
            return ""
        text = self._read_log(_LOG_TAIL_BYTES)
        where = "its log" if self.setup.log_path is None else str(self.setup.log_path)
        return f"the end of {where}:\n{text}" if text else f"{where} is empty"

    def kill(self, why: str = "") -> None:
        """Stop the server; the object stays, to tell why. With a reason, also what its processes were doing when they were stopped."""
        if why and not self._killed_for and self.is_alive:
            self._doing, self._killed_for = stacks(self._guard.pid, self.python), why
        _terminate(self._guard)

    def restart(self) -> None:
        """Replace the server, dead or alive."""
        self.close()
        self.start()

    def close(self) -> None:
        """Stop the server and all that it started; nothing of it stays in memory or on disk. May be called twice."""
        self._finalizer()
        self._log.close()


def _fill(folder: Path, setup: ServerSetup) -> None:
    """The server's model without weights, its temporary files, and what it imports of ours."""
    for name in ("model", "tmp", "python/tandem"):
        (folder / name).mkdir(parents=True)
    hf_config = {name: value for name, value in setup.hf_config.items() if name not in _END_TOKENS}
    hf_config["torch_dtype"] = setup.dtype
    if setup.quantization is not None:
        hf_config["quantization_config"] = quantization_config()
    (folder / "model" / "config.json").write_text(json.dumps(hf_config))
    (folder / "python" / "tandem" / "engine").symlink_to(Path(__file__).parents[1])
    (folder / "python" / "tandem" / "kernels").symlink_to(Path(checksum.__file__).parents[1])
    if not setup.on_gpu:
        plugin = folder / "python" / "tandem_sglang_cpu-0.dist-info"
        plugin.mkdir()
        (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: tandem-sglang-cpu\nVersion: 0\n")
        modules = ["tandem_sglang_cpu", *(["tandem_sglang_fp8"] if setup.quantization is not None else [])]
        entries = [f"{module} = {module}:load" for module in modules]
        (plugin / "entry_points.txt").write_text("\n".join(["[sglang.srt.plugins]", *entries, ""]))


def free_port(wanted: int | None, host: str = "127.0.0.1") -> int:
    """The wanted port, or any that is free. Raises: ValueError if the wanted one is in use."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, 0 if wanted is None else wanted))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(f"{host} is no address that this machine can listen on ({error}); give one of its own") from error
            origin = "it is rollout.sglang.port plus the leader's rank on its node"
            raise ValueError(f"port {wanted} is in use ({error}); {origin}: choose another, or None for any") from error
        return listener.getsockname()[1]


def _terminate(guard: subprocess.Popen[bytes]) -> None:
    guard.send_signal(signal.SIGTERM)
    try:
        guard.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        guard.kill()  # the server's processes die with it
        guard.wait()


def _stop(guard: subprocess.Popen[bytes], folder: Path, files: set[str], started_s: float, owner_pid: int) -> None:
    """Runs at `close`, when the server is garbage, and at the interpreter's exit; in forked children it does nothing."""
    if os.getpid() == owner_pid:
        _terminate(guard)
        for file in files | orphans(started_s):  # the guard has done this, unless it was killed, or was still starting
            Path(file).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
