"""Attention for SGLang on a CPU: sequences of similar length together, where SGLang's torch_native backend takes one after the other.

In float32 it is that of the embedded engine, which rounds as the trainer's does: see tandem_sglang_arithmetic.py.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tandem.engine.rollout.attention import attend, attend_causally, key_multiple
from tandem.engine.rollout.products import round_up

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


def batched_extend(one_by_one: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Replaces TorchNativeAttnBackend._run_sdpa_forward_extend, which stays for all but causal attention in float32."""

    def run(
        backend: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        causal: bool = False,
        sliding_window_size: int | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        is_plain = causal and encoder_lens is None and (sliding_window_size is None or sliding_window_size < 0)
        if is_plain and query.dtype == torch.float32:
            return extend(query, output, k_cache, v_cache, req_to_token[req_pool_indices], seq_lens, extend_prefix_lens, scaling)
        rest |= {"scaling": scaling, "causal": causal, "sliding_window_size": sliding_window_size}
        tables = req_to_token, req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens, encoder_lens
        return one_by_one(backend, query, output, k_cache, v_cache, *tables, **rest)

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
    num_kv_heads, scale = k_cache.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
    # The query heads that share a key head are to it what the positions of a sequence are.
    grouped = query.unflatten(1, (num_kv_heads, -1))
    shortest = key_multiple(grouped.shape[2], min(k_cache.shape[-1], v_cache.shape[-1]))
    for members, padded in _together([max(shortest, 1 << (length - 1).bit_length()) for length in lengths.tolist()]):
        is_key = torch.arange(padded) < lengths[members, None]
        keys, values = (_gather(cache, slots[members], is_key, query.dtype) for cache in (k_cache, v_cache))
        if query.dtype == torch.float32:
            attended = query.new_empty(len(members) * num_kv_heads, grouped.shape[2], values.shape[-1])
            bias = torch.zeros(is_key.shape).masked_fill_(~is_key, -torch.inf)[:, None]
            attend(grouped[members].flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), bias, num_kv_heads, scale, attended)
        else:
            attended = scaled_dot_product_attention(grouped[members], keys, values, attn_mask=is_key[:, None, None], scale=scale)
        output[members] = attended.view(len(members), -1, values.shape[-1]).to(output.dtype)
    return output


def extend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    prefixes: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """The queries of the positions [prefix, length) of every sequence, end to end, each against the keys up to its own.

    Args:
        query, output: [sum of length - prefix, heads, head size] float32; output is written.
        k_cache, v_cache, slots, lengths: as for `decode`.
        prefixes: [sequences], each less than the length: how many tokens the cache held before.
    """
    num_kv_heads, scale = k_cache.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
    multiple = key_multiple(query.shape[1] // num_kv_heads, min(k_cache.shape[-1], v_cache.shape[-1]))
    ends = (lengths - prefixes).cumsum(0)
    for members, padded in _together([round_up(length, multiple) for length in lengths.tolist()]):
        positions = torch.arange(padded)
        is_key = positions < lengths[members, None]
        keys, values = (_gather(cache, slots[members], is_key, query.dtype) for cache in (k_cache, v_cache))
        is_query = is_key & (positions >= prefixes[members, None])
        packed = (ends[members, None] - lengths[members, None] + positions)[is_query]
        queries = query.new_zeros(len(members), padded, *query.shape[1:])
        queries[is_query] = query[packed]
        output[packed] = attend_causally(queries.transpose(1, 2), keys, values, scale).transpose(1, 2)[is_query].to(output.dtype)
    return output


def _together(padded_lengths: Sequence[int]) -> Iterator[tuple[torch.Tensor, int]]:
    """(sequences, padded length): those of equal padded length, some at a time."""
    of_length = defaultdict[int, list[int]](list)
    for row, padded in enumerate(padded_lengths):
        of_length[padded].append(row)
    for padded, rows in of_length.items():
        at_a_time = max(1, _AT_A_TIME // padded)
        for start in range(0, len(rows), at_a_time):
            yield torch.tensor(rows[start : start + at_a_time]), padded


def _gather(cache: torch.Tensor, slots: torch.Tensor, is_key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[rows, heads, padded length, head size] of the cache [slots, heads, head size], where is_key [rows, padded length] and slots say."""
    # A row's padding is its own first key: what lies in slots that nobody uses may be anything.
    chosen = slots.gather(1, torch.where(is_key, torch.arange(is_key.shape[1]), 0))
    return cache.flatten(1).index_select(0, chosen.flatten()).to(dtype).view(*chosen.shape, cache.shape[1], -1).transpose(1, 2)
