"""Running untrusted programs. docs/sandbox.md says what this stops, and what it does not."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

from tandem.engine.reward import seccomp
from tandem.engine.reward.bubblewrap import check_available, interpreter, interpreter_folders
from tandem.engine.reward.cgroups import CgroupError, find
from tandem.engine.reward.execution import MIB, Execution, Limits, Status
from tandem.engine.reward.languages import COMPILER_LIMITS, Recipe, recipe, tool_folders
from tandem.engine.reward.pool import Pool, WorkerError, WorkerSettings

MAX_INPUT_BYTES = 64 * MIB  # source, stdin and files together
COMPILED_BYTES = 256 * MIB  # of compiled programs kept: one is run once for each test
SIGXCPU, SIGXFSZ = 24, 25
OUT_OF_MEMORY = (
    b"the machine, or a control group around the sandbox, ran out of memory and the kernel ended a process of the program, which was"
    b" below its own limit; run fewer workers, or give them less (limits.memory_bytes)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Ready to run, any number of times."""

    recipe: Recipe
    files: Mapping[str, bytes]


class Sandbox:
    """Runs programs in namespaces of their own, with limits. Threads may call `run` at once; as many runs as workers go on together.

    Attributes:
        limits: Of every run that names none.
        not_enforced: What this machine cannot enforce, one sentence each; empty where all is.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        num_workers: int | None = None,
        python: Path | None = None,
        use_cgroups: bool = True,
        user_namespace: bool | None = None,
    ) -> None:
        """Start the workers.

        Args:
            num_workers: Runs at a time; by default one for each core that this process may use.
            python: The interpreter of the sandbox, 3.11 or later; by default this one, without its packages.
            use_cgroups: False does without, as on a machine that has none to give.
            user_namespace: Whether workers live in a user namespace. By default only where this process is not root: as root, programs
                get another user's id instead.
        Raises: UnavailableError where bubblewrap is missing or may not make namespaces. ValueError for a machine without a system call
            filter. WorkerError when workers do not start for another reason.
        """
        self.limits = limits or Limits()
        is_root = os.geteuid() == 0 if user_namespace is None else not user_namespace
        if is_root and os.geteuid() != 0:
            raise ValueError("user_namespace is False, which takes root; leave it out, or run as root")
        check_available(is_root=is_root)
        self.not_enforced: tuple[str, ...] = ()
        hierarchies = None
        try:
            if not use_cgroups:
                raise CgroupError("use_cgroups is False")
            hierarchies = find()
            hierarchies.sweep()
        except CgroupError as error:
            self.not_enforced = (
                f"limits.memory_bytes: each process has it for itself, as address space; JavaScript and compilers have none ({error})",
                "limits.cores, and CPU time of all processes together: each may use limits.cpu_s of its own",
            )
        python = (python or interpreter()).resolve()
        self._has_cgroups = hierarchies is not None
        settings = WorkerSettings(
            python=python,
            is_root=is_root,
            hierarchies=hierarchies,
            limits=self.limits,
            filter=seccomp.program(),
            read_only=tuple(dict.fromkeys([*interpreter_folders(python), *tool_folders()])),
        )
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._pool = Pool(settings, self.num_workers)
        self._finalizer = weakref.finalize(self, self._pool.close)  # also when the interpreter ends: groups would stay
        self._compiled: OrderedDict[tuple[str, str], Program] = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self,
        source: str,
        *,
        language: str = "python",
        stdin: bytes | str = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> Execution:
        """Compile if the language wants it, and run. The program's folder holds its source (or what was compiled) and `files`.

        Args:
            files: Contents by relative path.
            limits: Instead of the sandbox's own; `processes` and `cores` are the worker's and stay.
        Returns: never WRONG_ANSWER; SANDBOX_ERROR for whatever is not the program's fault.
        Raises: LanguageError, ValueError for a bad path or more than 64 MiB of input.
        """
        limits = self._own_counts(limits or self.limits)
        files = dict(files or {})
        stdin = stdin.encode() if isinstance(stdin, str) else bytes(stdin)
        _check(source, stdin, files)
        program = self._compile(source, language, limits)
        if isinstance(program, Execution):
            return program
        return self._execute(program.recipe, {**files, **program.files}, stdin, limits)[0]

    @property
    def num_replaced(self) -> int:
        """Workers that were given up so far: they failed, were not clean after a run, or had done their number of runs."""
        return self._pool.num_replaced

    def close(self) -> None:
        """Wait for the runs in progress, then end all workers and remove their groups."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own_counts(self, limits: Limits) -> Limits:
        """With the limits that a worker's group has for life."""
        return replace(limits, processes=self.limits.processes, cores=self.limits.cores)

    def _compile(self, source: str, language: str, limits: Limits) -> Program | Execution:
        how = recipe(source, language, limits)
        text = source.encode(errors="surrogatepass")
        if how.compile_argv is None or how.artefact is None:
            return Program(recipe=how, files={how.main: text})
        key = (language, source)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return replace(self._compiled[key], recipe=how)
        execution, left = self._execute(how, {how.main: text}, b"", self._own_counts(COMPILER_LIMITS), compiling=True)
        if execution.status is not Status.OK:
            return replace(execution, compiling=True)
        if how.artefact not in left:
            return replace(execution, status=Status.RUNTIME_ERROR, stderr=b"the compiler left no program", compiling=True)
        program = Program(recipe=how, files=left)
        with self._lock:
            self._compiled[key] = program
            while sum(len(data) for kept in self._compiled.values() for data in kept.files.values()) > COMPILED_BYTES:
                self._compiled.popitem(last=False)
        return program

    def _execute(
        self, how: Recipe, files: Mapping[str, bytes], stdin: bytes, limits: Limits, *, compiling: bool = False
    ) -> tuple[Execution, dict[str, bytes]]:
        request = {
            "argv": how.compile_argv if compiling else how.argv,
            "main": how.main,
            "collect": [how.artefact] if compiling else [],
            "limits": {
                **{name: getattr(limits, name) for name in Limits.__dataclass_fields__},
                "address_bytes": None if self._has_cgroups or how.reserves else limits.memory_bytes,
            },
        }
        blobs = {"stdin": stdin, **{f"file:{name}": data for name, data in files.items()}}
        try:
            with self._pool.worker() as worker:
                result = worker.run(request, blobs, memory_bytes=limits.memory_bytes, wall_s=limits.wall_s)
        except (WorkerError, CgroupError) as error:
            return Execution(status=Status.SANDBOX_ERROR, stderr=str(error).encode()), {}
        if "fault" in result:
            return Execution(status=Status.SANDBOX_ERROR, stderr=result["fault"].encode()), {}
        if result.get("oom_kills") and not result["reached_limit"]:
            return Execution(status=Status.SANDBOX_ERROR, stderr=OUT_OF_MEMORY), {}
        left = {name.removeprefix("file:"): bytes(data) for name, data in result["blobs"].items() if name.startswith("file:")}
        execution = Execution(
            status=self._status(how, result, limits),
            stdout=bytes(result["blobs"]["stdout"]),
            stderr=bytes(result["blobs"]["stderr"]),
            wall_s=result["wall_s"],
            cpu_s=result["cpu_s"],
            peak_bytes=result["resident_bytes"],
            exit_code=None if result["cause"] else result["code"],
        )
        return execution, left

    def _status(self, how: Recipe, result: dict[str, Any], limits: Limits) -> Status:
        if result.get("oom_kills"):
            return Status.MEMORY_LIMIT
        if result["cause"] is not None:
            return Status.OUTPUT_LIMIT if result["cause"] == "output" else Status.TIME_LIMIT
        if result["code"] == -SIGXCPU or result["cpu_s"] > limits.cpu_s:
            return Status.TIME_LIMIT
        if result["code"] == -SIGXFSZ:
            return Status.OUTPUT_LIMIT
        if result["code"] == 0:
            return Status.OK
        # such a runtime has a heap of limited size, and ends by itself when that is full
        if (how.reserves or not self._has_cgroups) and _ran_out_of_memory(result["blobs"]["stderr"]):
            return Status.MEMORY_LIMIT
        return Status.RUNTIME_ERROR


def _ran_out_of_memory(stderr: bytearray) -> bool:
    """Where address space is limited instead of memory, a program is not ended but told, and mostly says so."""
    return any(word in stderr[-4000:] for word in (b"MemoryError", b"std::bad_alloc", b"OutOfMemoryError", b"out of memory"))


def _check(source: str, stdin: bytes, files: Mapping[str, bytes]) -> None:
    for name in files:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\0" in name or str(path) in ("", "."):
            raise ValueError(f"files has the path {name!r}; it must be relative, without '..'")
    size = 4 * len(source) if not source.isascii() else len(source)
    size += len(stdin) + sum(len(data) for data in files.values())
    if size > MAX_INPUT_BYTES:
        raise ValueError(f"source, stdin and files have {size} bytes; a run takes at most {MAX_INPUT_BYTES}")
