"""Checksums against the formula in Python's integers."""

import random

import numpy as np
import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.kernels import backend
from tandem.kernels.checksum import Checksums

MASK = (1 << 64) - 1
ENTRIES = [(0, 17), (24, 8), (256, 0), (256, 1), (512, 4099), (8192, 140_001)]  # the last is two tiles


def mix(x: int) -> int:
    for _ in range(2):
        x = ((x ^ x >> 32) * 0xD6E8FEB86659FD93) & MASK
    return x ^ x >> 32


def by_hand(data: bytes) -> int:
    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    return (mix(len(data)) + sum(mix(word ^ ((i + 1) * 0x9E3779B97F4A7C15 & MASK)) for i, word in enumerate(words))) & MASK


def computed(bucket: torch.Tensor, entries: list[tuple[int, int]], choice: backend.Backend) -> list[int]:
    with backend.chosen(choice):
        return Checksums(entries, bucket.device).numbers(bucket).tolist()


def random_bucket(num_bytes: int = 150_000) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)).to(DEVICE)


@pytest.mark.parametrize("choice", ["reference", "triton"])
@pytest.mark.parametrize("fill", [None, 0, 255])
def test_checksums_are_the_formulas(choice: backend.Backend, fill: int | None) -> None:
    bucket = random_bucket() if fill is None else torch.full((150_000,), fill, dtype=torch.uint8, device=DEVICE)
    data = bytes(bucket.cpu().numpy())
    assert computed(bucket, ENTRIES, choice) == [by_hand(data[start : start + size]) for start, size in ENTRIES]
    assert computed(bucket, [], choice) == []


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_what_lies_outside_of_an_entry_does_not_matter_and_every_bit_inside_does(choice: backend.Backend) -> None:
    entries = [(8, 21), (64, 16)]
    bucket = random_bucket(96)
    before = computed(bucket, entries, choice)
    for outside in (7, 29, 31, 63, 80):
        bucket[outside] ^= 255
    assert computed(bucket, entries, choice) == before
    draw = random.Random(0)
    for at in (8, 15, 16, 28):
        changed = bucket.clone()
        changed[at] ^= 1 << draw.randrange(8)
        first, second = computed(changed, entries, choice)
        assert first != before[0]
        assert second == before[1]


def test_words_that_change_places_and_zeros_that_are_added_are_seen() -> None:
    bucket = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    bucket[3] = bucket[12] = 7
    swapped = torch.cat([bucket[8:16], bucket[:8], bucket[16:]])
    assert computed(bucket, [(0, 16)], "reference") != computed(swapped, [(0, 16)], "reference")
    lengths = computed(bucket, [(0, size) for size in range(13, 64)], "reference")
    assert len(set(lengths)) == len(lengths)


@pytest.mark.parametrize(
    ("entries", "message"),
    [([(4, 8)], r"entries\[0\] has 8 bytes at 4"), ([(0, 8), (8, -1)], r"entries\[1\] has -1 bytes at 8")],
)
def test_an_entry_that_is_none_is_named(entries: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checksums(entries, torch.device("cpu"))


def test_a_device_may_come_with_or_without_its_number() -> None:
    device = torch.device("cuda") if DEVICE == "cuda" else torch.device("cpu", 0)  # what no tensor says of itself
    bucket = torch.arange(16, dtype=torch.uint8, device=DEVICE)
    assert Checksums([(8, 8)], device).numbers(bucket) == Checksums([(8, 8)], bucket.device).numbers(bucket)


def test_a_bucket_that_is_none_is_told() -> None:
    checksums = Checksums([(8, 9)], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"bucket has 23 bytes at address \d+; the entries need 24"):
        checksums(torch.zeros(23, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"bucket is \(24,\) torch.int8 on cpu"):
        checksums(torch.zeros(24, dtype=torch.int8))
