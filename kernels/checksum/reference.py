"""The checksums in plain torch, a slice of the words at a time."""

from collections.abc import Sequence

import torch

_MIX = 0xD6E8FEB86659FD93 - (1 << 64)  # as signed numbers: torch's int64 wraps around as uint64 does
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_LOW = (1 << 32) - 1
_WORDS_AT_ONCE = 1 << 16  # in a core's cache


def checksums(bucket: torch.Tensor, entries: Sequence[Sequence[int]]) -> torch.Tensor:
    """[entries] int64; an entry is its start and its number of bytes."""
    totals = [torch.zeros((), dtype=torch.int64, device=bucket.device) for _ in entries]
    for total, (start, num_bytes) in zip(totals, entries, strict=True):
        num_words = -(-num_bytes // 8)
        total += _mix(torch.tensor([num_bytes], device=bucket.device))[0]
        for first in range(0, num_words, _WORDS_AT_ONCE):
            last = min(first + _WORDS_AT_ONCE, num_words)
            words = bucket[start + 8 * first : start + 8 * last].view(torch.int64)
            if 8 * last > num_bytes:
                words = words.clone()
                words[-1] &= (1 << 8 * (num_bytes % 8)) - 1
            index = torch.arange(first + 1, last + 1, device=bucket.device)
            total += _mix(words ^ (index * _STEP)).sum()
    return torch.stack(totals) if totals else torch.zeros(0, dtype=torch.int64, device=bucket.device)


def _mix(x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x = (x ^ ((x >> 32) & _LOW)) * _MIX
    return x ^ ((x >> 32) & _LOW)
