"""Values on their way from a device to the buckets in host memory: for each bucket one launch packs them and one copy brings them over."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.packing import Packer, Part

Copy = tuple[torch.Tensor, torch.Tensor]  # (destination, source); the dtypes may differ
_ALIGNMENT = 256  # bytes, of every piece


@dataclass(frozen=True, slots=True)
class Staged:
    """One bucket's values. Its memory is that of all buckets of the rank: they are staged and written one after the other."""

    packer: Packer
    on_device: torch.Tensor
    on_host: torch.Tensor  # page-locked; the same tensor where the device is the CPU

    def fill(self) -> None:
        """Pack the live tensors, and wait until everything is on the host."""
        self.packer.pack(self.on_device)
        if self.on_host is not self.on_device:
            self.on_host.copy_(self.on_device, non_blocking=True)
            torch.cuda.current_stream(self.on_device.device).synchronize()


def stage(buckets: Sequence[Sequence[Copy]]) -> tuple[list[Staged | None], dict[int, torch.Tensor]]:
    """Stage what kernels pack: parameters on a GPU. Others are copied from where they are.

    Args:
        buckets: of each bucket, the copies that this rank makes.
    Returns: per bucket what is to be filled before its copies are made, None where nothing is; and by the id of a source the tensor on
        the host that takes its place: of its shape, in the destination's dtype.
    """
    places: list[tuple[int, Copy]] = []
    packers: list[Packer | None] = []
    for copies in buckets:
        end = 0
        here = []
        for destination, source in copies:
            if runs_triton(source):
                here.append((end, (destination, source)))
                end += -(-source.numel() * destination.element_size() // _ALIGNMENT) * _ALIGNMENT
        packers.append(Packer([Part(source=pair[1], start=start, dtype=pair[0].dtype) for start, pair in here]) if here else None)
        places += here
    if not places:
        return [None] * len(buckets), {}
    device = places[0][1][1].device
    num_bytes = max(packer.num_bytes for packer in packers if packer is not None)
    on_device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    on_host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) if device.type == "cuda" else on_device
    staged = [None if packer is None else Staged(packer, on_device[: packer.num_bytes], on_host[: packer.num_bytes]) for packer in packers]
    hosts = {
        id(source): on_host[start : start + source.numel() * destination.element_size()].view(destination.dtype).view(source.shape)
        for start, (destination, source) in places
    }
    return staged, hosts
