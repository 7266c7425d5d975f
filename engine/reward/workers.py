"""Calls that may hang, run out of memory or crash, each in a process that can be killed.

What a Python thread computes cannot be stopped from outside, and signals reach the main thread only. A pool therefore keeps a few
child processes: a call that passes its deadline costs its worker, and another is started. Workers are plain interpreters (exec, not
fork), so that they inherit neither torch's threads nor its memory.

A worker bounds time and memory. It is no sandbox: it may read files and open sockets, so untrusted *programs* do not belong here.
"""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from tandem.engine.reward.worker_process import Answer, Start

# A start that takes longer has failed; the initialiser's imports on a busy machine take some seconds.
START_TIMEOUT_S = 120.0


class WorkerError(RuntimeError):
    """A call that came to no result: it raised, its worker died or could not start, or the pool was closed."""


class WorkerTimeoutError(WorkerError):
    """A call that passed its deadline; its worker was killed."""


@dataclass
class _Call:
    name: str
    message: bytes
    deadline_s: float  # seconds from the moment a worker gets it
    future: Future[Any]


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    call: _Call | None = None
    is_ready: bool = False
    due: float = field(default_factory=lambda: time.monotonic() + START_TIMEOUT_S)  # when to kill it


class WorkerPool:
    """At most `num_workers` child processes that run functions, one call at a time each. Safe to use from any thread.

    Nothing is started before the first call. A fork of this process gets workers of its own when it makes a call. All workers end with
    `close`, with the interpreter, and with a `kill -9` of it.
    """

    def __init__(
        self, num_workers: int, *, deadline_s: float, max_bytes: int = 2 << 30, initialise: Callable[[], object] | None = None
    ) -> None:
        """
        Args:
            deadline_s: how long a call may take, unless `submit` says otherwise, in seconds of wall time.
            max_bytes: address space of a worker, the interpreter and its libraries included.
            initialise: run by each worker before its first call, outside any deadline: slow imports. Importable by name.
        Raises: ValueError for a limit that is not positive, or a function that a worker cannot import.
        """
        for name, value in (("num_workers", num_workers), ("deadline_s", deadline_s), ("max_bytes", max_bytes)):
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        self.num_workers, self.deadline_s = num_workers, deadline_s
        self._max_bytes, self._initialise = max_bytes, None if initialise is None else _message(initialise, ())
        self._forget()
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (pool := reference()) and pool._forget())

    def submit(self, function: Callable[..., Any], *arguments: Any, deadline_s: float | None = None) -> Future[Any]:
        """Queue a call; returns at once.

        Args:
            function: of a module that a worker can import; it is sent by its name, the arguments pickled.
            deadline_s: in place of the pool's. It counts from the moment a worker takes the call, not while the call is queued.
        Returns: a future of the result. Its exception is WorkerTimeoutError past the deadline, else WorkerError with the reason.
            Callbacks run on the pool's thread and must be short. Cancelling takes a call out of the queue, not out of a worker.
        Raises: ValueError for a function without an import name, WorkerError once the pool is closed, whatever pickle raises.
        """
        call = _Call(
            name=f"{function.__module__}.{function.__qualname__}",
            message=_message(function, arguments),
            deadline_s=self.deadline_s if deadline_s is None else deadline_s,
            future=Future(),
        )
        with self._lock:
            if self._closed:
                raise WorkerError("the worker pool is closed")
            if self._dispatcher is None:
                start = Start(path=list(sys.path), max_bytes=self._max_bytes, initialise=self._initialise)
                self._dispatcher = _Dispatcher(self.num_workers, start)
                self._finalizer = weakref.finalize(self, _Dispatcher.close, self._dispatcher)
        self._dispatcher.add(call)
        return call.future

    def run(self, function: Callable[..., Any], *arguments: Any, deadline_s: float | None = None) -> Any:
        """`submit`, and wait for the result.

        Raises: as `submit`, and the exceptions of its future.
        """
        return self.submit(function, *arguments, deadline_s=deadline_s).result()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [] if self._dispatcher is None else [worker.process.pid for worker in tuple(self._dispatcher.workers)]

    def close(self) -> None:
        """Kill the workers; calls that have no result yet get a WorkerError. May be called twice."""
        with self._lock:
            self._closed = True
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._dispatcher: _Dispatcher | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None


