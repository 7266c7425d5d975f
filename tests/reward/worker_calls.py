"""What the tests of the worker pool have done in workers: good and bad calls."""

import os
import random
import signal
import time
from typing import Any


def add(a: int, b: int) -> int:
    return a + b


def pid() -> int:
    return os.getpid()


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def wait_for(file: str) -> str:
    """Returns once the file is there."""
    while not os.path.exists(file):
        time.sleep(0.005)
    return file


def compute_forever() -> int:
    """One operation in C that holds the interpreter's lock for ages: neither a thread nor a signal handler would get to run."""
    return len(str(9 ** (9**9)))


def fill_memory() -> int:
    return len(b"x" * (4 << 30))


def fill_memory_and_hide_it() -> bool:
    pieces = []
    try:
        while True:
            pieces.append(b"x" * (16 << 20))
    except MemoryError:
        return False


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(text: str) -> None:
    raise ArithmeticError(text)


def unpicklable() -> Any:
    return lambda: None


def fail_to_start() -> None:
    raise ImportError("no sympy here")


def is_answer(text: str, answer: str) -> bool:
    return f"A:{answer}." in text


def is_answer_late(text: str, answer: str) -> bool:
    """Once the file is there that the text begins with: "/tmp/go A:18."."""
    wait_for(text.split()[0])
    return is_answer(text, answer)


def crash_or_answer(text: str, answer: str) -> bool:
    if "crash" in text:
        crash()
    if "hang" in text:
        time.sleep(600)
    return is_answer(text, answer)


def is_arithmetic_answer(text: str, answer: str) -> bool:
    """As `grade_arithmetic`, after up to 20 ms that nobody can foresee."""
    time.sleep(random.SystemRandom().random() ** 4 / 50)
    return text[max(0, text.rfind("A:")) :] == f"A:{answer}."
