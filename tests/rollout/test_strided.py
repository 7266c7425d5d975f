"""Strided copies as numbers, against the same copies done with index arrays."""

import random

import numpy as np
import pytest

from tandem.engine.rollout.strided import View, box_of, first_gap, normal, part_of, read_through, row_major


def elements(view: View) -> np.ndarray:
    """Where each element of a view lies."""
    places = np.array(view.start)
    for size, step in zip(view.shape, view.stride, strict=True):
        places = places[..., None] + np.arange(size) * step
    return places


def random_view(generator: random.Random, shape: tuple[int, ...]) -> View:
    """A box of a row-major tensor of this shape, its dimensions in any order."""
    bounds = [sorted(generator.sample(range(size + 1), 2)) for size in shape]
    steps = row_major(shape)
    start = sum(a * step for (a, _), step in zip(bounds, steps, strict=True))
    dims = generator.sample(range(len(shape)), len(shape))
    return View(start, tuple(bounds[dim][1] - bounds[dim][0] for dim in dims), tuple(steps[dim] for dim in dims))


def shapes(generator: random.Random) -> tuple[int, ...]:
    return tuple(generator.randint(1, 6) for _ in range(generator.randint(1, 3)))


@pytest.mark.parametrize("seed", range(60))
def test_the_parts_of_a_cut_copy_are_what_a_range_of_the_source_brings(seed: int) -> None:
    generator = random.Random(seed)
    shape = shapes(generator)
    source = random_view(generator, shape)
    target = View(generator.randint(0, 5), source.shape, tuple(row_major(source.shape)))
    pairs = dict(zip(elements(source).ravel().tolist(), elements(target).ravel().tolist(), strict=True))
    copy = normal(source, target)
    assert dict(zip(elements(copy.source).ravel().tolist(), elements(copy.target).ravel().tolist(), strict=True)) == pairs
    start, stop = sorted(generator.sample(range(int(np.prod(shape)) + 1), 2))
    got: list[tuple[int, int]] = []
    for part in copy.cut(start, stop):
        got += zip(elements(part.source).ravel().tolist(), elements(part.target).ravel().tolist(), strict=True)
    assert sorted(got) == sorted((of, to) for of, to in pairs.items() if start <= of < stop)


@pytest.mark.parametrize("seed", range(60))
def test_reading_through_an_intermediate_finds_the_source(seed: int) -> None:
    generator = random.Random(seed)
    shape = shapes(generator)
    read, made = random_view(generator, shape), random_view(generator, shape)
    made = View(made.start, tuple(stop - start for start, stop in box_of(made, shape)), tuple(row_major(shape)))
    source = View(7, made.shape, tuple(row_major(made.shape)))
    shown = dict(zip(elements(made).ravel().tolist(), elements(source).ravel().tolist(), strict=True))
    expected = {(place, shown[place]) for place in elements(read).ravel().tolist() if place in shown}
    got: set[tuple[int, int]] = set()
    for seen, part in read_through(read, made, shape, source):
        got |= set(zip(elements(part_of(read, part)).ravel().tolist(), elements(seen).ravel().tolist(), strict=True))
    assert got == expected


def test_a_view_that_jumps_over_elements_is_not_read_through() -> None:
    with pytest.raises(ValueError, match="strides"):
        list(read_through(View(0, (2,), (2,)), View(0, (4,), (1,)), (4,), View(0, (4,), (1,))))


def test_a_source_whose_elements_share_a_place_is_no_copy() -> None:
    with pytest.raises(ValueError, match="in the same place"):
        normal(View(0, (3, 2), (0, 1)), View(0, (3, 2), (2, 1)))


@pytest.mark.parametrize(
    ("views", "gap"),
    [
        ([View(0, (3,), (1,)), View(3, (5,), (1,))], None),
        ([View(4, (4,), (1,)), View(0, (4,), (1,))], None),
        ([View(0, (4,), (2,)), View(1, (4,), (2,))], None),
        ([View(0, (2, 2), (4, 1)), View(2, (2, 2), (4, 1))], None),
        ([], (0, False)),
        ([View(0, (3,), (1,))], (3, False)),
        ([View(1, (7,), (1,))], (0, False)),
        ([View(0, (4,), (2,)), View(1, (3,), (2,))], (7, False)),
        ([View(0, (5,), (1,)), View(4, (4,), (1,))], (4, True)),
        ([View(0, (8,), (1,)), View(0, (8,), (1,))], (0, True)),
    ],
)
def test_gaps_and_overlaps_are_found(views: list[View], gap: tuple[int, bool] | None) -> None:
    assert first_gap(views, 8) == gap
