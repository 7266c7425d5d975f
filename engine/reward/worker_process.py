"""The child side of `WorkerPool`: `python -m tandem.engine.reward.worker_process FD PARENT_PID`.

It imports nothing but the standard library until it is told what to run, so that a worker starts in a tenth of a second and never
holds torch. Messages are pickled: a `Start` first, then one (function, arguments) per call; each is answered by an `Answer`.
"""

import ctypes
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1
# Libraries swallow MemoryError (math-verify does, and then says "different"): a call that reached this share of what it may use is
# taken for one that ran out. A request that fails outright leaves no trace, but what leads up to one does.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Start:
    """The first message."""

    path: list[str]  # the parent's sys.path: what it can import, the worker can
    max_bytes: int  # limit of the address space
    initialise: bytes | None  # a call like those that follow; pickled apart, because only `path` makes it importable


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call returned, or why it did not. After `is_last` the worker ends."""

    result: Any = None
    error: str | None = None
    is_last: bool = False


def serve(connection: Connection) -> None:
    """Answer calls until the parent closes the socket."""
    try:
        start: Start = connection.recv()
    except EOFError:
        return
    sys.path[:] = start.path
    resource.setrlimit(resource.RLIMIT_AS, (start.max_bytes, start.max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    error = None if start.initialise is None else _answer(start.initialise, start.max_bytes).error
    connection.send(Answer(error=error, is_last=error is not None))
    if error is not None:
        return
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        answer = _answer(message, start.max_bytes)
        connection.send(answer)
        if answer.is_last:
            return


def _answer(message: bytes, max_bytes: int) -> Answer:
    try:
        function, arguments = pickle.loads(message)
    except Exception as error:
        return Answer(error=f"the call cannot be read: {type(error).__name__}: {error}")
    answer = _call(function, arguments, max_bytes)
    try:
        pickle.dumps(answer)
    except Exception as error:
        return Answer(error=f"the result cannot be sent: {type(error).__name__}: {error}", is_last=answer.is_last)
    return answer


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], max_bytes: int) -> Answer:
    try:
        result = function(*arguments)
    except MemoryError:
        return Answer(error=f"out of memory: the limit is {max_bytes} bytes", is_last=True)
    except Exception as error:
        return Answer(error=f"{type(error).__name__}: {error}")
    used_bytes = _peak_bytes()
    if used_bytes > _MEMORY_SHARE * max_bytes:
        return Answer(error=f"out of memory: {used_bytes} bytes were used, more than half of {max_bytes}", is_last=True)
    return Answer(result=result)


def _peak_bytes() -> int:
    """Most memory that this program held. getrusage's ru_maxrss would count what the parent held before the exec: gigabytes, in a run."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def _end_with(parent_pid: int) -> None:
    """The kernel kills this process when its parent dies, whatever it is doing then: a socket's end is seen between calls only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # those of a whole process group are for the parent, which then ends this process
        signal.signal(number, signal.SIG_IGN)
    _end_with(int(sys.argv[2]))
    # Instances must be of the module that the parent imports, not of __main__.
    from tandem.engine.reward import worker_process

    worker_process.serve(Connection(int(sys.argv[1])))
