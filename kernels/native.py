"""The shared libraries that `setup.py` builds from csrc/: plain C entry points, no torch headers, one file for every Python and torch.

Where there was no compiler there is no library, and the reference serves.
"""

import ctypes
import functools
from pathlib import Path
from typing import Literal

import torch


@functools.cache
def library(device_type: Literal["cpu", "cuda"]) -> ctypes.CDLL | None:
    """The library for tensors of this device; None if it was not built or cannot be opened here."""
    path = Path(__file__).parent / f"_{device_type}.so"
    try:
        opened = ctypes.CDLL(str(path)) if path.exists() else None
    except OSError:
        return None
    if opened is not None:
        opened.tandem_error.restype = ctypes.c_char_p
    return opened


def library_for(tensor: torch.Tensor) -> ctypes.CDLL | None:
    """The library that computes on this tensor, if there is one."""
    kind = tensor.device.type
    return library(kind) if kind in ("cpu", "cuda") else None


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous tensor's data begins; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def stream_of(tensor: torch.Tensor) -> ctypes.c_void_p:
    """The CUDA stream that torch computes on; null on a CPU."""
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None)


def check_status(opened: ctypes.CDLL, code: int, name: str) -> None:
    """Raises: RuntimeError with the launch's error."""
    if code:
        raise RuntimeError(f"{name} could not be launched: {opened.tandem_error(code).decode()}")
