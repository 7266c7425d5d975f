"""Running a Python program in an interpreter that is already there, as if it had been started for it. Standard library only."""

import atexit
import gc
import os
import signal
import sys
import traceback
import types


def run_python(path):
    """As `python path` would, in this interpreter. Never returns.

    At the end threads are joined, exit functions called and output flushed; modules are not taken apart, which would cost more than most
    programs do.
    """
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    sys.argv[:] = [path]
    sys.path.insert(0, os.path.dirname(path))
    code = 0
    gc.enable()
    try:
        with open(path, "rb") as file:
            compiled = compile(file.read(), path, "exec", dont_inherit=True)
        exec(compiled, main.__dict__)
    except SystemExit as error:
        code = exit_code(error.code)
    except BaseException as error:
        code = 1
        # without this file's own frame, as the interpreter would print it
        traceback.print_exception(type(error), error, error.__traceback__.tb_next if error.__traceback__ else None)
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = 120  # as the interpreter says it
    os._exit(code)


def exit_code(value):
    """What the interpreter makes of SystemExit's argument."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1
