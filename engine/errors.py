"""Bad input ends a command with one line and status 2, what happens to a run with one line and status 1; a mistake of ours, with a
traceback.
"""

import contextlib
import errno
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

# What rank 0 gets to print an error that all ranks have, and to end; torchrun then ends the others in a fraction of a second.
RANK_0_FIRST_S = 5.0


class RunEnded(RuntimeError):
    """The run cannot go on, for a reason outside of it: the disk is full, another rank is gone. What is saved stays."""


class Stopped(SystemExit):
    """SIGTERM: everything is saved, and all ranks leave together."""


def fail(message: str, status: int = 2) -> NoReturn:
    """Print "error: …" and exit."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextlib.contextmanager
def clear_errors(rank: int = 0) -> Iterator[None]:
    """Turn errors about the input into "error: …" and exit status 2: every ValueError and FileNotFoundError that our own code raises.

    One from within a library passes: where it came from is what one needs to know. Ranks other than 0 give rank 0 time to
    say the same; under torchrun its end ends them, and only what it does not say they print themselves.
    """
    try:
        yield
    except RuntimeError as error:
        # here: it brings torch, which takes seconds, and help needs none
        from tandem.engine.types import CheckpointError, DeviceMemoryError

        if not isinstance(error, RunEnded | CheckpointError | DeviceMemoryError):
            raise
        fail(str(error), status=1)
    except (ValueError, FileNotFoundError) as error:
        if not _raised_by_us(error):
            raise
        if rank != 0:
            time.sleep(RANK_0_FIRST_S)
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{error}; make room there and start again", status=1)


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("tandem.")
