"""What runs inside an SGLang server on a CPU instead of compiled kernels."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tandem.engine.rollout.sglang_cpu.sgl_kernel import assign_req_to_token_pool_cpu, murmur_hash32
from tandem.engine.rollout.sglang_cpu.tandem_sglang_attention import decode


def test_what_stands_in_for_sgl_kernel_cannot_be_imported_here() -> None:
    done = subprocess.run([sys.executable, "-c", "import sgl_kernel"], capture_output=True, text=True, check=False)
    assert "No module named 'sgl_kernel'" in done.stderr


def test_the_hash_of_the_stand_in_is_murmurhash3() -> None:
    """The reference: Austin Appleby's MurmurHash3_x86_32 with Python's unbounded integers, over the same 16 bytes."""

    def expected(data: bytes) -> int:
        def rotated(x: int, bits: int) -> int:
            return (x << bits | x >> (32 - bits)) & 0xFFFFFFFF

        h = 0
        for start in range(0, len(data), 4):
            k = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
            h = rotated(h ^ rotated(k, 15) * 0x1B873593 & 0xFFFFFFFF, 13) * 5 + 0xE6546B64 & 0xFFFFFFFF
        h ^= len(data)
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    seeds, positions, columns = [0, 1, 2**63 - 1, 0x0123456789ABCDEF], [0, 7, 4095, 131071], [0, 1, 151935]
    got = murmur_hash32(torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.tensor(columns))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for column, index in enumerate(columns):
            data = seed.to_bytes(8, "little") + position.to_bytes(4, "little") + index.to_bytes(4, "little")
            assert int(got[row, column]) == expected(data)


def test_cache_slots_are_noted_where_each_request_goes_on() -> None:
    pool = torch.zeros(3, 6, dtype=torch.int32)
    requests, starts, ends = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([4, 2])
    assign_req_to_token_pool_cpu(requests, pool, starts, ends, torch.tensor([11, 12, 13, 14, 15]), 6)
    assert pool.tolist() == [[14, 15, 0, 0, 0, 0], [0] * 6, [0, 11, 12, 13, 0, 0]]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a server has by default; with more, torch may share the sums of one row among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_decode_attention_is_that_of_each_row_by_itself() -> None:
    """Against softmax in fp64; slots that nobody uses hold NaN, and lengths lie at and beside powers of two."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 15, 16, 17, 33, 64, 200])
    num_rows, num_heads, num_kv_heads, size = len(lengths), 6, 2, 8
    k_cache, v_cache = (torch.full((1000, num_kv_heads, size), float("nan")) for _ in range(2))
    free = torch.randperm(999, generator=generator) + 1
    slots = torch.zeros(num_rows, 201, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        taken, free = free[:length], free[length:]
        slots[row, :length] = taken
        k_cache[taken], v_cache[taken] = (torch.randn(length, num_kv_heads, size, generator=generator) for _ in range(2))
    query = torch.randn(num_rows, num_heads, size, generator=generator)
    output = decode(query, torch.empty_like(query), k_cache, v_cache, slots, lengths, 0.3)
    for row, length in enumerate(lengths.tolist()):
        taken = slots[row, :length].long()
        keys, values = (cache[taken].double().repeat_interleave(num_heads // num_kv_heads, dim=1) for cache in (k_cache, v_cache))
        weights = (torch.einsum("hd,thd->ht", query[row].double(), keys) * 0.3).softmax(-1)
        expected = torch.einsum("ht,thd->hd", weights, values)
        assert (output[row] - expected).abs().max() <= 1e-6
        alone = decode(
            query[row : row + 1], torch.empty(1, num_heads, size), k_cache, v_cache, slots[row : row + 1], lengths[row : row + 1], 0.3
        )
        assert torch.equal(alone[0], output[row])
