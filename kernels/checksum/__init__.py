"""Checksums of the entries of a bucket, where it lies: 64 bits each, all in one launch.

With 8-byte little-endian words w_0, w_1, … of an entry of n bytes, the last one filled with zeros, and arithmetic modulo 2^64:

    mix(x):  x ^= x >> 32;  x *= 0xD6E8FEB86659FD93;  x ^= x >> 32;  x *= 0xD6E8FEB86659FD93;  x ^= x >> 32
    checksum = mix(n) + Σ_i mix(w_i ^ ((i + 1) * 0x9E3779B97F4A7C15))

mix is one to one, so that a changed word always changes the sum; words that change places, or several that change, go unnoticed with a
chance of 2^-64. A sum of integers does not depend on the order: threads add as they come, and every run and device gives the same. It
guards against mistakes and faults, not against an adversary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tandem.kernels.backend import runs_triton
from tandem.kernels.checksum import reference
from tandem.kernels.operators import operator

__all__ = ["Checksums"]

WORD = 8  # bytes
TILE = 16384  # words that one program reads: 128 KiB


@operator("bucket_checksums")
def _checksums(bucket: torch.Tensor, table_E3: torch.Tensor, entry_of_tile: torch.Tensor) -> torch.Tensor:
    """[E] int64. A row of the table is an entry's start, number of bytes and first tile; entry_of_tile is int32."""
    if runs_triton(bucket):
        from tandem.kernels.checksum import triton

        return triton.checksums(bucket, table_E3, entry_of_tile)
    return reference.checksums(bucket, table_E3[:, :2].tolist())


@_checksums.register_fake
def _(bucket: torch.Tensor, table_E3: torch.Tensor, entry_of_tile: torch.Tensor) -> torch.Tensor:
    return bucket.new_empty(len(table_E3), dtype=torch.int64)


class Checksums:
    """Those of entries that lie at the same places of one bucket after the other.

    Args:
        entries: (start, number of bytes) of each; starts are multiples of 8.
        device: where the buckets lie.
    Raises: ValueError naming the entry for a start that is not a multiple of 8, or a negative number.
    """

    def __init__(self, entries: Sequence[tuple[int, int]], device: torch.device) -> None:
        for index, (start, num_bytes) in enumerate(entries):
            if start < 0 or start % WORD or num_bytes < 0:
                raise ValueError(
                    f"entries[{index}] has {num_bytes} bytes at {start}; it must begin at a multiple of {WORD}, neither negative"
                )
        self._device = torch.empty(0, device=device).device  # with its number, which "cuda" lacks
        self.num_bytes = max((start + -(-num_bytes // WORD) * WORD for start, num_bytes in entries if num_bytes), default=0)
        """Of the smallest bucket: the last word of an entry is read whole."""
        # An entry without bytes has a tile too, for its length.
        num_tiles = [max(1, -(-num_bytes // (WORD * TILE))) for _, num_bytes in entries]
        first = np.cumsum([0, *num_tiles])[:-1]
        rows = [(start, num_bytes, int(tile)) for (start, num_bytes), tile in zip(entries, first, strict=True)]
        self._table_E3 = torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)
        self._entry_of_tile = torch.from_numpy(np.repeat(np.arange(len(rows), dtype=np.int32), num_tiles)).to(device)

    def __call__(self, bucket: torch.Tensor) -> torch.Tensor:
        """The checksums of what lies in the bucket.

        Args:
            bucket: uint8, contiguous, beginning at a multiple of 8 bytes.
        Returns: [entries] int64 on the bucket's device: the 64 bits, read as a signed number.
        """
        if bucket.dtype != torch.uint8 or bucket.dim() != 1 or not bucket.is_contiguous() or bucket.device != self._device:
            found = f"{tuple(bucket.shape)} {bucket.dtype}{'' if bucket.is_contiguous() else ', not contiguous,'} on {bucket.device}"
            raise ValueError(f"bucket is {found}; it must have one contiguous dimension of torch.uint8 on {self._device}")
        if len(bucket) < self.num_bytes or bucket.data_ptr() % WORD:
            found = f"{len(bucket)} bytes at address {bucket.data_ptr()}"
            raise ValueError(f"bucket has {found}; the entries need {self.num_bytes} at a multiple of {WORD}")
        return _checksums(bucket, self._table_E3, self._entry_of_tile)

    def numbers(self, bucket: torch.Tensor) -> np.ndarray:
        """The same as uint64 on the host, once they are known."""
        return self(bucket).cpu().numpy().view(np.uint64)
