"""What a sandboxed run may use, and what became of it."""

import enum
from dataclasses import dataclass, fields

MIB = 1 << 20


class Status(enum.StrEnum):
    """How a run ended. The sandbox itself never says WRONG_ANSWER: whoever compares the output does."""

    OK = "ok"
    WRONG_ANSWER = "wrong answer"
    RUNTIME_ERROR = "runtime error"  # a compiler's refusal, an exit status other than 0, a signal
    TIME_LIMIT = "time limit"  # of CPU or wall time
    MEMORY_LIMIT = "memory limit"
    OUTPUT_LIMIT = "output limit"
    SANDBOX_ERROR = "sandbox error"  # nobody can tell what the program would have done


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one run, all its processes together unless said otherwise. The tests of one program are one run each."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    cores: float = 1.0
    """CPU time per second of wall time."""
    memory_bytes: int = 512 * MIB
    """Resident memory, files in scratch space, and what the kernel holds for the program."""
    processes: int = 64
    """Processes and threads at a time."""
    scratch_bytes: int = 64 * MIB
    """All files that the program writes."""
    scratch_files: int = 4096
    file_bytes: int = 64 * MIB
    """Of each file."""
    output_bytes: int = 4 * MIB
    """Of stdout and of stderr, each."""
    stack_bytes: int = 64 * MIB
    """Of each process's main thread."""
    open_files: int = 256
    """Of each process."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"limits.{field.name} is {value}; it must be above 0")
        if self.memory_bytes < 16 * MIB:
            raise ValueError(f"limits.memory_bytes is {self.memory_bytes}; an interpreter alone needs {16 * MIB}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """What one run did."""

    status: Status
    stdout: bytes = b""
    stderr: bytes = b""
    """Of the program; of the compiler, if that failed; for SANDBOX_ERROR, what went wrong."""
    wall_s: float = 0.0
    """From the program's first instruction to its end, without the wait for a worker."""
    cpu_s: float = 0.0
    peak_bytes: int = 0
    exit_code: int | None = None
    """As the program gave it; minus the signal that ended it; None if it was stopped at a limit, or never ran."""
    compiling: bool = False
    """Whether it was the compiler that ended so."""
