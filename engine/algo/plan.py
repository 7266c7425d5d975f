"""A pure plan deals rows, or families of rows with one prompt, to updates, data-parallel ranks and microbatches.

Shapes: R rows, U units that are dealt whole: a row, or rows that share their prompt.
"""

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# What share_prompts="auto" asks of a prompt and of a whole plan. Attention is computed in tiles of up to 128 tokens, so a shorter
# prompt saves no whole tile; and rows that are dealt one by one balance the ranks better.
MIN_SHARED_TOKENS = 128
MIN_SAVING = 0.2


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Of each row; the same hash: the rows can share their prompt (`TrainingRow.prefix_hash`)."""

    hashes_R: Sequence[int]
    lengths_R: Sequence[int]  # tokens


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """Which rows each data-parallel rank packs into each microbatch of each update.

    `rows[update][dp_rank][microbatch]` holds indices into the lengths that were planned; an empty tuple is a filler. All ranks of
    an update have the same number of microbatches.
    """

    rows: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    shares_prompts: bool = False  # the rows of a microbatch are to share their prompts
    work: float = 0.0  # of the busiest rank, summed over the updates; in the cost of one token's linear layers

    @property
    def num_updates(self) -> int:
        return len(self.rows)

    def num_microbatches(self, update: int) -> int:
        return len(self.rows[update][0])

    def num_rows(self, update: int) -> int:
        """Rows of an update over all ranks."""
        return sum(len(microbatch) for rank in self.rows[update] for microbatch in rank)


def work_of(lengths_R: NDArray[np.int64], prompt_lengths_R: NDArray[np.int64] | int = 0, *, crossover_tokens: int) -> NDArray[np.float64]:
    """Cost of each sequence, in the cost of one token's linear layers: len + len² / crossover_tokens.

    Args:
        prompt_lengths_R: tokens at the beginning that are not computed, but seen; their own cost is left out.
    """
    lengths, prompts = lengths_R.astype(np.float64), np.asarray(prompt_lengths_R, dtype=np.float64)
    return (lengths - prompts) + (lengths * lengths - prompts * prompts) / crossover_tokens


@dataclass(frozen=True, kw_only=True)
class _Units:
    rows: list[tuple[int, ...]]  # of each unit
    tokens_U: NDArray[np.int64]  # that are computed
    work_U: NDArray[np.float64]


def plan_updates(
    lengths_R: Sequence[int] | NDArray[np.int64],
    *,
    num_updates: int,
    dp_size: int,
    microbatch_tokens: int,
    seed: int = 0,
    crossover_tokens: int = 12_288,
    prompts: Prompts | None = None,
    share_prompts: Literal["auto", "always", "never"] = "never",
) -> UpdatePlan:
    """Deal rows to updates, data-parallel ranks and microbatches. Pure: every rank computes the same plan from gathered lengths.

    A seeded shuffle deals equally many units (±1) to each update, so none sees one length or difficulty only. Within an update
    units go, costliest first, to the rank with the least work; each rank fills microbatches up to `microbatch_tokens` and
    splits its largest ones until it has as many as the busiest rank, then takes fillers. A rank's microbatches are ordered by
    falling work, so that ranks which meet in every microbatch (expert parallelism) meet at equal work.

    A unit is a row, or, where prompts are shared, all rows with one prompt; as many of these as fit into a microbatch.

    Args:
        lengths_R: positions that each row takes (`TrainingRow.num_tokens`); rows of 0 are left out.
        num_updates: optimizer steps to spread the rows over; there are fewer when there are fewer units, and none without rows.
        microbatch_tokens: most tokens computed per microbatch; a longer row has a microbatch of its own.
        crossover_tokens: length at which causal attention costs as much as the linear layers. For width h a token costs
            about 24h² FLOP per layer in the linear layers and 2h·len in attention, so it is 12h; the default is h = 1024.
        prompts: of the rows; needed unless share_prompts is "never".
        share_prompts: "auto": prompts of at least MIN_SHARED_TOKENS tokens, if that takes more than MIN_SAVING off the busiest rank's
            work and leaves enough units for all updates.
    Raises: ValueError for a count below 1, a negative length or other counts of rows.
    """
    for name, value in (("num_updates", num_updates), ("dp_size", dp_size), ("microbatch_tokens", microbatch_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    lengths = np.asarray(lengths_R, dtype=np.int64)
    if (lengths < 0).any():
        raise ValueError(f"row {int(np.argmin(lengths))} has length {int(lengths.min())}; a length must not be negative")

    def plan(units: _Units, *, shares_prompts: bool) -> UpdatePlan:
        num_units = len(units.rows)
        shuffled = np.random.default_rng(seed).permutation(num_units)
        updates = [_plan_update(shuffled[u::num_updates], units, dp_size, microbatch_tokens) for u in range(min(num_updates, num_units))]
        rows = tuple(rows for rows, _ in updates)
        return UpdatePlan(rows=rows, shares_prompts=shares_prompts, work=sum(work for _, work in updates))

    apart = plan(_rows_apart(lengths, crossover_tokens), shares_prompts=False)
    if share_prompts == "never":
        return apart
    if prompts is None or len(prompts.hashes_R) != len(lengths) or len(prompts.lengths_R) != len(lengths):
        found = "none" if prompts is None else f"{len(prompts.hashes_R)} hashes and {len(prompts.lengths_R)} lengths"
        raise ValueError(f"{found} of prompts for {len(lengths)} rows; share_prompts={share_prompts!r} needs one for each")
    min_tokens = 1 if share_prompts == "always" else MIN_SHARED_TOKENS
    together = plan(_families(lengths, prompts, min_tokens, microbatch_tokens, crossover_tokens), shares_prompts=True)
    saves = together.work < (1 - MIN_SAVING) * apart.work and together.num_updates == apart.num_updates
    return together if share_prompts == "always" or saves else apart


def _rows_apart(lengths: NDArray[np.int64], crossover_tokens: int) -> _Units:
    present = np.flatnonzero(lengths)
    work_U = work_of(lengths[present], crossover_tokens=crossover_tokens)
    return _Units(rows=[(row,) for row in present.tolist()], tokens_U=lengths[present], work_U=work_U)


def _families(lengths: NDArray[np.int64], prompts: Prompts, min_tokens: int, capacity: int, crossover_tokens: int) -> _Units:
    """Rows with one prompt together, unless they exceed a microbatch: then each unit computes the prompt once."""
    prompt_lengths = np.asarray(prompts.lengths_R, dtype=np.int64)
    prompt_work = work_of(prompt_lengths, crossover_tokens=crossover_tokens)
    added_work = work_of(lengths, prompt_lengths, crossover_tokens=crossover_tokens)
    rows: list[list[int]] = []
    tokens: list[int] = []
    work: list[float] = []
    unit_of: dict[int, int] = {}  # the one that rows with this prompt are added to
    for row in np.flatnonzero(lengths).tolist():
        added, prompt = int(lengths[row] - prompt_lengths[row]), prompts.hashes_R[row]
        unit = unit_of.get(prompt)
        if unit is None or prompt_lengths[row] < min_tokens or tokens[unit] + added > capacity:
            unit_of[prompt] = unit = len(rows)
            rows.append([])
            tokens.append(int(prompt_lengths[row]))
            work.append(float(prompt_work[row]))
        rows[unit].append(row)
        tokens[unit] += added
        work[unit] += float(added_work[row])
    return _Units(rows=[tuple(of_unit) for of_unit in rows], tokens_U=np.array(tokens), work_U=np.array(work))


def _plan_update(
    units: NDArray[np.int64], of: _Units, dp_size: int, microbatch_tokens: int
) -> tuple[tuple[tuple[tuple[int, ...], ...], ...], float]:
    """Rows of each rank's microbatches, and the busiest rank's work."""
    by_falling_work = sorted(units.tolist(), key=lambda unit: (-of.work_U[unit], unit))
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [(0.0, rank) for rank in range(dp_size)]
    for unit in by_falling_work:
        load, rank = heapq.heappop(loads)
        ranks[rank].append(unit)
        heapq.heappush(loads, (load + float(of.work_U[unit]), rank))
    bins_of_rank = [_fill_bins(rank_units, of.tokens_U, microbatch_tokens) for rank_units in ranks]
    num_microbatches = max(len(bins) for bins in bins_of_rank)
    total = functools.partial(_total_work, of.work_U)
    for bins in bins_of_rank:
        while len(bins) < num_microbatches:
            largest = max((b for b in bins if len(b) > 1), key=total, default=None)
            if largest is None:
                bins.append([])
                continue
            bins.remove(largest)
            bins += [largest[::2], largest[1::2]]
        bins.sort(key=total, reverse=True)
    rows = tuple(tuple(tuple(row for unit in b for row in of.rows[unit]) for b in bins) for bins in bins_of_rank)
    return rows, max(load for load, _ in loads)


def _total_work(work_U: NDArray[np.float64], units: Sequence[int]) -> float:
    return sum(float(work_U[unit]) for unit in units)


def _fill_bins(units: Sequence[int], tokens_U: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """First fit, costliest first: at most 11/9 of the fewest possible bins, plus one, where the costliest are the longest."""
    bins: list[list[int]] = []
    space = np.zeros(len(units), dtype=np.int64)  # left in each bin; a unit longer than the capacity closes its own
    for unit in units:
        fits = np.flatnonzero(space[: len(bins)] >= tokens_U[unit])
        if len(fits):
            bins[fits[0]].append(unit)
            space[fits[0]] -= tokens_U[unit]
        else:
            space[len(bins)] = max(0, capacity - int(tokens_U[unit]))
            bins.append([unit])
    return bins
