"""A mask, checked and kept on the host, with what is derived from it once and shared by all layers.

Shapes: T queries, S keys.
"""

import itertools
import weakref

import numpy as np
import torch

from tandem.kernels.attention.reference import TaskPlan, plan_tasks
from tandem.kernels.attention.tiles import Ints, TilePlan, plan_tiles, to_device

# The places and ends that kernels read are padded to a multiple of it, a multiple of every tile's size.
PADDING = 128

_numbers = itertools.count()
_plans: "weakref.WeakValueDictionary[int, AttentionPlan]" = weakref.WeakValueDictionary()


class AttentionPlan:
    """How a mask is computed. Made by `plan_attention`; what an implementation needs of it is made when that first asks."""

    def __init__(self, visible_end_S: Ints, positions_T: Ints, device: torch.device) -> None:
        self.device = device
        self.num_queries, self.num_keys = len(positions_T), len(visible_end_S)
        self._visible_end_S, self._positions_T = visible_end_S, positions_T
        self._tasks: dict[int, TaskPlan] = {}
        self._tiles: dict[tuple[int, int, int], TilePlan] = {}
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None
        self.number = next(_numbers)
        """By which operators of torch name it: they take tensors and numbers only. `plan_of` finds it while it lives."""
        _plans[self.number] = self

    def num_rows_below(self, place: int) -> int:
        """The leading rows of q whose place among the keys is below this one."""
        return int(np.searchsorted(self._positions_T[: (self._positions_T >= 0).sum()], place))

    def tasks(self, grad_start: int = 0) -> TaskPlan:
        """For the reference. Queries below `grad_start` are left out."""
        if grad_start not in self._tasks:
            positions_T = np.where(self._positions_T >= grad_start, self._positions_T, -1)
            self._tasks[grad_start] = plan_tasks(positions_T, self._visible_end_S, self.device)
        return self._tasks[grad_start]

    def tiles(self, block_q: int, block_k: int, grad_start: int = 0) -> TilePlan:
        """For kernels with tiles of this size."""
        key = (block_q, block_k, grad_start)
        if key not in self._tiles:
            self._tiles[key] = plan_tiles(self._positions_T, self._visible_end_S, block_q, block_k, grad_start, self.device)
        return self._tiles[key]

    @property
    def num_padded_queries(self) -> int:
        """Of what kernels read and write for each query."""
        return -(-self.num_queries // PADDING) * PADDING

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries' places, padded with -1, and the keys' visible ends, padded with 0; int32 on the device."""
        if self._places is None:
            self._places = self._padded(self._positions_T, -1), self._padded(self._visible_end_S, 0)
        return self._places

    def _padded(self, values: Ints, filling: int) -> torch.Tensor:
        padded = np.full(-(-len(values) // PADDING) * PADDING, filling)
        padded[: len(values)] = values
        return to_device(padded, self.device)


def plan_of(number: int) -> AttentionPlan:
    """The living plan of this number."""
    return _plans[number]


def plan_attention(
    visible_end_S: torch.Tensor, query_positions_T: torch.Tensor | None = None, *, device: torch.device | None = None
) -> AttentionPlan:
    """Check the mask j <= i < visible_end[j] and prepare it for `packed_attention`.

    Args:
        visible_end_S: [S] integer. Best on the host, where the plan is made: from a GPU it is copied, which waits for the GPU.
        query_positions_T: [T] integer, the place of each row of q among the S keys, for a rank that holds a part of the queries.
            Places increase; -1 marks padded rows at the end, whose output is 0. None: all queries in order.
        device: where attention is computed; None: where visible_end_S is.
    Raises: ValueError if a token does not see itself, visible ends exceed S or do not nest, or places do not increase.
    """
    for name, values in (("visible_end", visible_end_S), ("query_positions", query_positions_T)):
        if values is not None and (values.dim() != 1 or values.is_floating_point() or values.is_complex()):
            raise ValueError(f"{name} is {values.dtype} of shape {tuple(values.shape)}; it must be integers of one dimension")
    visible_end = visible_end_S.cpu().numpy().astype(np.int64)
    _check_visible_end(visible_end)
    if query_positions_T is None:
        positions = np.arange(len(visible_end))
    else:
        positions = query_positions_T.cpu().numpy().astype(np.int64)
        _check_positions(positions, len(visible_end))
    # A tensor's device has a number, which "cuda" lacks.
    return AttentionPlan(visible_end, positions, visible_end_S.device if device is None else torch.empty(0, device=device).device)


def _check_visible_end(visible_end: Ints) -> None:
    num_keys = len(visible_end)
    sees_itself = visible_end > np.arange(num_keys)
    if not sees_itself.all():
        j = int(np.argmin(sees_itself))
        raise ValueError(f"visible_end[{j}] is {visible_end[j]}; token {j} must see itself, so it must be greater than {j}")
    if num_keys and visible_end.max() > num_keys:
        j = int(visible_end.argmax())
        raise ValueError(f"visible_end[{j}] is {visible_end[j]}, but there are {num_keys} tokens; it must be at most that")
    # A token that others still see when the next one comes must stay visible at least as long as that one.
    open_ends: list[tuple[int, int]] = []
    for j in np.flatnonzero(np.diff(visible_end, prepend=-1)).tolist():
        end = int(visible_end[j])
        while open_ends and open_ends[-1][1] <= j:
            open_ends.pop()
        if open_ends and open_ends[-1][1] < end:
            i, shorter = open_ends[-1]
            raise ValueError(
                f"visible_end does not nest: token {j} sees token {i} and is visible up to {end}, "
                f"but token {i} only up to {shorter}; within a sequence visible_end must not grow"
            )
        open_ends.append((j, end))


def _check_positions(positions: Ints, num_keys: int) -> None:
    rows = positions[: (positions >= 0).sum()]
    if (rows < 0).any() or (np.diff(rows) <= 0).any() or (len(rows) and rows[-1] >= num_keys):
        raise ValueError(f"query positions {positions[:8].tolist()}… must increase and stay below {num_keys}, with -1 only at their end")
