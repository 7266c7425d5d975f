"""Values on their way from a device to the buckets in host memory: for each bucket one launch packs them and one copy brings them over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.block_fp8 import encode
from tandem.kernels.packing import Packer, Part

_ALIGNMENT = 256  # bytes, of every piece


class Copy(NamedTuple):
    """Of one tensor to another of its shape; the dtypes may differ.

    With `scales` (of all blocks of a matrix, kernels/block_fp8) the destination is float8_e4m3fn, and the source the matrix's rows from
    `row` on, of which each has the columns from `column` on; its rows may lie in groups.
    """

    destination: torch.Tensor
    source: torch.Tensor
    scales: torch.Tensor | None = None
    row: int = 0
    column: int = 0

    def run(self) -> None:
        if self.scales is None:
            self.destination.copy_(self.source)
            return
        pairs = [(self.destination, self.source)]
        if self.source.dim() == 3:
            pairs = list(zip(self.destination, self.source, strict=True))
        row = self.row
        for destination, source in pairs:
            encode(source.detach(), self.scales, destination, row=row, column=self.column)
            row += len(source)


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
        here: list[tuple[int, Copy]] = []
        for copy in copies:
            if runs_triton(copy.source):
                here.append((end, copy))
                end += -(-copy.source.numel() * copy.destination.element_size() // _ALIGNMENT) * _ALIGNMENT
        packers.append(Packer([part_of(copy, start) for start, copy in here]) if here else None)
        places += here
    if not places:
        return [None] * len(buckets), {}
    device = places[0][1].source.device
    num_bytes = max(packer.num_bytes for packer in packers if packer is not None)
    on_device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    on_host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) if device.type == "cuda" else on_device
    staged = [None if packer is None else Staged(packer, on_device[: packer.num_bytes], on_host[: packer.num_bytes]) for packer in packers]
    hosts = {}
    for start, (destination, source, *_) in places:
        place = on_host[start : start + source.numel() * destination.element_size()]
        hosts[id(source)] = place.view(destination.dtype).view(source.shape)
    return staged, hosts


def part_of(copy: Copy, start: int, strides: tuple[int, ...] | None = None) -> Part:
    """What a kernel packs of a copy, to this byte of a bucket; contiguous, or with these strides."""
    return Part(
        source=copy.source.detach(),
        start=start,
        dtype=copy.destination.dtype,
        strides=strides,
        given_scales=copy.scales,
        row=copy.row,
        column=copy.column,
    )
