"""Host memory for a device's storages: exactly as many bytes as they have, allocated once and used again.

A storage that leaves keeps its identity: it shrinks to 0 bytes and later grows again, so that every view of it (Megatron's contiguous
buffers, shards of them, tied weights) is valid afterwards. In between, reading one is a read of address 0.
"""

import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch

_LARGEST_ALIGNMENT = 64  # bytes, a cache line
# A page of memory is mapped when it is first written; large pages make that, and copies, cheaper.
_LARGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


class HostArena:
    """One anonymous mapping, page-locked where the storages lie on a GPU.

    PyTorch's own page-locked allocator rounds up to a power of two: this maps the bytes and registers them with CUDA.
    """

    def __init__(self, sizes: Sequence[int], *, is_page_locked: bool) -> None:
        """
        Args:
            sizes: bytes of every slot.
            is_page_locked: copies to and from a GPU then run by themselves, and as fast as the bus.
        Raises: MemoryError if the host has too little memory.
        """
        self.sizes = tuple(sizes)
        self.num_bytes = sum(sizes)
        # Slots lie in the order of their alignment, the coarsest first: none then needs bytes before it.
        starts, end = [0] * len(sizes), 0
        for slot in sorted(range(len(sizes)), key=lambda slot: -alignment_of(sizes[slot])):
            starts[slot] = end
            end += sizes[slot]
        self._starts = starts
        try:
            self._mapping = mmap.mmap(-1, max(1, end), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(
                f"the host cannot map {end:,} bytes for the trainer's state while the rollout engine has the GPU ({error.strerror}); "
                "give the node more memory, run fewer ranks on it, or set trainer.sleep=off"
            ) from error
        if _LARGE_PAGES is not None:
            self._mapping.madvise(_LARGE_PAGES)
        self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        if is_page_locked and end:
            self._page_lock()

    def slot(self, number: int) -> torch.Tensor:
        """The bytes of one slot, [size] uint8."""
        return self._bytes[self._starts[number] : self._starts[number] + self.sizes[number]]

    def view(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """What `tensor` was before its storage, which slot `number` holds, left the device: same dtype, shape and values, on the host."""
        if not tensor.numel():
            return torch.empty_like(tensor, device="cpu")
        flat = self.slot(number).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset() + tensor.storage_offset())

    def _page_lock(self) -> None:
        cudart: Any = torch.cuda.cudart()
        address = self._bytes.data_ptr()
        status = cudart.cudaHostRegister(address, self.num_bytes, 0)
        if int(status) != 0:
            raise MemoryError(
                f"CUDA cannot page-lock {self.num_bytes:,} bytes of host memory for the trainer's state (error {int(status)}); "
                "raise the limit of locked memory (ulimit -l), give the node more memory, or set trainer.sleep=off"
            )
        weakref.finalize(self._bytes, cudart.cudaHostUnregister, address)


def alignment_of(num_bytes: int) -> int:
    """The largest power of two that divides a size, 64 at most. A whole number of elements is a multiple of an element."""
    return math.gcd(num_bytes, _LARGEST_ALIGNMENT) if num_bytes else _LARGEST_ALIGNMENT
