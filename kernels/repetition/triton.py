"""The repetition tests in Triton.

While decoding, one program keeps one row: its counters, a ring of its last tokens, and a hash table of its n-grams (open addressing,
64 bits of hash in each cell, so that a cell is compared by all that identifies an n-gram). Afterwards, a program follows one period
through one response, and torch sorts the n-grams to tell which occurred before: in the sorted order the first of equal ones comes first.

Shapes as in the package; P periods, N tokens of an n-gram.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from tandem.kernels.repetition.reference import Rule

TILE = 1024  # tokens of a response that one program looks at together
NEVER = 2**31 - 1
NEVER_FIRES: tl.constexpr = tl.constexpr(NEVER)


@triton.jit
def _push_kernel(
    tokens,
    offsets,
    slots,
    fired,
    recent,
    runs,
    num_tokens,
    cusums,
    table,
    coefficients,
    needed,
    width,
    max_tokens,
    cells,
    shift,
    sum_limit,
    P: tl.constexpr,
    N: tl.constexpr,
    PERIODS: tl.constexpr,
    GRAM: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Appends one token to its row, or several in order. The ring is wider than the longest period: a token replaces none that is read."""
    program = tl.program_id(0)
    row = tl.load(slots + program).to(tl.int64)
    if SINGLE:
        start, end = program, program + 1
    else:
        start, end = tl.load(offsets + program), tl.load(offsets + program + 1)
    ring, cell = recent + row * width, table + row * cells
    place = tl.load(num_tokens + row)
    cusum = tl.load(cusums + row)
    lane = tl.arange(0, PERIODS)
    period = lane + 1
    run = tl.load(runs + row * P + lane, mask=lane < P, other=0)
    enough = tl.load(needed + lane, mask=lane < P, other=NEVER_FIRES)
    back = tl.arange(0, GRAM)
    coefficient = tl.load(coefficients + back, mask=back < N, other=0)
    fires = start < 0
    for at in range(start, end):
        token = tl.load(tokens + at).to(tl.int64)
        before = tl.load(ring + (place + width - period) % width, mask=(lane < P) & (place >= period), other=-1)
        run = tl.where((before == token) & (place >= period), run + 1, 0)
        fires = tl.max((run >= enough).to(tl.int32), 0) > 0
        if N > 0:
            earlier = tl.load(ring + (place + width - back) % width, mask=(back > 0) & (back < N) & (place >= back), other=0)
            identity = tl.sum(tl.where(back == 0, token, earlier) * coefficient, 0)
            identity = tl.where(identity == 0, 1, identity)
            if place + 1 >= N:
                index = (identity.to(tl.uint64, bitcast=True) >> shift).to(tl.int64)
                found = tl.load(cell + index)
                while (found != 0) & (found != identity):
                    index = (index + 1) & (cells - 1)
                    found = tl.load(cell + index)
                if (found == 0) & (place < max_tokens):
                    tl.store(cell + index, identity)
                cusum = tl.maximum(cusum + tl.where(found == 0, -1, 1), 0)
            fires = fires | (cusum > sum_limit)
        tl.store(ring + place % width, token)
        place += 1
        if not SINGLE:
            tl.debug_barrier()  # other threads read the ring and the table next
    tl.store(runs + row * P + lane, run, mask=lane < P)
    tl.store(num_tokens + row, place)
    tl.store(cusums + row, cusum)
    tl.store(fired + program, fires)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y)


@triton.jit
def _cycle_kernel(tokens, offsets, needed, first, TILE: tl.constexpr):
    """Where the run of one period is first long enough: how far the last token lies back that differs from the one before it by it."""
    response, period = tl.program_id(0), tl.program_id(1) + 1
    start = tl.load(offsets + response)
    length = tl.load(offsets + response + 1) - start
    enough = tl.load(needed + period - 1)
    begin, broken, found = period, period - 1, NEVER_FIRES
    while (begin < length) & (found == NEVER_FIRES):
        place = begin + tl.arange(0, TILE)
        inside = place < length
        here = tl.load(tokens + start + place, mask=inside, other=0)
        differs = here != tl.load(tokens + start + place - period, mask=inside, other=0)
        last = tl.associative_scan(tl.where(differs, place, broken), 0, _larger)
        found = tl.min(tl.where(inside & (place - last >= enough), place, NEVER_FIRES), 0)
        broken = tl.max(last, 0)
        begin += TILE
    if found != NEVER_FIRES:
        tl.atomic_min(first + response, found)


@triton.jit
def _sum_kernel(steps, offsets, first, sum_limit, TILE: tl.constexpr):
    """Where the sum of the n-grams first exceeds the limit: the walk above its lowest point so far, 0 at most."""
    response = tl.program_id(0)
    start = tl.load(offsets + response)
    length = tl.load(offsets + response + 1) - start
    begin, height, low, found = 0, 0, 0, NEVER_FIRES
    while (begin < length) & (found == NEVER_FIRES):
        place = begin + tl.arange(0, TILE)
        walk = height + tl.cumsum(tl.load(steps + start + place, mask=place < length, other=0).to(tl.int32), 0)
        lowest = tl.minimum(tl.associative_scan(walk, 0, _smaller), low)
        found = tl.min(tl.where((place < length) & (walk - lowest > sum_limit), place, NEVER_FIRES), 0)
        height = tl.sum(tl.where(place == begin + TILE - 1, walk, 0), 0)
        low = tl.min(lowest, 0)
        begin += TILE
    if found != NEVER_FIRES:
        tl.atomic_min(first + response, found)


