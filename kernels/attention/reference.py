"""Packed attention in plain torch: exact, quick for many short sequences, and bounded in memory for long ones.

A mask is cut into tasks: some queries and all keys that they see, so that no softmax is split. Short sequences are one task each;
tasks of similar size are padded into one batch of matmuls. A long sequence or a tree becomes blocks of queries, one task a block.
Probabilities of short tasks are kept for the backward pass; those of long ones are computed again. Tasks keep their keys as ranges,
and long masks make their batches' indices when they are used: a plan's memory grows with the tokens, not with their square.

Shapes: T queries, S keys, N query heads, G key/value heads, D head width (values may have another), B tasks of a batch, Q and K
their padded queries and keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# Largest queries x keys of one task and of one batch: bounds the scores that exist at a time (times the number of heads).
MAX_TASK_SCORES = 1 << 20
# Largest queries x keys over all batches for which the probabilities are kept for the backward pass.
MAX_KEPT_SCORES = 1 << 22
# Largest number of keys over all tasks for which the batches' indices are kept.
MAX_KEPT_KEYS = 1 << 20
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


@dataclass(frozen=True)
class _Task:
    query_rows: NDArray[np.int64]  # rows of q
    query_positions: NDArray[np.int64]  # their places among the keys
    key_ranges: tuple[tuple[int, int], ...]

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.key_ranges)

    @property
    def keys(self) -> NDArray[np.int64]:
        return np.concatenate([np.arange(start, end) for start, end in self.key_ranges])


@dataclass(frozen=True)
class _Group:
    """The tasks of one batch and their padded size."""

    tasks: list[_Task]
    num_queries: int
    num_keys: int


@dataclass(frozen=True)
class TaskPlan:
    """How a mask is computed; depends on the mask only, so one plan serves all layers."""

    groups: tuple[_Group, ...]
    visible_end_S: NDArray[np.int64]
    is_causal: bool  # nothing but whole sequences
    output_index_T: torch.Tensor  # int64, row of each query in the batches' outputs laid end to end
    key_row_S: torch.Tensor | None  # int64, row of each key in the batches' keys laid end to end; None if a key is in several tasks
    keeps_probs: bool
    kept_batches: tuple[Batch, ...] | None

    def batches(self) -> Iterator[Batch]:
        if self.kept_batches is not None:
            yield from self.kept_batches
        else:
            for group in self.groups:
                yield _batch(group, self.visible_end_S, self.is_causal, len(self.output_index_T), self.output_index_T.device)


def plan_tasks(positions_T: NDArray[np.int64], visible_end_S: NDArray[np.int64], device: torch.device) -> TaskPlan:
    """Cut a mask into batches of tasks. Queries at place -1 are left out: their output is 0."""
    starts = np.flatnonzero(np.diff(visible_end_S, prepend=-1))
    ends = np.append(starts[1:], len(visible_end_S))
    is_causal = bool((visible_end_S[starts] == ends).all())
    tasks = _sequence_tasks(positions_T, np.repeat(starts, ends - starts)) if is_causal else _tree_tasks(positions_T, visible_end_S)
    return _plan_of(tasks, len(positions_T), visible_end_S, is_causal, device)


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
            tasks.append(_Task(row + own, position + own, ((key_start, position + i + n),)))
    return tasks


def _tree_tasks(positions: NDArray[np.int64], visible_end: NDArray[np.int64]) -> list[_Task]:
    """One task per block of queries, with all keys that stay visible up to its first one."""
    rows = np.flatnonzero(positions >= 0)
    block = max(16, min(TREE_BLOCK, MAX_TASK_SCORES // max(1, len(visible_end))))
    tasks = []
    for i in range(0, len(rows), block):
        own = rows[i : i + block]
        first, last = int(positions[own[0]]), int(positions[own[-1]])
        edges = np.flatnonzero(np.diff(visible_end[: last + 1] > first, prepend=False, append=False))
        tasks.append(_Task(own, positions[own], tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))))
    return tasks


def _padded(length: int) -> int:
    """Lengths that share a batch: multiples of 8, and from 64 on steps of an eighth."""
    step = 8 if length <= 64 else 1 << (length.bit_length() - 4)
    return -(-length // step) * step


def _plan_of(tasks: Sequence[_Task], num_queries: int, visible_end: NDArray[np.int64], is_causal: bool, device: torch.device) -> TaskPlan:
    by_size: dict[tuple[int, int], list[_Task]] = {}
    for task in tasks:
        by_size.setdefault((_padded(len(task.query_rows)), _padded(task.num_keys)), []).append(task)
    groups, num_outputs, num_key_rows = [], 0, 0
    output_index = np.full(num_queries, -1, dtype=np.int64)
    key_row, key_uses = np.zeros(len(visible_end), dtype=np.int64), np.zeros(len(visible_end), dtype=np.int64)
    # Largest first: what follows fits into the memory that was freed, where growing sizes would each take more from the system.
    for (padded_q, padded_k), members in sorted(by_size.items(), key=lambda item: -item[0][0] * item[0][1]):
        size = max(1, MAX_TASK_SCORES // (padded_q * padded_k))
        for i in range(0, len(members), size):
            group = _Group(members[i : i + size], padded_q, padded_k)
            for b, task in enumerate(group.tasks):
                output_index[task.query_rows] = num_outputs + b * padded_q + np.arange(len(task.query_rows))
                row = num_key_rows + b * padded_k
                for start, end in task.key_ranges:
                    key_row[start:end] = np.arange(row, row + end - start)
                    key_uses[start:end] += 1
                    row += end - start
            num_outputs += len(group.tasks) * padded_q
            num_key_rows += len(group.tasks) * padded_k
            groups.append(group)
    output_index[output_index < 0] = num_outputs
    kept_batches = None
    if sum(len(group.tasks) * group.num_keys for group in groups) <= MAX_KEPT_KEYS:
        kept_batches = tuple(_batch(group, visible_end, is_causal, num_queries, device) for group in groups)
    return TaskPlan(
        groups=tuple(groups),
        visible_end_S=visible_end,
        is_causal=is_causal,
        output_index_T=torch.from_numpy(output_index).to(device),
        key_row_S=torch.from_numpy(key_row).to(device) if (key_uses == 1).all() else None,
        keeps_probs=sum(len(group.tasks) * group.num_queries * group.num_keys for group in groups) <= MAX_KEPT_SCORES,
        kept_batches=kept_batches,
    )


def _batch(group: _Group, visible_end: NDArray[np.int64], is_causal: bool, num_queries: int, device: torch.device) -> Batch:
    num_tasks, padded_q, padded_k = len(group.tasks), group.num_queries, group.num_keys
    query_index = np.full((num_tasks, padded_q), num_queries, dtype=np.int64)
    key_index = np.full((num_tasks, padded_k), len(visible_end), dtype=np.int64)
    query_place = np.full((num_tasks, padded_q), -1, dtype=np.int32)
    key_end = np.zeros((num_tasks, padded_k), dtype=np.int32)
    for b, task in enumerate(group.tasks):
        nq, keys = len(task.query_rows), task.keys
        query_index[b, :nq], key_index[b, : len(keys)] = task.query_rows, keys
        query_place[b, :nq], key_end[b, : len(keys)] = task.query_positions, visible_end[keys]
    if is_causal and padded_q == padded_k and all(task.num_keys == len(task.query_rows) for task in group.tasks):
        above = torch.ones((1, padded_q, padded_q), dtype=torch.bool, device=device).triu(1)
        mask = CausalMask(torch.zeros(above.shape, device=device).masked_fill_(above, float("-inf")))
    else:
        mask = IntervalMask(*(torch.from_numpy(x).to(device) for x in (query_place, key_index.astype(np.int32), key_end)))
    return Batch(
        query_index=torch.from_numpy(query_index).flatten().to(device),
        key_index=torch.from_numpy(key_index).flatten().to(device),
        visible_BQK=mask,
        num_tasks=num_tasks,
        num_queries=padded_q,
        num_keys=padded_k,
    )


def _with_zero_row(x: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 as it is, with one more row."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.cat([x, x.new_zeros((1, *x.shape[1:]))])


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


def _scores(q: torch.Tensor, k: torch.Tensor, batch: Batch, num_groups: int, scale: float) -> torch.Tensor:
    """[B * G, Q * N/G, K]"""
    bias = _bias(batch)
    num_tasks, num_queries, num_keys = bias.shape
    heads_per_group = q.shape[1] // num_queries
    bias = bias[:, None, :, None].expand(num_tasks, num_groups if num_tasks > 1 else 1, num_queries, heads_per_group, num_keys)
    # Scaled after the product, as rollout engines do: with the scale folded into it the last bits of their log-probs differ.
    return torch.bmm(q, k.transpose(1, 2)).mul_(scale).add_(bias.reshape(-1, q.shape[1], num_keys))


def kept_sizes(plan: TaskPlan, num_heads: int) -> list[int]:
    """Of each batch, how many probabilities `attention_forward` keeps if asked to."""
    if not plan.keeps_probs:
        return []
    return [num_heads * len(group.tasks) * group.num_queries * group.num_keys for group in plan.groups]


def attention_forward(
    q_TND: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, plan: TaskPlan, scale: float, *, keep: bool, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The output, the log-sum-exp [N, T] in nats if asked for, and the probabilities that the backward pass takes over, end to end."""
    num_groups = k_SGD.shape[1]
    q1, k1, v1 = _with_zero_row(q_TND), _with_zero_row(k_SGD), _with_zero_row(v_SGD)
    outputs, lses, sizes = [], [], kept_sizes(plan, q1.shape[1]) if keep else []
    kept = q1.new_empty(sum(sizes))
    rest = iter(kept.split(sizes))
    for batch in plan.batches():
        scores = _scores(_queries(q1, batch, num_groups), _keys(k1, batch), batch, num_groups, scale)
        if with_lse:
            lses.append(_rows(scores.logsumexp(-1)[:, :, None], batch, num_groups, batch.num_queries))
        probs = torch.softmax(scores, dim=-1, out=next(rest).view_as(scores)) if sizes else torch.softmax(scores, dim=-1)
        outputs.append(_rows(torch.bmm(probs, _keys(v1, batch)), batch, num_groups, batch.num_queries))
    outputs.append(q1.new_zeros((1, q1.shape[1], v1.shape[2])))
    out_TND = torch.cat(outputs).index_select(0, plan.output_index_T).to(q_TND.dtype)
    if not with_lse:
        return out_TND, None, kept
    lses.append(q1.new_full((1, q1.shape[1], 1), -torch.inf))
    return out_TND, torch.cat(lses).index_select(0, plan.output_index_T)[:, :, 0].T.contiguous(), kept


