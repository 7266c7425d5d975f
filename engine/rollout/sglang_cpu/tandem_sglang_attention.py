"""Decode attention for SGLang on a CPU: rows of similar length together, where SGLang's torch_native backend takes one after the other."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_SHORTEST = 16  # keys that a row is padded to at least
_AT_A_TIME = 2048  # keys, so that what is computed from them stays in the processor's cache


def batched_decode(one_by_one: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Replaces TorchNativeAttnBackend._run_sdpa_forward_decode, which stays for cross-attention and sliding windows."""

    def run(
        backend: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        sliding_window_size: int | None = None,
        scaling: float | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        if encoder_lens is None and (sliding_window_size is None or sliding_window_size < 0):
            return decode(query, output, k_cache, v_cache, req_to_token[req_pool_indices], seq_lens, scaling)
        tables = req_to_token, req_pool_indices, seq_lens, encoder_lens
        return one_by_one(
            backend, query, output, k_cache, v_cache, *tables, scaling=scaling, sliding_window_size=sliding_window_size, **rest
        )

    return run


def decode(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """One query per row against the row's keys.

    Rows are padded to powers of two, and those of equal padded length are computed together: what a row gets does not depend on which other
    lengths are there (with one thread, which a server has by default).

    Args:
        query, output: [rows, heads, head size]; output is written.
        k_cache, v_cache: [slots, key/value heads, head size].
        slots: [rows, longest context] integers, of which the first `length` of each row count.
        lengths: [rows], each at least 1.
    """
    of_length = defaultdict[int, list[int]](list)
    for row, length in enumerate(lengths.tolist()):
        of_length[max(_SHORTEST, 1 << (length - 1).bit_length())].append(row)
    num_kv_heads = k_cache.shape[1]
    parts = [
        (padded, members[start : start + max(1, _AT_A_TIME // padded)])
        for padded, members in of_length.items()
        for start in range(0, len(members), max(1, _AT_A_TIME // padded))
    ]
    for padded, members in parts:
        rows = torch.tensor(members)
        positions = torch.arange(padded)
        is_key = positions < lengths[rows, None]
        # A row's padding is its own first key: what lies in slots that nobody uses may be anything.
        used = torch.where(is_key, positions, 0)
        chosen = slots[rows].gather(1, used).flatten()
        keys, values = (
            cache.flatten(1).index_select(0, chosen).to(query.dtype).view(len(members), padded, num_kv_heads, -1).transpose(1, 2)
            for cache in (k_cache, v_cache)
        )
        # The query heads that share a key head are to it what the positions of a sequence are.
        grouped = query[rows].unflatten(1, (num_kv_heads, -1))
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=is_key[:, None, None], scale=scaling)
        output[rows] = attended.flatten(1, 2).to(output.dtype)
    return output
