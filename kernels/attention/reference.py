"""Packed attention in plain torch: exact, quick for many short sequences, and bounded in memory for long ones.

A mask is cut into tasks: some queries and all keys that they see, so that no softmax is split. Short sequences are one task each;
tasks of similar size are padded into one batch of matmuls. A long sequence or a tree becomes blocks of queries, one task a block.
Probabilities of short tasks are kept for the backward pass; those of long ones are computed again.

Shapes: T queries, S keys, N query heads, G key/value heads, D head width (values may have another), B tasks of a batch, Q and K
their padded queries and keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# Largest queries x keys of one task and of one batch: bounds the scores that exist at a time (times the number of heads).
MAX_TASK_SCORES = 1 << 20
# Largest queries x keys over all batches for which the probabilities are kept for the backward pass.
MAX_KEPT_SCORES = 1 << 22
# Queries per task of a mask that is a tree.
TREE_BLOCK = 64


@dataclass(frozen=True)
class CausalMask:
    """One mask for all tasks of whole sequences: padded keys lie behind every query."""

    bias_1QK: torch.Tensor  # fp32, 0 where visible and -inf elsewhere


@dataclass(frozen=True)
class IntervalMask:
    """Key k of a task is visible to the queries from its place on and before its end; made anew at each use, for memory's sake."""

    query_place_BQ: torch.Tensor  # int32, -1 for a padded query
    key_place_BK: torch.Tensor  # int32
    key_end_BK: torch.Tensor  # int32, 0 for a padded key


@dataclass(frozen=True)
class Batch:
    """Tasks of one padded size. A padded query or key has the index T or S, a row of zeros."""

    query_index: torch.Tensor  # int64 [B * Q]
    key_index: torch.Tensor  # int64 [B * K]
    visible_BQK: "CausalMask | IntervalMask"
    num_tasks: int
    num_queries: int  # Q
    num_keys: int  # K
    kept: bool


@dataclass(frozen=True)
class AttentionPlan:
    """How a mask is computed; depends on the mask only, so one plan serves all layers."""

    num_queries: int
    num_keys: int
    batches: tuple[Batch, ...]
    output_index_T: torch.Tensor  # int64, row of each query in the batches' outputs laid end to end
    key_row_S: torch.Tensor | None  # int64, row of each key in the batches' keys laid end to end; None if a key is in several tasks


@dataclass(frozen=True)
class _Task:
    query_rows: NDArray[np.int64]  # rows of q
    query_positions: NDArray[np.int64]  # their places among the keys
    keys: NDArray[np.int64]


def plan_attention(visible_end_S: torch.Tensor, query_positions_T: torch.Tensor | None = None) -> AttentionPlan:
    """Cut the mask j <= i < visible_end[j] into batches of tasks.

    Args:
        visible_end_S: [S] integer, on any device; the plan's tensors live there too.
        query_positions_T: [T] integer, the place of each row of q among the S keys, for a rank that holds a part of the queries;
            -1 marks a padded row, whose output is 0. Queries next to each other in a sequence should be next to each other
            here. None: all queries in order.
    Raises: ValueError if visible_end[j] <= j for some j, or it does not nest.
    """
    device = visible_end_S.device
    visible_end = visible_end_S.cpu().numpy().astype(np.int64)
    num_keys = len(visible_end)
    if num_keys and (visible_end <= np.arange(num_keys)).any():
        j = int(np.argmax(visible_end <= np.arange(num_keys)))
        raise ValueError(f"visible_end[{j}] is {visible_end[j]}; token {j} must see itself, so it must be greater than {j}")
    positions = np.arange(num_keys) if query_positions_T is None else query_positions_T.cpu().numpy().astype(np.int64)
    starts = np.flatnonzero(np.diff(visible_end, prepend=-1))
    ends = np.append(starts[1:], num_keys)
    if bool((visible_end[starts] == ends).all()):
        sequence_start_S = np.repeat(starts, ends - starts)
        tasks, causal = _sequence_tasks(positions, sequence_start_S), True
    else:
        tasks, causal = _tree_tasks(positions, visible_end), False
    return _plan_of(tasks, positions, visible_end, causal, device)


