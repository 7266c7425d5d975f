"""Compiles Triton kernels for a GPU that is not there, through their real wrappers on meta tensors.

In a process without the interpreter (`compile_offline`):  `with compiling(90) as compiled: wrapper(torch.empty(…, device="meta"))`.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Bytes of shared memory that a block may have; the compiler does not check it.
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_OPCODES = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the assembler says of one kernel."""

    name: str
    registers: int  # per thread
    stack_bytes: int  # more than 0: registers were spilled
    shared_bytes: int
    num_warps: int
    opcodes: dict[str, int]  # counts of those that tell tensor cores, bulk copies and spills


class _OfflineDriver:
    """Answers which chip there is, and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling(capability: int = 90) -> Iterator[list[Compiled]]:
    """Within the block every launch is compiled for this compute capability instead; the list fills with what came out."""
    compiled: list[Compiled] = []
    plain_run: Any = JITFunction.run
    driver.set_active(_OfflineDriver(GPUTarget("cuda", capability, 32)))  # pyright: ignore[reportArgumentType]

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_examine(self.__name__, kernel))
        return kernel

    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = plain_run
        if torch.cuda.is_available():
            driver.reset_active()


def _examine(name: str, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        name=name,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        opcodes={opcode: len(re.findall(rf"\b{opcode}\b", code)) for opcode in _OPCODES},
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def compile_offline(script: str) -> list[Compiled]:
    """Run a script that fills a list named `compiled`, in a process without the interpreter. Raises: RuntimeError with its errors."""
    tail = "\nimport dataclasses, json\nprint(json.dumps([dataclasses.asdict(kernel) for kernel in compiled]))\n"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script + tail], capture_output=True, text=True, cwd=root, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [Compiled(**kernel) for kernel in json.loads(done.stdout)]
