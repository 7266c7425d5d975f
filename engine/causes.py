"""What ended a rank from outside, told from the error that reached it: a full disk, or another rank's death."""

import errno
import shutil
import sqlite3
import textwrap
import time
from pathlib import Path

import torch.distributed as dist

from tandem.engine.errors import RunEnded
from tandem.engine.types import EngineDiedError, WeightTransferError
from tandem.engine.watchdog import Watchdog

# With less than this on its disk, whatever ended a run was for want of space: libraries tell it in many ways.
DISK_FULL_BYTES = 64 << 10
# What the process of a rank needs at most to end, once its sockets are closed.
PEER_END_S = 2.0


def cause_outside(error: Exception, rank: int, run_dir: Path, watchdog: Watchdog) -> str:
    """What to tell the user when `error` comes from no mistake on this rank; "" otherwise."""
    said = textwrap.shorten(str(error), 240, placeholder=" …")
    again = "start the run again: it goes on from its newest checkpoint, and finished segments are not generated again"
    free_bytes = shutil.disk_usage(run_dir).free
    if free_bytes < DISK_FULL_BYTES or is_disk_full(error):
        left = f"{run_dir} has {free_bytes >> 10} KiB left"
        return f"rank {rank}: no room to write in {watchdog.where()}; {left} ({said}). Free some and {again}"
    if not is_peer_lost(error):
        return ""
    deadline = time.monotonic() + PEER_END_S
    while not (lost := watchdog.lost_peers()) and time.monotonic() < deadline:
        time.sleep(0.02)
    who = f"rank {', '.join(map(str, lost))}" if lost else "another rank"
    return f"rank {rank}: {who} is gone, noticed in {watchdog.where()} ({said}). Its own last words, or its launcher's, tell why; {again}"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the operating system refused to store more, or SQLite for that reason, in this error or one that led to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        # SQLite says "full" of a full disk only; of a quota or a limit, that it could not write.
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not come, or its connection closed."""
    if isinstance(error, EngineDiedError | RunEnded):  # these quote an engine's log, which may speak of gloo too
        return False
    text = str(error)
    of_gloo = isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed" in text or "Connection reset" in text)
    return of_gloo or isinstance(error, dist.DistError) or (isinstance(error, WeightTransferError) and "was not there" in text)
