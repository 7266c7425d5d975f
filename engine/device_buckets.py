"""Slots of buckets in the memory of a GPU, opened by another process on the same GPU through CUDA IPC.

torch's storages export and open the handles (`UntypedStorage._share_cuda_`, `_new_shared_cuda`), as its own multiprocessing does; SGLang
shares weights in the same way. Memory of expandable segments (PYTORCH_CUDA_ALLOC_CONF) cannot be exported, and torch says so.

Not run on a GPU yet.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch

DeviceHandle = tuple[Any, ...]  # what torch's _share_cuda_ returns: numbers and bytes


@dataclass(frozen=True, slots=True)
class DeviceSlots:
    """Equally large slots. The process that created them keeps them as long as another has them open."""

    tensors: list[torch.Tensor]  # uint8
    handles: tuple[DeviceHandle, ...]

    @classmethod
    def create(cls, device: torch.device, num_bytes: int, num_slots: int) -> Self:
        """Allocate. Raises: RuntimeError if there is no memory left or it cannot be exported."""
        # A process that opens a handle keeps the whole allocation that holds it. torch may cut a slot from a large block that it has free,
        # which could then not leave the GPU when the trainer sleeps; without such blocks it allocates.
        torch.cuda.empty_cache()
        tensors = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        torch.cuda.current_stream(device).synchronize()
        return cls(tensors, tuple(tensor.untyped_storage()._share_cuda_() for tensor in tensors))

    @classmethod
    def open(cls, handles: tuple[DeviceHandle, ...]) -> Self:
        """Map another process's slots, on this process's current device: the same GPU, which the two may count differently.

        Raises: RuntimeError if the creator is gone, or is this process.
        """
        tensors = []
        for _, *rest in handles:
            storage = torch.UntypedStorage._new_shared_cuda(torch.cuda.current_device(), *rest)
            tensors.append(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
        return cls(tensors, handles)
