"""`tandem rollout-node RUN`: an SGLang server that generates for a run and has no part in its training.

It announces itself in the run folder (rollout/nodes.py) once its server is healthy. A leader of the run then sends it the weights of each
version and asks its server for responses. Commands come over HTTP and show the announcement's secret:

    POST /status            how it is: starting, serving or leaving
    POST /take_weights      come to a broadcast, verify everything in the engine, commit; or keep the old weights and say why
    POST /release           it has no requests left and may go

SIGTERM or Ctrl-C: it leaves after its present requests; at once where it has none yet, or when asked again. What it was generating when it
is killed is generated elsewhere.
"""

import dataclasses
import errno
import hmac
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import uvicorn
from fastapi import Body, FastAPI
from fastapi.exceptions import HTTPException

from tandem.engine.config import RunConfig, from_dict
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.errors import RunEnded
from tandem.engine.hardware import describe_hardware
from tandem.engine.hf_config import hf_config_of
from tandem.engine.node_config import NodeOptions
from tandem.engine.rollout.broadcast import BroadcastError, Meeting, address_towards, receive
from tandem.engine.rollout.nodes import FOLDER, PROTOCOL, Announcement, model_digest, write_announcement
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_server import ServerSetup, SGLangServer
from tandem.engine.rollout.weights import DTYPES
from tandem.engine.types import EngineDiedError, TensorMeta

_POLL_S = 0.2
_MAX_DEATHS = 3  # of its server in a row, without weights between
_JOIN_S = 10.0
_DEAF_S = 15.0
_ELSEWHERE = "192.0.2.1"  # an address of nobody (RFC 5737)


class Node:
    """One server and what leaders may ask of it."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine, self.secret = engine, secrets.token_hex(16)
        self.state = "starting"
        self.heard_s = time.monotonic()
        self.num_deaths = 0
        self.is_released = threading.Event()
        self._turn = threading.Lock()  # one command of weights at a time, and no restart meanwhile

    def app(self) -> FastAPI:
        """The commands."""
        app = FastAPI(title="Tandem rollout node", docs_url=None, redoc_url=None)

        def heard(body: dict[str, Any]) -> None:
            if not hmac.compare_digest(str(body.get("secret")).encode(), self.secret.encode()):
                raise HTTPException(403, "the secret is wrong; it is in the node's announcement")
            self.heard_s = time.monotonic()

        @app.post("/status")
        def status(body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
            heard(body)
            return {"state": self.state, "policy_version": self.engine.policy_version}

        @app.post("/release")
        def release(body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
            heard(body)
            self.is_released.set()
            return {}

        @app.post("/take_weights")
        def take_weights(body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
            heard(body)
            meeting = Meeting(**{name: body[name] for name in ("host", "port", "num_ranks", "timeout_s")})
            tensors = [TensorMeta(name=name, shape=tuple(shape), dtype=DTYPES[dtype]) for name, shape, dtype in body["tensors"]]
            with self._turn:
                try:
                    receive(self.engine, meeting, body["rank"], body["policy_version"], tensors)
                    self.engine.admit()
                except BroadcastError as error:
                    return {"reason": f"was sent no weights: {error}", "is_broadcast": True}
                except (RuntimeError, OSError) as error:  # those of the engine, and of too little memory
                    return {"reason": f"did not take the weights: {error}", "is_broadcast": False}
                finally:
                    heard(body)
            self.num_deaths = 0
            return {"reason": "", "is_broadcast": False}

        return app

    def replace_server(self) -> None:
        """Start the server anew. Raises: EngineDiedError if it dies again and again."""
        self.state = "starting"
        with self._turn:
            while True:
                self.num_deaths += 1
                try:
                    self.engine.restart()
                    self.engine.wait_until_ready()
                    return
                except EngineDiedError:
                    if self.num_deaths > _MAX_DEATHS:
                        raise


def run_node(run: Path, options: NodeOptions) -> None:
    """Until it is stopped, or nobody asks for it any more.

    Raises: ValueError or FileNotFoundError for a folder that is no run with SGLang, or an address that is not this machine's; RunEnded when
        the server does not start; SystemExit when a signal comes before it is announced.
    """
    _on_signals(_leave_at_once)
    config = _read_run(run, options.wait_s)
    hf_config = hf_config_of(config.model, load_tokenizer(config.model.path))
    host = address_towards(_ELSEWHERE) if options.host is None else options.host
    name = f"{socket.gethostname()}-{os.getpid()}" if options.name is None else options.name
    batch = config.rollout.max_batch if options.batch is None else options.batch
    python = config.rollout.sglang.python if options.python is None else options.python
    port = None if options.port is None else options.port - options.first_gpu  # servers add it, for a run's have one option
    sglang = dataclasses.replace(config.rollout.sglang, port=port, python=python)
    (run / "logs").mkdir(exist_ok=True)
    setup = ServerSetup(
        hf_config=hf_config,
        config=sglang,
        dtype=config.trainer.dtype,
        context_length=config.model.context_length,
        max_running=batch,
        record_routing=config.rollout.record_routing,
        tp=options.tp,
        num_threads=options.threads,
        node_rank=options.first_gpu,
        on_gpu=bool(describe_hardware().gpus),
        host=host,
        log_path=run / "logs" / f"node_{name}.log",
    )
    rollout = dataclasses.replace(config.rollout, tp=options.tp, sglang=sglang)
    listener = _listen(host, options.control_port)
    server = SGLangServer(setup)
    with listener, SGLangEngine(server, rollout, stop_token_ids=(), timeout_s=config.swap.timeout_s) as engine:
        node = Node(engine)
        control = uvicorn.Server(uvicorn.Config(node.app(), log_level="warning"))
        thread = threading.Thread(target=control.run, kwargs={"sockets": [listener]}, daemon=True, name="control")
        thread.start()
        try:
            digest = model_digest(hf_config, dtype=config.trainer.dtype, context_length=config.model.context_length)
            fields = {"protocol": PROTOCOL, "name": name, "host": host, "control_port": listener.getsockname()[1], "secret": node.secret}
            fields |= {"sglang": server.version.text, "model": digest, "max_batch": batch}
            _live(node, run / FOLDER, fields, options)
        except EngineDiedError as error:
            raise RunEnded(f"rollout node {name}: {error}") from error
        finally:
            control.should_exit = True
            thread.join(_JOIN_S)


def _read_run(run: Path, wait_s: float) -> RunConfig:
    path, deadline = run / "config.json", time.monotonic() + wait_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"{path} is not there after {wait_s:g} s; name the folder of a run, on a file system that both share")
        time.sleep(_POLL_S)
    try:
        config = from_dict(RunConfig, json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a run's: {error}; name the folder of a run of this version of Tandem") from error
    if not config.rollout.elastic.enabled:
        raise ValueError(f"{path} has rollout.elastic.enabled false; start the run with --rollout.elastic.enabled True")
    return config


def _listen(host: str, port: int | None) -> socket.socket:
    """For the commands: nobody else takes the port from now on. Raises: ValueError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, 0 if port is None else port))
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise ValueError(f"{host} is no address that this machine can listen on ({error}); give one of its own as --host") from error
        raise ValueError(f"port {port} is in use ({error}); choose another --control_port, or none for any that is free") from error
    return listener


