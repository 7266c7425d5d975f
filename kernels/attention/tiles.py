"""Which tiles of a mask a GPU kernel visits, and which of them need the mask inside.

For one tile of keys the tiles of queries that see it are one interval, and those that see all of it are an interval within, because
visible ends nest and the queries' places increase. For one tile of queries the tiles of keys that it sees are a few runs, at most one
per level of the tree at each of its ends. All are found from the ends of the intervals: no matrix of tiles is made.

Shapes: T queries, S keys, A tiles of queries, B tiles of keys, R runs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """Everything is int32, on the device of the mask."""

    query_order_A: torch.Tensor  # the tiles of queries that are computed, most work first
    query_runs_A3: torch.Tensor  # rows of `runs_R2`: first of the whole tiles', first of the masked tiles', end
    runs_R2: torch.Tensor  # first and end of neighbouring tiles of keys
    key_order_B: torch.Tensor  # the tiles of keys that are computed, most work first
    key_bounds_B4: torch.Tensor  # tiles of queries: seen from [0] to [3], of them whole from [1] to [2]


def to_device(values: Ints, device: torch.device) -> torch.Tensor:
    """As int32, without waiting for a GPU."""
    tensor = torch.from_numpy(values.astype(np.int32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def plan_tiles(positions_T: Ints, visible_end_S: Ints, block_q: int, block_k: int, grad_start: int, device: torch.device) -> TilePlan:
    """The tiles in which some query i sees some key j, j <= i < visible_end[j].

    Args:
        positions_T: place of each query among the keys, increasing, then -1 for padded rows at the end.
        visible_end_S: exclusive end of the queries that see each key; it nests.
        block_q, block_k: queries and keys per tile.
        grad_start: leave out queries below it, and keys below it from the tiles of keys that are computed (not from those seen).
    """
    num_rows = int((positions_T >= 0).sum())
    num_query_tiles = -(-len(positions_T) // block_q)
    rows = positions_T[:num_rows]
    first_row = int(np.searchsorted(rows, grad_start))
    bounds_B4 = _key_bounds(rows, first_row, visible_end_S, block_q, block_k)
    first, whole_first, whole_end, end = bounds_B4.T
    whole = _runs(whole_first, whole_end)
    masked = np.concatenate([_runs(first, whole_first), _runs(whole_end, end)])
    masked = masked[np.lexsort((masked[:, 1], masked[:, 0]))]
    query_tiles = np.arange(num_query_tiles)
    # The runs of a query tile lie beside each other: its whole ones, then its masked ones.
    runs = np.concatenate([np.insert(whole, 1, 0, axis=1), np.insert(masked, 1, 1, axis=1)])
    runs = runs[np.lexsort((runs[:, 2], runs[:, 1], runs[:, 0]))]
    key = runs[:, 0] * 2 + runs[:, 1]
    query_runs_A3 = np.stack([np.searchsorted(key, 2 * query_tiles + offset) for offset in range(3)], axis=1)
    query_work = np.bincount(runs[:, 0], weights=runs[:, 3] - runs[:, 2], minlength=num_query_tiles)
    query_order = np.argsort(-query_work, kind="stable")
    key_order = np.argsort(first - end, kind="stable")
    query_order = query_order[query_order >= first_row // block_q]
    key_order = key_order[key_order >= grad_start // block_k]
    parts = (query_order, query_runs_A3, runs[:, 2:], key_order, bounds_B4)
    # One copy to the device for all of them.
    flat = to_device(np.concatenate([part.reshape(-1) for part in parts]), device)
    on_device = [piece.view(part.shape) for piece, part in zip(flat.split([part.size for part in parts]), parts, strict=True)]
    return TilePlan(
        query_order_A=on_device[0],
        query_runs_A3=on_device[1],
        runs_R2=on_device[2],
        key_order_B=on_device[3],
        key_bounds_B4=on_device[4],
    )


def _key_bounds(rows: Ints, first_row: int, visible_end_S: Ints, block_q: int, block_k: int) -> Ints:
    """[B, 4]: the rows from `first_row` on that see a part and all of each tile of keys, in tiles of queries."""
    num_keys, num_rows = len(visible_end_S), len(rows)
    starts = np.arange(0, num_keys, block_k)
    if not num_keys:
        return np.zeros((0, 4), dtype=np.int64)
    last_end, first_end = np.maximum.reduceat(visible_end_S, starts), np.minimum.reduceat(visible_end_S, starts)
    seen = np.searchsorted(rows, np.stack([starts, last_end])).clip(min=first_row)
    is_seen = seen[0] < seen[1]
    first, end = seen[0] // block_q, -(-seen[1] // block_q)
    # Every row of the tile sees its last key, and its shortest-lived one.
    whole = np.searchsorted(rows, np.stack([starts + block_k - 1, first_end]))
    # Rows that are left out, at the start and at the end, do not keep a tile from being whole.
    whole_first = np.where(whole[0] <= first_row, first_row // block_q, -(-whole[0] // block_q))
    whole_end = np.where(whole[1] == num_rows, -(-num_rows // block_q), whole[1] // block_q)
    is_whole = is_seen & (whole_first < whole_end) & (starts + block_k <= num_keys)
    whole_first, whole_end = np.where(is_whole, whole_first, end), np.where(is_whole, whole_end, end)
    return np.where(is_seen, np.stack([first, whole_first, whole_end, end]), 0).T


def _runs(first_B: Ints, end_B: Ints) -> Ints:
    """[R, 3] query tile, first and end of its tiles of keys, from the query tiles [first, end) of every tile of keys; in order."""
    first, end = np.append(first_B, 0), np.append(end_B, 0)
    before_first, before_end = np.append(0, first_B), np.append(0, end_B)
    starts, ends = _difference(first, end, before_first, before_end), _difference(before_first, before_end, first, end)
    return np.concatenate([starts, ends[:, 1:]], axis=1)


def _difference(first: Ints, end: Ints, other_first: Ints, other_end: Ints) -> Ints:
    """[R, 2] query tile and index of an interval, for all query tiles that are in the interval but not in the other one; in order."""
    is_apart = (other_first >= other_end) | (other_first >= end) | (other_end <= first)
    left_end = np.where(is_apart, end, np.minimum(end, other_first))
    right_first = np.where(is_apart, end, np.maximum(first, other_end))
    pieces = [_expand(first, left_end), _expand(right_first, end)]
    found = np.concatenate(pieces)
    return found[np.lexsort((found[:, 1], found[:, 0]))]


def _expand(first: Ints, end: Ints) -> Ints:
    """[R, 2] all query tiles of the intervals and the intervals' indices."""
    lengths = np.maximum(end - first, 0)
    index = np.repeat(np.arange(len(first)), lengths)
    within = np.arange(len(index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.stack([first[index] + within, index], axis=1)
