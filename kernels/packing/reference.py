"""Packing in plain torch: one copy for each part."""

from collections.abc import Sequence

import torch

from tandem.kernels.block_fp8 import encode, quantise
from tandem.kernels.packing.layout import FP8, Part


def pack(bucket: torch.Tensor, parts: Sequence[Part]) -> None:
    """Write every part to its place in the uint8 bucket."""
    for part in parts:
        if not part.source.numel():
            continue
        target = _view(bucket, part.start, part.dtype, part.source.shape, part.target_strides)
        if not part.is_quantised:
            target.copy_(part.source)
            continue
        if part.given_scales is not None:
            encoded = torch.empty(part.source.shape, dtype=FP8, device=bucket.device)
            rows = part.source.reshape(-1, part.source.shape[-1])
            encode(rows, part.given_scales, encoded.view(rows.shape), row=part.row, column=part.column)
            target.copy_(encoded)
            continue
        fp8, scale = quantise(part.source.reshape(-1, part.source.shape[-1]))
        target.copy_(fp8.view(part.source.shape))
        assert part.scale_start is not None
        shape, stride = part.scales
        _view(bucket, part.scale_start, torch.float32, shape, (stride, 1)).copy_(scale)


def _view(bucket: torch.Tensor, start: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return bucket[start : start + (last + 1) * dtype.itemsize].view(dtype).as_strided(shape, strides)