class _Dispatcher:
    """The thread that starts workers, hands out calls, and kills what is late.

    One thread does all of it because a worker dies with the *thread* that started it (PR_SET_PDEATHSIG), which must therefore live as
    long as the pool.
    """

    def __init__(self, num_workers: int, start: Start) -> None:
        self._num_workers, self._start, self._owner_pid = num_workers, start, os.getpid()
        self.workers: list[_Worker] = []
        self._queue: deque[_Call] = deque()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._dispatch, name="worker-pool", daemon=True)
        self._thread.start()

    def add(self, call: _Call) -> None:
        self._queue.append(call)
        if self._closing.is_set():
            self._fail_queue("the worker pool is closed")
        self._wake()

    def close(self) -> None:
        """Runs at `WorkerPool.close`, when the pool is garbage, and at the interpreter's exit; in forked children it does nothing."""
        if os.getpid() != self._owner_pid:
            return
        self._closing.set()
        self._wake()
        if threading.current_thread() is not self._thread:  # a callback may drop the last reference to a pool
            self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; closed: the thread has ended
            self._wake_writer.send(b"x")

    def _dispatch(self) -> None:
        try:
            while not self._closing.is_set():
                self._hand_out()
                dues = [worker.due for worker in self.workers if worker.call is not None or not worker.is_ready]
                timeout_s = max(0.0, min(dues) - time.monotonic()) if dues else None
                for ready in wait([self._wake_reader, *(worker.connection for worker in self.workers)], timeout_s):
                    if ready is self._wake_reader:
                        self._wake_reader.recv(1 << 16)
                    else:
                        self._receive(next(worker for worker in self.workers if worker.connection is ready))
                self._kill_late()
        finally:
            for worker in tuple(self.workers):
                self._discard(worker, WorkerError("the worker pool was closed"))
            self._fail_queue("the worker pool was closed")
            self._wake_reader.close()
            self._wake_writer.close()

    def _hand_out(self) -> None:
        for worker in self.workers:
            if worker.is_ready and worker.call is None and (call := self._next_call()) is not None:
                worker.call, worker.due = call, time.monotonic() + call.deadline_s
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died idle: the end of its socket says so next
                    worker.connection.send_bytes(call.message)
        num_starting = sum(not worker.is_ready for worker in self.workers)
        for _ in range(min(len(self._queue) - num_starting, self._num_workers - len(self.workers))):
            self._start_worker()

    def _next_call(self) -> _Call | None:
        with contextlib.suppress(IndexError):
            while not (call := self._queue.popleft()).future.set_running_or_notify_cancel():
                pass
            return call
        return None

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tandem.engine.reward.worker_process", str(theirs.fileno()), str(os.getpid())]
            nowhere = subprocess.DEVNULL  # what libraries print about hostile input is noise
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=nowhere, stdout=nowhere, stderr=nowhere)
        worker = _Worker(process, Connection(ours.detach()))
        self.workers.append(worker)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(self._start)

    def _receive(self, worker: _Worker) -> None:
        try:
            answer: Answer = worker.connection.recv()
        except (EOFError, OSError):
            self._discard(worker, WorkerError(f"its worker died: {_cause(worker.process)}"))
            return
        if not worker.is_ready:
            worker.is_ready = answer.error is None
        elif answer.error is None:
            call, worker.call = worker.call, None
            assert call is not None
            _settle(call.future, result=answer.result)
        elif not answer.is_last:
            call, worker.call = worker.call, None
            assert call is not None
            _settle(call.future, error=WorkerError(answer.error))
        if answer.is_last:
            self._discard(worker, WorkerError(answer.error))

    def _kill_late(self) -> None:
        now = time.monotonic()
        for worker in tuple(self.workers):
            if worker.due > now:
                continue
            if worker.call is not None:
                call = worker.call
                self._discard(worker, WorkerTimeoutError(f"{call.name} did not end within {call.deadline_s:g} s"))
            elif not worker.is_ready:
                self._discard(worker, WorkerError(f"a worker did not start within {START_TIMEOUT_S:g} s"))

    def _discard(self, worker: _Worker, error: WorkerError) -> None:
        """Kill a worker. One that never started takes a waiting call with it, so that a pool that cannot start ends all its calls."""
        worker.process.kill()
        worker.process.wait()
        worker.connection.close()
        self.workers.remove(worker)
        call = worker.call if worker.is_ready else self._next_call()
        if call is not None:
            _settle(call.future, error=error)

    def _fail_queue(self, reason: str) -> None:
        while (call := self._next_call()) is not None:
            _settle(call.future, error=WorkerError(reason))


def _message(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    module, name = function.__module__, function.__qualname__
    if module == "__main__" or "<" in name:
        raise ValueError(f"{module}.{name} cannot be imported by a worker; define the function at the top of a module")
    return pickle.dumps((function, arguments))


def _settle(future: Future[Any], *, result: Any = None, error: WorkerError | None = None) -> None:
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _cause(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "it closed its socket"
    return f"signal {-code}" if code < 0 else f"exit status {code}"
