"""Parameters packed into a bucket of bytes: cuts of tensors, put together in another order, cast, and block-scaled to fp8 where asked.

On a GPU a bucket is one launch, driven by a table of its parts.
"""

from collections.abc import Sequence

import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.block_fp8 import largest_magnitudes
from tandem.kernels.packing import reference
from tandem.kernels.packing.layout import CASTS, FP8, Part, check

__all__ = ["CASTS", "Magnitudes", "Packer", "Part"]

ALIGNMENT = 16  # bytes of one vector store


class Packer:
    """The parts of one bucket, which is filled from their tensors again and again. They are kept alive; their storage must not move.

    Args:
        parts: on one device; no byte of the bucket may belong to two of them.
    Raises: ValueError naming the part for a cast that there is not (CASTS), strides that no three nested runs have, a place that is not
        aligned to its dtype, or a device that is not that of the first.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        for index, part in enumerate(parts):
            check(part, index)
            if part.source.device != parts[0].source.device:
                raise ValueError(
                    f"parts[{index}] is on {part.source.device}, parts[0] on {parts[0].source.device}; all must be on one device"
                )
        self._parts = tuple(parts)
        self.num_bytes = max((part.end for part in parts), default=0)
        """Of the smallest bucket that holds the parts."""
        self._launch = None
        if parts and runs_triton(parts[0].source):
            from tandem.kernels.packing import triton

            self._launch = triton.Launch(parts)

    def pack(self, bucket: torch.Tensor) -> None:
        """Write every part, as its tensor is now, to its place. What belongs to none keeps its bytes.

        Args:
            bucket: uint8, contiguous, on the parts' device, beginning at a multiple of 16 bytes.
        """
        if not self._parts:
            return
        device = self._parts[0].source.device
        if bucket.dtype != torch.uint8 or bucket.dim() != 1 or not bucket.is_contiguous() or bucket.device != device:
            found = f"{tuple(bucket.shape)} {bucket.dtype}{'' if bucket.is_contiguous() else ', not contiguous,'} on {bucket.device}"
            raise ValueError(f"bucket is {found}; it must have one contiguous dimension of torch.uint8 on {device}, where the parts are")
        if len(bucket) < self.num_bytes or bucket.data_ptr() % ALIGNMENT:
            found = f"{len(bucket)} bytes at address {bucket.data_ptr()}"
            raise ValueError(f"bucket has {found}; the parts need {self.num_bytes} at a multiple of {ALIGNMENT}")
        if self._launch is not None:
            self._launch.pack(bucket)
        else:
            reference.pack(bucket, self._parts)


class Magnitudes:
    """The largest magnitudes of the blocks of matrices, found again and again: the scales that parts are given follow from them.

    Args:
        parts: (rows of a matrix, which may lie in groups; fp32 numbers of all blocks of that matrix; its row and its column where the part
            begins). They are kept alive; their storage must not move.
    """

    def __init__(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor, int, int]]) -> None:
        self._parts = tuple(parts)
        self._launch = None
        if parts and runs_triton(parts[0][0]):
            from tandem.kernels.packing import triton

            cut = [Part(source=source, start=0, dtype=FP8, given_scales=of, row=row, column=column) for source, of, row, column in parts]
            for index, part in enumerate(cut):
                check(part, index)
            self._launch = triton.Launch(cut, only_magnitudes=True)

    def find(self) -> None:
        """Raise every number to the largest |element| of its block, as the parts are now; infinite, or NaN, where one is."""
        if self._launch is not None:
            self._launch.pack(self._parts[0][1].view(-1).view(torch.uint8))
            return
        for source, largest, row, column in self._parts:
            for index, rows in enumerate(source if source.dim() == 3 else [source]):
                largest_magnitudes(rows, largest, row=row + index * rows.shape[0], column=column)
