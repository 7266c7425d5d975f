"""The checksums in Triton: a program for each tile of all entries, which adds its words' sum to its entry's.

The additions are atomic and of integers: their order changes nothing.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from tandem.kernels.checksum import TILE

AT_ONCE: tl.constexpr = tl.constexpr(2048)


@triton.jit
def _mix(x):
    for _ in tl.static_range(2):
        x = (x ^ (x >> 32)) * tl.full((), 0xD6E8FEB86659FD93, tl.uint64)
    return x ^ (x >> 32)


@triton.jit
def _checksum_kernel(bucket, table, entry_of_tile, sums, TILE: tl.constexpr):
    entry = tl.load(entry_of_tile + tl.program_id(0))
    start, num_bytes, first_tile = tl.load(table + 3 * entry), tl.load(table + 3 * entry + 1), tl.load(table + 3 * entry + 2)
    words = (bucket + tl.multiple_of(start, 8)).to(tl.pointer_type(tl.uint64))
    num_words = (num_bytes + 7) // 8
    first = (tl.program_id(0) - first_tile) * TILE
    total = tl.zeros((AT_ONCE,), tl.uint64)
    for step in range(0, TILE, AT_ONCE):
        index = first + step + tl.arange(0, AT_ONCE)
        inside = index < num_words
        word = tl.load(words + index, mask=inside, other=0)
        # of the last word only the entry's bytes; a shift by 64 has no meaning
        excess = tl.minimum(tl.maximum((index + 1) * 8 - num_bytes, 0), 7).to(tl.uint64) * 8
        word = (word << excess) >> excess
        place = (index + 1).to(tl.uint64) * tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        total += tl.where(inside, _mix(word ^ place), tl.zeros((), tl.uint64))
    value = tl.sum(total)
    if first == 0:
        value += _mix(num_bytes.to(tl.uint64))
    tl.atomic_add(sums + entry, value.to(tl.int64, bitcast=True), sem="relaxed")


def checksums(bucket: torch.Tensor, table_E3: torch.Tensor, entry_of_tile: torch.Tensor) -> torch.Tensor:
    """[E] int64."""
    sums = torch.zeros(len(table_E3), dtype=torch.int64, device=bucket.device)
    if len(entry_of_tile):
        _checksum_kernel[len(entry_of_tile),](bucket, table_E3, entry_of_tile, sums, TILE=TILE, num_warps=8)
    return sums