def attention_backward(
    grad_TND: torch.Tensor,
    grad_lse_NT: torch.Tensor | None,
    q_TND: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    kept: torch.Tensor,
    plan: TaskPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each in its own dtype. `kept`: the probabilities that the forward pass kept by this plan, or none."""
    num_groups = k_SGD.shape[1]
    kept_probs = kept.split(kept_sizes(plan, q_TND.shape[1])) if len(kept) else ()
    q1, k1, v1, g1 = (_with_zero_row(x) for x in (q_TND, k_SGD, v_SGD, grad_TND))
    lse1 = None if grad_lse_NT is None else _with_zero_row(grad_lse_NT.T[:, :, None])
    dq_parts, dk_parts, dv_parts = [], [], []
    dk_sum, dv_sum = torch.zeros_like(k1), torch.zeros_like(v1)
    for i, batch in enumerate(plan.batches()):
        q, k, v, g = _queries(q1, batch, num_groups), _keys(k1, batch), _keys(v1, batch), _queries(g1, batch, num_groups)
        if kept_probs:
            probs = kept_probs[i].view(k.shape[0], -1, k.shape[1])
        else:
            probs = torch.softmax(_scores(q, k, batch, num_groups, scale), dim=-1)
        num_queries, num_keys = batch.num_queries, batch.num_keys
        dv = _rows(torch.bmm(probs.transpose(1, 2), g), batch, num_groups, num_keys)
        dscores = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), probs, -1, probs.dtype)
        if lse1 is not None:
            dscores.addcmul_(probs, _queries(lse1, batch, num_groups))
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