def _on_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # as a shell tells of it; what was started is stopped on the way out


def _live(node: Node, folder: Path, fields: dict[str, Any], options: NodeOptions) -> None:
    """Be announced while the server is healthy; leave when told to."""
    path, stop = folder / f"{fields['name']}.json", threading.Event()
    try:
        while not stop.is_set():
            if not node.engine.is_alive:
                path.unlink(missing_ok=True)
                _on_signals(_leave_at_once)
                print("the SGLang server died and is started again", flush=True)
                node.replace_server()
            node.engine.wait_until_ready()
            if node.state != "serving":
                _on_signals(lambda *_: stop.set())
                node.state, node.heard_s = "serving", time.monotonic()
                start = f"{fields['name']}-{secrets.token_hex(4)}"
                write_announcement(folder, Announcement(**fields, start=start, port=node.engine.server.port))
                print(f"rollout node {fields['name']} is announced in {path}: {node.engine.server.url}", flush=True)
            if time.monotonic() > node.heard_s + options.idle_s:
                print(f"nobody asked for {options.idle_s:g} s: the node ends", flush=True)
                return
            stop.wait(_POLL_S)
        _on_signals(_leave_at_once)
        path.unlink(missing_ok=True)
        node.state, deadline = "leaving", time.monotonic() + options.grace_s
        print(f"leaving after the present responses, in at most {options.grace_s:g} s", flush=True)
        # A leader that has the node asks for its state all the time.
        while not node.is_released.wait(_POLL_S) and time.monotonic() < min(deadline, node.heard_s + _DEAF_S):
            continue
    finally:
        path.unlink(missing_ok=True)
