"""What runs inside an SGLang server on a CPU instead of compiled kernels."""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from tandem.engine.rollout.sglang_cpu import tandem_sglang_arithmetic as arithmetic
from tandem.engine.rollout.sglang_cpu.sgl_kernel import assign_req_to_token_pool_cpu, murmur_hash32
from tandem.engine.rollout.sglang_cpu.tandem_sglang_attention import decode, extend
from tandem.kernels.attention import packed_attention
from tandem.kernels.rope import rope


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


Caches = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NUM_HEADS, NUM_KV_HEADS, SIZE, SCALE = 6, 2, 8, 0.3


def caches_of(lengths: torch.Tensor, generator: torch.Generator) -> Caches:
    """Keys and values [slots, heads, size], and the slots of each sequence: at random places, among slots that hold NaN."""
    k_cache, v_cache = (torch.full((1000, NUM_KV_HEADS, SIZE), float("nan")) for _ in range(2))
    free = torch.randperm(999, generator=generator) + 1
    slots = torch.zeros(len(lengths), int(lengths.max()) + 1, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        taken, free = free[:length], free[length:]
        slots[row, :length] = taken
        k_cache[taken], v_cache[taken] = (torch.randn(length, NUM_KV_HEADS, SIZE, generator=generator) for _ in range(2))
    return k_cache, v_cache, slots


def exact_attention(queries: torch.Tensor, caches: Caches, row: int, length: int) -> torch.Tensor:
    """The queries [positions, heads, size] of a row's last positions, in fp64."""
    slots, positions = caches[2][row, :length].long(), torch.arange(length)
    keys, values = (cache[slots].double().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for cache in caches[:2])
    scores = torch.einsum("qhd,thd->qht", queries.double(), keys) * SCALE
    hidden = positions > positions[length - len(queries) :, None]
    return torch.einsum("qht,thd->qhd", scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1), values)


@pytest.mark.usefixtures("one_thread")
def test_decode_attention_is_that_of_each_row_by_itself() -> None:
    """Against softmax in fp64; lengths lie at and beside powers of two."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 15, 16, 17, 33, 64, 200])
    caches = k_cache, v_cache, slots = caches_of(lengths, generator)
    query = torch.randn(len(lengths), NUM_HEADS, SIZE, generator=generator)
    output = decode(query, torch.empty_like(query), k_cache, v_cache, slots, lengths, SCALE)
    low = decode(query.bfloat16(), torch.empty_like(query), k_cache, v_cache, slots, lengths, SCALE)
    for row, length in enumerate(lengths.tolist()):
        expected = exact_attention(query[row : row + 1], caches, row, length)[0]
        assert (output[row] - expected).abs().max() <= 1e-6
        assert (low[row] - expected).abs().max() <= 0.03
        alone = decode(
            query[row : row + 1], torch.empty(1, NUM_HEADS, SIZE), k_cache, v_cache, slots[row : row + 1], lengths[row : row + 1], SCALE
        )
        assert torch.equal(alone[0], output[row])


@pytest.mark.usefixtures("one_thread")
def test_prompt_attention_is_that_of_each_sequence_by_itself() -> None:
    """Some sequences' first tokens are in the cache already; 250 keys are more than one block of MKL's sums."""
    generator = torch.Generator().manual_seed(0)
    lengths, prefixes = torch.tensor([1, 16, 17, 9, 250, 30, 30]), torch.tensor([0, 0, 3, 8, 200, 0, 29])
    caches = k_cache, v_cache, slots = caches_of(lengths, generator)
    num_new = lengths - prefixes
    query = torch.randn(int(num_new.sum()), NUM_HEADS, SIZE, generator=generator)
    output = extend(query, torch.full_like(query, torch.nan), k_cache, v_cache, slots, lengths, prefixes, SCALE)
    for row, (own, part) in enumerate(zip(query.split(num_new.tolist()), output.split(num_new.tolist()), strict=True)):
        assert (part - exact_attention(own, caches, row, int(lengths[row]))).abs().max() <= 1e-6
        here = slice(row, row + 1)
        alone = extend(own, torch.empty_like(own), k_cache, v_cache, slots[here], lengths[here], prefixes[here], SCALE)
        assert torch.equal(alone, part)


@pytest.mark.slow  # what it holds depends on the processor's path through MKL
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("heads_per_key", [1, 2, 3, 5, 8])
def test_attention_is_to_the_bit_the_trainers(heads_per_key: int) -> None:
    """MKL multiplies one to three queries by the keys in another way than many."""
    generator = torch.Generator().manual_seed(0)
    length, num_heads, size = 40, 2 * heads_per_key, 32
    query = torch.randn(length, num_heads, size, generator=generator) * 2
    keys, values = (torch.randn(length, 2, size, generator=generator) * 2 for _ in range(2))
    trained = packed_attention(query, keys, values, torch.full((length,), length, dtype=torch.int32), scale=SCALE)
    slots, lengths = torch.arange(length)[None].expand(length, -1), torch.arange(length) + 1
    caches = keys, values
    assert torch.equal(decode(query, torch.empty_like(query), *caches, slots, lengths, SCALE), trained)
    whole = torch.tensor([length]), torch.tensor([0])
    assert torch.equal(extend(query, torch.empty_like(query), *caches, slots[:1], *whole, SCALE), trained)


def not_reached(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("float32 goes another way")


@pytest.mark.usefixtures("one_thread")
def test_a_row_is_multiplied_alike_in_any_number_of_rows() -> None:
    """Sums of 160 and of 448, which the libraries cut differently; against fp64, with bias and without."""
    generator = torch.Generator().manual_seed(0)
    for width in (160, 448):
        weight, bias = torch.randn(96, width, generator=generator), torch.randn(96, generator=generator)
        x = torch.randn(70, width, generator=generator)
        all_rows = arithmetic.functional.linear(x, weight, bias)
        exact = x.double() @ weight.double().T
        assert (all_rows - exact - bias).abs().max() <= 1e-5 * width**0.5
        assert (arithmetic.head(not_reached)(None, x, SimpleNamespace(weight=weight)) - exact).abs().max() <= 1e-5 * width**0.5
        assert arithmetic.linear(x.view(7, 10, width), weight).shape == (7, 10, 96)
        for num_rows in (1, 5, 16, 33):
            assert torch.equal(arithmetic.linear(x[:num_rows], weight, bias), all_rows[:num_rows])


def test_rotations_are_to_the_bit_the_trainers() -> None:
    heads = torch.randn(50, 5, 32, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(50.0)[:, None] * 10_000.0 ** (-torch.arange(16.0) / 16)
    cos, sin = angles.cos(), angles.sin()
    assert torch.equal(arithmetic.rotate(heads, cos, sin, True), rope(heads, cos[:, None], sin[:, None]))
    turns = torch.polar(torch.ones(50, 1, 16).double(), angles.double()[:, None])
    turned = torch.view_as_real(torch.view_as_complex(heads.double().unflatten(-1, (16, 2))) * turns).flatten(-2)
    assert (arithmetic.rotate(heads, cos, sin, False) - turned).abs().max() <= 1e-5


def test_products_of_other_dtypes_are_left_to_sglang() -> None:
    x, weight, bias = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16() for shape in ((5, 8), (6, 8), (6,)))
    assert torch.equal(arithmetic.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert arithmetic.head(lambda *_, **__: "theirs")(None, x, SimpleNamespace(weight=weight), None, out=None) == "theirs"
