"""An event loop in a thread of its own, for clients whose callers are threads that do other things meanwhile."""

import asyncio
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 5.0


class LoopThread:
    """Runs coroutines from the first moment until `close`; also closed when it is garbage, and at the interpreter's exit.

    Args:
        name: of the thread.
        at_end: awaited in the loop at its end, when all else in it has been cancelled. It must not refer to this object, or to one that
            does, which would then never be garbage.
    """

    def __init__(self, name: str, at_end: Callable[[], Awaitable[None]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=name)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _close, self._loop, self._thread, at_end, os.getpid())

    @property
    def is_open(self) -> bool:
        return self._finalizer.alive

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine; from any thread. Raises: RuntimeError after `close`."""
        if not self.is_open:
            work.close()
            raise RuntimeError(f"the thread {self._thread.name} has ended")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def time(self) -> float:
        """The loop's clock, in seconds."""
        return self._loop.time()

    def close(self) -> None:
        """End what runs; its futures are cancelled. May be called twice. In a forked child, which has no such thread, nothing happens."""
        self._finalizer()


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, at_end: Callable[[], Awaitable[None]], owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return

    async def end() -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await at_end()

    with suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(end(), loop).result(_CLOSE_TIMEOUT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(_CLOSE_TIMEOUT_S)
    if not thread.is_alive():
        loop.close()
