"""Which implementation of the kernels runs. One choice for all of them, made at start-up and printed there.

"auto": Triton for tensors on a GPU; on a CPU the C++ twin where `csrc/` was built, else the reference in plain torch.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

Backend = Literal["auto", "reference", "triton", "native"]
"""reference: plain torch everywhere. triton: everywhere, also on a CPU (its interpreter). native: C++ and CUDA where a kernel has them."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_chosen: Backend = "auto"


def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def choose(backend: Backend) -> None:
    """Set the choice for this process. Raises: ValueError for "triton" where it is not installed."""
    global _chosen
    if backend == "triton" and not has_triton():
        raise ValueError("kernels='triton', but triton is not installed; install it, or choose 'reference'")
    _chosen = backend


@contextlib.contextmanager
def chosen(backend: Backend) -> Iterator[None]:
    """The choice within a block; for tests and benchmarks."""
    before = _chosen
    choose(backend)
    try:
        yield
    finally:
        choose(before)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels compute on this tensor. Raises: ValueError for a CPU tensor where they would be compiled for a GPU."""
    if _chosen == "auto":
        return tensor.is_cuda and has_triton()
    if _chosen == "triton" and tensor.device.type == "cpu" and not _interprets():
        found = f"a tensor of shape {tuple(tensor.shape)} is on cpu, but kernels='triton' computes on a GPU"
        raise ValueError(f"{found}; move it there, choose kernels='auto', or set TRITON_INTERPRET=1 for tests")
    return _chosen == "triton"


def _interprets() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


def runs_native(tensor: torch.Tensor) -> bool:
    """Whether the C++ or CUDA twin is wanted for this tensor, if it was built: on a CPU by default, on a GPU when chosen."""
    return _chosen == "native" or (_chosen == "auto" and not tensor.is_cuda)


def architecture(tensor: torch.Tensor) -> int | str:
    """What Triton compiles for: NVIDIA's compute capability (90), AMD's name ("gfx942"); "cpu" where its interpreter computes."""
    if tensor.device.type == "cpu":
        return "cpu"
    from triton.runtime import driver

    target: Any = driver.active.get_current_target()
    return target.arch


def has_bulk_copies(tensor: torch.Tensor) -> bool:
    """Whether Triton's descriptors are copies in bulk there (Hopper and later). Its interpreter takes that way too."""
    found = architecture(tensor)
    return found == "cpu" if isinstance(found, str) else found >= 90


def is_amd(tensor: torch.Tensor) -> bool:
    """Whether it is on one of AMD's GPUs: 64 KiB of shared memory and 512 vector registers, of which products take their sums' too."""
    return str(architecture(tensor)).startswith("gfx")


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raises: ValueError unless it is of a dtype that every implementation computes in."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {', '.join(map(str, DTYPES))}")


def describe(*, on_gpu: bool) -> str:
    """One line for people: what the choice comes to on this machine."""
    built = (Path(__file__).parent / ("_cuda.so" if on_gpu else "_cpu.so")).exists()
    language = "CUDA C++" if on_gpu else "C++"
    if _chosen == "triton":
        return "Triton" if on_gpu else "Triton, in its interpreter: for tests, very slow"
    if _chosen == "auto" and on_gpu:
        return "Triton" if has_triton() else "plain torch, because triton is not installed: slow, and more memory"
    if _chosen == "reference":
        return "plain torch"
    return f"plain torch, the policy loss in {language}" if built else f"plain torch ({language} was not built: no compiler at install)"
