"""One block of host memory that holds a copy of what a checkpoint saves, while training goes on with the originals."""

import math
from collections.abc import Sequence

import torch

_ALIGNMENT = 64  # bytes, a cache line


class HostCopy:
    """Made at the first copy and used again for every later one; page-locked where there is a GPU to copy from."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of the tensors as they are now, each of which ends with the next call."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        if end > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)  # the smaller block goes first
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies = [self._at(start, tensor) for start, tensor in zip(starts, tensors, strict=True)]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _at(self, start: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor at this place. It has a storage of its own: Megatron copies what is a view of something larger."""
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        whole = self._memory.numpy().data
        flat = torch.frombuffer(whole, dtype=tensor.dtype, count=math.prod(tensor.shape), offset=start)
        return flat.view(tensor.shape)
