"""What SGLang imports from its compiled kernels, in plain torch, for an SGLang server on a CPU of any kind.

Only two of the functions run on that path. The others are looked up when SGLang is imported and never called: they raise. There is no
`convert_weight_packed`, by whose absence SGLang chooses plain torch for all that a model computes.
"""

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch

__version__ = "0.0.0"

_MASK = np.uint64(0xFFFFFFFF)


def assign_req_to_token_pool_cpu(
    requests_B: torch.Tensor, pool: torch.Tensor, starts_B: torch.Tensor, ends_B: torch.Tensor, slots_T: torch.Tensor, width: int
) -> None:
    """Note in `pool` [requests, width] which cache slots hold tokens [start, end) of each request: those of `slots_T`, in order."""
    offset = 0
    for request, start, end in zip(requests_B.tolist(), starts_B.tolist(), ends_B.tolist(), strict=True):
        pool[request, start:end] = slots_T[offset : offset + end - start].to(pool.dtype)
        offset += end - start


def murmur_hash32(seed_B: torch.Tensor, positions_B: torch.Tensor, columns_V: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bits) of the 16 bytes seed (8), position (4), column (4). Returns: uint32 [B, V]."""
    seed = seed_B.numpy().astype(np.uint64)[:, None]
    position = positions_B.numpy().astype(np.uint64)[:, None] & _MASK
    column = columns_V.numpy().astype(np.uint64)[None, :] & _MASK
    hashed = np.zeros((seed.shape[0], column.shape[1]), dtype=np.uint64)
    for block in (seed & _MASK, seed >> np.uint64(32), position, column):
        block = (_rotated(block * np.uint64(0xCC9E2D51) & _MASK, 15) * np.uint64(0x1B873593)) & _MASK
        hashed = (_rotated(hashed ^ block, 13) * np.uint64(5) + np.uint64(0xE6546B64)) & _MASK
    hashed ^= np.uint64(16)  # the number of bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = ((hashed ^ (hashed >> np.uint64(shift))) * np.uint64(factor)) & _MASK
    return torch.from_numpy((hashed ^ (hashed >> np.uint64(16))).astype(np.uint32))


def _rotated(x: np.ndarray, bits: int) -> np.ndarray:
    """32-bit values, rotated to the left."""
    return ((x << np.uint64(bits)) | (x >> np.uint64(32 - bits))) & _MASK


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
# SGLang looks these up when it imports its vision models, one of which has them; those that run here do not call them.
for _name in (
    *("fused_sigmoid_mul_cpu", "fused_qk_gemma_rmsnorm_cpu", "fused_qk_gemma_rmsnorm_with_gate_cpu", "fused_input_proj_cpu"),
    *("fused_qkvzba_split_reshape_cat_contiguous_cpu", "fused_qkvzba_split_reshape_cat_cpu"),
):
    _library.define(f"{_name}(Tensor x) -> Tensor")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a compiled kernel; this server computes in plain torch")

    return missing