class Rows:
    """The state of the rows on the device. A row is in some slot: moving it changes its number, not its data."""

    def __init__(self, rule: Rule, num_rows: int, max_tokens: int, device: torch.device) -> None:
        self._rule, self._max_tokens = rule, max_tokens
        self._width = max(rule.max_period + 1, rule.ngram)
        # At most three quarters of the cells are taken, so that few are passed and one is always free.
        self._cell_bits = max(1, (max_tokens * 4 // 3).bit_length()) if rule.ngram else 1
        shape = {"device": device, "dtype": torch.int32}
        self._recent = torch.full((num_rows, self._width), -1, device=device, dtype=torch.int64)
        self._runs = torch.zeros(num_rows, max(rule.max_period, 1), **shape)
        self._num_tokens, self._cusums = torch.zeros(num_rows, **shape), torch.zeros(num_rows, **shape)
        self._table = torch.zeros(num_rows, 1 << self._cell_bits, device=device, dtype=torch.int64)
        self._needed = _to_device(_needed(rule), device)
        self._coefficients = _to_device(rule.coefficients().view(np.int64), device)
        self._slot_of = np.arange(num_rows, dtype=np.int32)
        self._slots = _to_device(self._slot_of, device)

    def push(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """[B] bool."""
        return self._append(tokens_B, self._slots, None, len(tokens_B))

    def reset(self, rows: Sequence[int], tokens_T: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        if not rows:
            return
        slots = _to_device(self._slot_of[list(rows)], tokens_T.device)
        for state, empty in ((self._recent, -1), (self._runs, 0), (self._num_tokens, 0), (self._cusums, 0), (self._table, 0)):
            state.index_fill_(0, slots.long(), empty)
        self._append(tokens_T, slots, cu_seqlens, len(rows))

    def move(self, source: int, target: int) -> None:
        self._slot_of[[source, target]] = self._slot_of[[target, source]]
        self._slots = _to_device(self._slot_of, self._slots.device)

    def permute(self, order: np.ndarray) -> None:
        self._slot_of[: len(order)] = self._slot_of[order]
        self._slots = _to_device(self._slot_of, self._slots.device)

    def _append(self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor | None, num_programs: int) -> torch.Tensor:
        rule = self._rule
        fired = torch.empty(num_programs, dtype=torch.bool, device=tokens.device)
        if num_programs:
            _push_kernel[num_programs,](
                tokens,
                slots if offsets is None else offsets,
                slots,
                fired,
                self._recent,
                self._runs,
                self._num_tokens,
                self._cusums,
                self._table,
                self._coefficients,
                self._needed,
                self._width,
                self._max_tokens,
                1 << self._cell_bits,
                64 - self._cell_bits,  # the high bits of the hash: they depend on all bits of all tokens
                rule.sum_limit(),
                P=max(rule.max_period, 1),
                N=rule.ngram,
                PERIODS=triton.next_power_of_2(max(rule.max_period, 1)),
                GRAM=triton.next_power_of_2(max(rule.ngram, 1)),
                SINGLE=offsets is None,
                num_warps=1 if rule.max_period <= 256 else 4,
            )
        return fired


def first_repetition(tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, rule: Rule) -> torch.Tensor:
    """[R] int64."""
    num_responses = len(cu_seqlens) - 1
    first = torch.full((num_responses,), NEVER, dtype=torch.int32, device=tokens_T.device)
    if not num_responses or not len(tokens_T):
        return torch.full_like(first, -1, dtype=torch.int64)
    if rule.max_period:
        needed = _to_device(_needed(rule), tokens_T.device)
        _cycle_kernel[num_responses, rule.max_period](tokens_T, cu_seqlens, needed, first, TILE=TILE)
    if rule.ngram:
        steps_T = _ngram_steps(tokens_T, cu_seqlens, rule)
        _sum_kernel[num_responses,](steps_T, cu_seqlens, first, rule.sum_limit(), TILE=TILE)
    return torch.where(first == NEVER, -1, first).long()


def _ngram_steps(tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, rule: Rule) -> torch.Tensor:
    """[T] int8: 1 where the n-gram that ends here occurred before in its response, -1 where not, 0 where none ends."""
    at_T = torch.arange(len(tokens_T), device=tokens_T.device, dtype=torch.int32)
    response_T = torch.searchsorted(cu_seqlens[1:].contiguous(), at_T, right=True)
    is_whole_T = at_T - cu_seqlens[response_T] >= rule.ngram - 1
    hash_T = torch.zeros(len(tokens_T), dtype=torch.int64, device=tokens_T.device)
    for back, coefficient in enumerate(rule.coefficients().tolist()):
        if back < len(tokens_T):
            hash_T[back:] += tokens_T[: len(tokens_T) - back].long() * coefficient
    hash_T = torch.where(is_whole_T, torch.where(hash_T == 0, 1, hash_T), 0)
    # The sort keeps the order of equal ones, so that those of one response stay side by side.
    sorted_T, order_T = torch.sort(hash_T, stable=True)
    sorted_response_T = response_T[order_T]
    again = (sorted_T[1:] == sorted_T[:-1]) & (sorted_response_T[1:] == sorted_response_T[:-1])
    occurred_T = torch.zeros_like(is_whole_T).scatter_(0, order_T[1:], again)
    return (torch.where(occurred_T, 1, -1) * is_whole_T).to(torch.int8)


def _needed(rule: Rule) -> np.ndarray:
    """As Rule.needed, in 32 bits; a run that no response has where there is no period."""
    return np.minimum(rule.needed(), NEVER - 1).astype(np.int32) if rule.max_period else np.full(1, NEVER, dtype=np.int32)


def _to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy, for which nothing waits."""
    tensor = torch.from_numpy(values.copy())
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
