"""Copies between strided views of flat memories, as plain numbers: what one is made of, how it is cut, and what several fill.

All numbers count elements. Nothing here touches memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

Region = tuple[tuple[int, int], ...]  # (start, stop) of every dimension of a tensor


class View(NamedTuple):
    """Where the elements of a strided tensor lie in its memory."""

    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """Element i of the source goes to element i of the target, for all i of `shape`.

    Made by `normal`: dimensions go from the largest step in the source to the smallest, and are as few as they can be, so a copy
    of neighbours to neighbours has one.
    """

    shape: tuple[int, ...]
    source_start: int
    source_stride: tuple[int, ...]
    target_start: int
    target_stride: tuple[int, ...]

    @property
    def source(self) -> View:
        return View(self.source_start, self.shape, self.source_stride)

    @property
    def target(self) -> View:
        return View(self.target_start, self.shape, self.target_stride)

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether it copies neighbours to neighbours."""
        return len(self.shape) <= 1 and self.source_stride in ((), (1,)) and self.target_stride in ((), (1,))

    def cut(self, start: int, stop: int) -> "Iterator[StridedCopy]":
        """The parts whose sources lie in [start, stop) of the source's memory."""
        if start <= self.source_start and self.source.stop <= stop:
            yield self
            return
        if not self.shape or self.source.stop <= start or stop <= self.source_start:
            return
        (size, *shape), (step, *source_stride), (target_step, *target_stride) = self.shape, self.source_stride, self.target_stride
        span = View(0, tuple(shape), tuple(source_stride)).stop  # of one slice; slices do not overlap
        # The slices that lie wholly within, and on either side at most one that lies there in part.
        first = max(0, -(-(start - self.source_start) // step))
        last = min(size, (stop - self.source_start - span) // step + 1)

        def slices(index: int, count: int) -> "StridedCopy":
            source, target = self.source_start + index * step, self.target_start + index * target_step
            if count == 1:
                return StridedCopy(tuple(shape), source, tuple(source_stride), target, tuple(target_stride))
            return StridedCopy((count, *shape), source, (step, *source_stride), target, (target_step, *target_stride))

        if first < last:
            yield slices(first, last - first)
        for index in dict.fromkeys((first - 1, max(last, first))):
            if 0 <= index < size and not first <= index < last:
                yield from slices(index, 1).cut(start, stop)


def normal(source: View, target: View) -> StridedCopy:
    """The copy of one view to another of the same shape. Raises: ValueError if elements of one side lie in the same place."""
    if source.shape != target.shape:
        raise ValueError(f"the source has shape {source.shape}, the target {target.shape}")
    dims = [dim for dim in zip(source.shape, source.stride, target.stride, strict=True) if dim[0] != 1]
    dims.sort(key=lambda dim: -dim[1])
    merged: list[tuple[int, int, int]] = []
    for size, step, target_step in dims:
        if merged and merged[-1][1] == size * step and merged[-1][2] == size * target_step:
            size *= merged.pop()[0]
        merged.append((size, step, target_step))
    shape, source_stride, target_stride = zip(*merged, strict=True) if merged else ((), (), ())
    for view in (View(source.start, shape, source_stride), View(target.start, shape, target_stride)):
        if not _is_nested(view):
            raise ValueError(f"elements of a view with shape {view.shape} and strides {view.stride} lie in the same place")
    return StridedCopy(shape, source.start, source_stride, target.start, target_stride)


def box_of(view: View, shape: Sequence[int]) -> Region:
    """The smallest region of a row-major tensor of `shape` that holds the view."""
    return tuple((first, last + 1) for first, last in zip(_index(view.start, shape), _index(view.stop - 1, shape), strict=True))


def first_gap(views: Sequence[View], num_elements: int) -> tuple[int, bool] | None:
    """Where in [0, num_elements) an element lies that not exactly one view holds, and whether several hold it; None if there is none."""
    ordered = sorted(views, key=lambda view: view.start)
    at = 0
    for view in ordered:
        if view.start != at or view.stop - view.start != view.num_elements:
            break
        at = view.stop
    else:
        return None if at == num_elements else (at, False)
    # Some interleave. Their runs of neighbours are compared, one number each.
    starts, stops = zip(*map(_runs, ordered), strict=True)
    start, stop = np.concatenate(starts), np.concatenate(stops)
    order = np.argsort(start)
    start, stop = np.append(start[order], num_elements), np.insert(stop[order], 0, 0)
    wrong = np.flatnonzero(start != stop)
    if not wrong.size:
        return None
    index = int(wrong[0])
    return int(min(start[index], stop[index])), bool(start[index] < stop[index])


def read_through(read: View, made: View, shape: Sequence[int], source: View) -> Iterator[tuple[View, tuple[slice, ...]]]:
    """What a view of an intermediate tensor shows of one of the tensors that it was made from.

    Args:
        read: a view of the intermediate, which is row-major and has `shape`.
        made: the box of the intermediate that was copied from `source`, a view of that box's shape.
    Returns: at most one pair: the view of the source's memory, and which part of `read` (a slice of each dimension) shows it.
    Raises: ValueError if the view does not take whole steps along the intermediate's dimensions.
    """
    steps = row_major(shape)
    at, box, base = _index(read.start, shape), _index(made.start, shape), source.start
    dims: list[int] = []
    for size, step in zip(read.shape, read.stride, strict=True):
        found = [dim for dim, own in enumerate(steps) if own == step and shape[dim] > 1 and dim not in dims] if size > 1 else [-1]
        if not found or (size > 1 and at[found[0]] + size > shape[found[0]]):
            raise ValueError(f"a view with shape {read.shape} and strides {read.stride} of a tensor with shape {tuple(shape)}")
        dims.append(found[0])
    view_shape, view_stride, part = [], [], []
    for size, dim in zip(read.shape, dims, strict=True):
        if dim < 0:
            view_shape, view_stride, part = [*view_shape, 1], [*view_stride, 0], [*part, slice(0, 1)]
            continue
        first, last = max(at[dim], box[dim]), min(at[dim] + size, box[dim] + made.shape[dim])
        if first >= last:
            return
        base += (first - box[dim]) * source.stride[dim]
        view_shape, view_stride = [*view_shape, last - first], [*view_stride, source.stride[dim]]
        part.append(slice(first - at[dim], last - at[dim]))
    for dim in set(range(len(shape))) - set(dims):
        if not box[dim] <= at[dim] < box[dim] + made.shape[dim]:
            return
        base += (at[dim] - box[dim]) * source.stride[dim]
    yield View(base, tuple(view_shape), tuple(view_stride)), tuple(part)


def part_of(view: View, part: Sequence[slice]) -> View:
    """The slices of a view's dimensions."""
    start = view.start + sum(cut.start * step for cut, step in zip(part, view.stride, strict=True))
    return View(start, tuple(cut.stop - cut.start for cut in part), view.stride)


def row_major(shape: Sequence[int]) -> list[int]:
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _index(at: int, shape: Sequence[int]) -> list[int]:
    """The index of an element of a row-major tensor."""
    return [at // step % size for step, size in zip(row_major(shape), shape, strict=True)]


def _is_nested(view: View) -> bool:
    """Whether every step passes over all that the smaller ones reach: then no two elements lie in the same place."""
    reach = 1
    for step, size in sorted(zip(view.stride, view.shape, strict=True)):
        if step < reach:
            return False
        reach = (size - 1) * step + reach
    return True


def _runs(view: View) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the view's runs of neighbours."""
    dims = sorted(zip(view.stride, view.shape, strict=True))
    length = 1
    while dims and dims[0][0] == length:
        length *= dims.pop(0)[1]
    starts = np.array([view.start])
    for step, size in dims:
        starts = (starts[:, None] + np.arange(size) * step).ravel()
    return starts, starts + length
