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
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

Chip = int | str  # a compute capability of NVIDIA, or an architecture of AMD
# Bytes of shared memory that a block may have; the compiler does not check it.
SHARED_MEMORY_LIMIT: dict[Chip, int] = {80: 166_912, 90: 232_448, "gfx942": 65_536}
# The instruction of the tensor cores that a product of 16-bit numbers must become.
TENSOR_CORES: dict[Chip, str] = {80: "HMMA", 90: "HGMMA", "gfx942": "v_mfma"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_OPCODES = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")
_AMD_OPCODES = ("v_mfma", "scratch_load", "scratch_store")
_PRODUCT_OF_16_BIT = re.compile(r"= tt\.dot .*tensor<\d+x\d+x(?:bf16|f16)>")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the assembler says of one kernel."""

    name: str
    registers: int  # per thread
    stack_bytes: int  # more than 0: registers were spilled
    shared_bytes: int
    num_warps: int
    opcodes: dict[str, int]  # counts of those that tell tensor cores, bulk copies and spills
    num_products: int = 0  # of 16-bit numbers, in the source

    @property
    def num_spills(self) -> int:
        """Bytes on the stack, and instructions that write or read registers there."""
        return self.stack_bytes + sum(map(self.count, ("LDL", "STL", "scratch_load", "scratch_store")))

    def count(self, opcode: str) -> int:
        """How often the code has an instruction; 0 for one of another maker's chips."""
        return self.opcodes.get(opcode, 0)


class _OfflineDriver:
    """Answers which chip there is, and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        """A number of its own for each chip: Triton keeps what it compiled by device."""
        return zlib.crc32(str(self._target.arch).encode())

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling(chip: Chip = 90) -> Iterator[list[Compiled]]:
    """Within the block every launch is compiled for this chip instead; the list fills with what came out."""
    compiled: list[Compiled] = []
    plain_run: Any = JITFunction.run
    target = GPUTarget("cuda", chip, 32) if isinstance(chip, int) else GPUTarget("hip", chip, 64)
    driver.set_active(_OfflineDriver(target))  # pyright: ignore[reportArgumentType]

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        examine = _examine if isinstance(chip, int) else _examine_amd
        compiled.append(examine(self.__name__, kernel))
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
        num_products=_num_products(kernel),
    )


def _examine_amd(name: str, kernel: Any) -> Compiled:
    code = kernel.asm["amdgcn"]
    values = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", code)}
    return Compiled(
        name=name,
        registers=values["vgpr_count"],
        stack_bytes=values["private_segment_fixed_size"],
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        opcodes={opcode: len(re.findall(rf"\b{opcode}", code)) for opcode in _AMD_OPCODES},
        num_products=_num_products(kernel),
    )


def _num_products(kernel: Any) -> int:
    return len(_PRODUCT_OF_16_BIT.findall(kernel.asm["ttir"]))


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