def _sequence_tasks(positions: NDArray[np.int64], sequence_start_S: NDArray[np.int64]) -> list[_Task]:
    """One task per run of neighbouring queries of one sequence, cut where it would hold too many scores."""
    rows = np.flatnonzero(positions >= 0)
    if not len(rows):
        return []
    first = sequence_start_S[positions[rows]]
    is_break = (np.diff(rows) != 1) | (np.diff(positions[rows]) != 1) | (np.diff(first) != 0)
    run_starts = np.concatenate([[0], np.flatnonzero(is_break) + 1])
    run_ends = np.append(run_starts[1:], len(rows))
    tasks = []
    for a, b in zip(run_starts.tolist(), run_ends.tolist(), strict=True):
        row, position, key_start, length = int(rows[a]), int(positions[rows[a]]), int(first[a]), b - a
        block = max(16, MAX_TASK_SCORES // (position + length - key_start))
        for i in range(0, length, block):
            n = min(block, length - i)
            own = np.arange(i, i + n)
            tasks.append(_Task(row + own, position + own, np.arange(key_start, position + i + n)))
    return tasks


def _tree_tasks(positions: NDArray[np.int64], visible_end: NDArray[np.int64]) -> list[_Task]:
    if len(positions) != len(visible_end) or (positions != np.arange(len(positions))).any():
        raise ValueError("a mask that is a tree needs all queries in order; context parallelism takes plain sequences only")
    tasks = []
    for start in range(0, len(positions), TREE_BLOCK):
        own = positions[start : start + TREE_BLOCK]
        tasks.append(_Task(own, own, np.flatnonzero(visible_end[: own[-1] + 1] > start)))
    return tasks


def _padded(length: int) -> int:
    """Lengths that share a batch: multiples of 8, and from 64 on steps of an eighth."""
    step = 8 if length <= 64 else 1 << (length.bit_length() - 4)
    return -(-length // step) * step


def _plan_of(
    tasks: Sequence[_Task], positions: NDArray[np.int64], visible_end: NDArray[np.int64], causal: bool, device: torch.device
) -> AttentionPlan:
    num_queries, num_keys = len(positions), len(visible_end)
    by_size: dict[tuple[int, int], list[_Task]] = {}
    for task in tasks:
        by_size.setdefault((_padded(len(task.query_rows)), _padded(len(task.keys))), []).append(task)
    total = sum(q * k * len(members) for (q, k), members in by_size.items())
    kept = total <= MAX_KEPT_SCORES
    batches, num_outputs, num_key_rows = [], 0, 0
    output_index = np.full(num_queries, -1, dtype=np.int64)
    key_row, key_uses = np.zeros(num_keys, dtype=np.int64), np.zeros(num_keys, dtype=np.int64)
    # Largest first: what follows fits into the memory that was freed, where growing sizes would each take more from the system.
    for (padded_q, padded_k), members in sorted(by_size.items(), key=lambda item: -item[0][0] * item[0][1]):
        size = max(1, MAX_TASK_SCORES // (padded_q * padded_k))
        for i in range(0, len(members), size):
            part = members[i : i + size]
            query_index = np.full((len(part), padded_q), num_queries, dtype=np.int64)
            key_index = np.full((len(part), padded_k), num_keys, dtype=np.int64)
            query_place = np.full((len(part), padded_q), -1, dtype=np.int32)
            key_end = np.zeros((len(part), padded_k), dtype=np.int32)
            whole = causal and all(len(task.keys) == len(task.query_rows) for task in part) and padded_q == padded_k
            for b, task in enumerate(part):
                nq, nk = len(task.query_rows), len(task.keys)
                query_index[b, :nq], key_index[b, :nk] = task.query_rows, task.keys
                output_index[task.query_rows] = num_outputs + b * padded_q + np.arange(nq)
                key_row[task.keys] = num_key_rows + b * padded_k + np.arange(nk)
                key_uses[task.keys] += 1
                query_place[b, :nq], key_end[b, :nk] = task.query_positions, visible_end[task.keys]
            num_outputs += query_index.size
            num_key_rows += key_index.size
            if whole:
                above = torch.ones((1, padded_q, padded_q), dtype=torch.bool, device=device).triu(1)
                mask = CausalMask(torch.zeros(above.shape, device=device).masked_fill_(above, float("-inf")))
            else:
                places = (query_place, key_index.astype(np.int32), key_end)
                mask = IntervalMask(*(torch.from_numpy(x).to(device) for x in places))
            batches.append(
                Batch(
                    query_index=torch.from_numpy(query_index).flatten().to(device),
                    key_index=torch.from_numpy(key_index).flatten().to(device),
                    visible_BQK=mask,
                    num_tasks=len(part),
                    num_queries=padded_q,
                    num_keys=padded_k,
                    kept=kept,
                )
            )
    output_index[output_index < 0] = num_outputs
    return AttentionPlan(
        num_queries=num_queries,
        num_keys=num_keys,
        batches=tuple(batches),
        output_index_T=torch.from_numpy(output_index).to(device),
        key_row_S=torch.from_numpy(key_row).to(device) if (key_uses == 1).all() else None,
    )


def _with_zero_row(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.float(), x.new_zeros((1, *x.shape[1:]), dtype=torch.float32)])


def _queries(x_TND: torch.Tensor, batch: Batch, num_groups: int) -> torch.Tensor:
    """[B * G, Q * N/G, D]: the heads that share a key stand beside each other as more queries."""
    _, num_heads, width = x_TND.shape
    rows = x_TND.index_select(0, batch.query_index).view(batch.num_tasks, -1, num_groups, num_heads // num_groups, width)
    return rows.transpose(1, 2).reshape(batch.num_tasks * num_groups, -1, width)


def _keys(x_SGD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B * G, K, D]"""
    _, num_groups, width = x_SGD.shape
    rows = x_SGD.index_select(0, batch.key_index).view(batch.num_tasks, -1, num_groups, width)
    return rows.transpose(1, 2).reshape(batch.num_tasks * num_groups, -1, width)


def _rows(x: torch.Tensor, batch: Batch, num_groups: int, rows_per_task: int) -> torch.Tensor:
    """Inverse of `_queries` (rows_per_task = Q) and `_keys` (K): [B * rows_per_task, heads, D]."""
    per_group, width = x.shape[1] // rows_per_task, x.shape[2]
    x = x.view(batch.num_tasks, num_groups, rows_per_task, per_group, width).transpose(1, 2)
    return x.reshape(-1, num_groups * per_group, width)


def _bias(batch: Batch) -> torch.Tensor:
    """[1 or B, Q, K] fp32, 0 where visible and -inf elsewhere."""
    mask = batch.visible_BQK
    if isinstance(mask, CausalMask):
        return mask.bias_1QK
    place_BQ1 = mask.query_place_BQ[:, :, None]
    hidden_BQK = (mask.key_place_BK[:, None] > place_BQ1) | (place_BQ1 >= mask.key_end_BK[:, None])
    # A padded query attends to everything, for no result: its softmax must not be that of nothing.
    hidden_BQK &= place_BQ1 >= 0
    return torch.zeros(hidden_BQK.shape, device=hidden_BQK.device).masked_fill_(hidden_BQK, float("-inf"))


def _probabilities(q: torch.Tensor, k: torch.Tensor, batch: Batch, num_groups: int, scale: float) -> torch.Tensor:
    """[B * G, Q * N/G, K]"""
    bias = _bias(batch)
    num_tasks, num_queries, num_keys = bias.shape
    heads_per_group = q.shape[1] // num_queries
    bias = bias[:, None, :, None].expand(num_tasks, num_groups if num_tasks > 1 else 1, num_queries, heads_per_group, num_keys)
    # Scaled after the product, as rollout engines do: with the scale folded into it the last bits of their log-probs differ.
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale).add_(bias.reshape(-1, q.shape[1], num_keys))
    return torch.softmax(scores, dim=-1)


def attention_forward(
    q_TND: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, plan: AttentionPlan, scale: float, *, keep: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the probabilities that the backward pass takes over (none unless `keep`)."""
    num_groups = k_SGD.shape[1]
    q1, k1, v1 = _with_zero_row(q_TND), _with_zero_row(k_SGD), _with_zero_row(v_SGD)
    outputs, kept = [], []
    for batch in plan.batches:
        k = _keys(k1, batch)
        probs = _probabilities(_queries(q1, batch, num_groups), k, batch, num_groups, scale)
        outputs.append(_rows(torch.bmm(probs, _keys(v1, batch)), batch, num_groups, batch.num_queries))
        if keep and batch.kept:
            kept.append(probs)
    outputs.append(q1.new_zeros((1, q1.shape[1], v1.shape[2])))
    return torch.cat(outputs).index_select(0, plan.output_index_T).to(q_TND.dtype), kept


def attention_backward(
    grad_TND: torch.Tensor,
    q_TND: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    kept_probs: Sequence[torch.Tensor],
    plan: AttentionPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each in its own dtype."""
    num_groups = k_SGD.shape[1]
    q1, k1, v1, g1 = (_with_zero_row(x) for x in (q_TND, k_SGD, v_SGD, grad_TND))
    dq_parts, dk_parts, dv_parts = [], [], []
    dk_sum, dv_sum = torch.zeros_like(k1), torch.zeros_like(v1)
    for i, batch in enumerate(plan.batches):
        q, k, v, g = _queries(q1, batch, num_groups), _keys(k1, batch), _keys(v1, batch), _queries(g1, batch, num_groups)
        probs = kept_probs[i] if batch.kept else _probabilities(q, k, batch, num_groups, scale)
        num_queries, num_keys = batch.num_queries, batch.num_keys
        dv = _rows(torch.bmm(probs.transpose(1, 2), g), batch, num_groups, num_keys)
        dscores = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), probs, -1, torch.float32)
        dq_parts.append(_rows(torch.bmm(dscores, k), batch, num_groups, num_queries))
        dk = _rows(torch.bmm(dscores.transpose(1, 2), q), batch, num_groups, num_keys)
        if plan.key_row_S is None:
            dk_sum.index_add_(0, batch.key_index, dk)
            dv_sum.index_add_(0, batch.key_index, dv)
        else:
            dk_parts.append(dk)
            dv_parts.append(dv)
    dq_parts.append(q1[-1:])
    dq = torch.cat(dq_parts).index_select(0, plan.output_index_T).mul_(scale)
    if plan.key_row_S is None:
        dk, dv = dk_sum[:-1], dv_sum[:-1]
    else:
        dk, dv = (
            torch.cat(parts).index_select(0, plan.key_row_S) if parts else total[:-1]
            for parts, total in ((dk_parts, dk_sum), (dv_parts, dv_sum))
        )
    return dq.to(q_TND.dtype), dk.mul(scale).to(k_SGD.dtype), dv.to(v_SGD.dtype)
