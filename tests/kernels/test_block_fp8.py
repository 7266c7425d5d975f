"""Block-scaled 8-bit floats against the values that e4m3 has, and the Triton form against the torch form bit for bit."""
# pyright: reportArgumentType=false

import random

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip
import triton  # isort: skip
import triton.language as tl  # isort: skip

from tandem.kernels import backend
from tandem.kernels import block_fp8 as kernel
from tandem.kernels.block_fp8 import dequantise, quantise, scale_shape, scales_of
from tandem.kernels.block_fp8.triton import block_scale, casts_in_hardware, encode, largest_magnitude

# Its finite numbers: 3 bits of mantissa, exponents from -6 to 8, below them multiples of 2^-9; the last pattern is NaN.
E4M3 = torch.tensor(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)][:-1], dtype=torch.float64
)


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp64 values; of two as near the one with an even pattern."""
    distance = (x.abs()[..., None] - E4M3).abs() * 2 + (torch.arange(len(E4M3)) % 2) * 1e-13
    return E4M3[distance.argmin(-1)].copysign(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (1, 1), (130, 257), (127, 300), (0, 5), (4, 0)])
def test_every_element_is_the_nearest_multiple_of_its_blocks_scale(rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight = (torch.randn(rows, columns) * torch.logspace(-3, 2, max(columns, 1))[:columns]).to(dtype)
    fp8, scale = quantise(weight)
    assert (fp8.shape, fp8.dtype) == ((rows, columns), torch.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == (scale_shape(rows, columns), torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            assert scale[i, j] == weight[here].float().abs().max() / 448
            scaled = weight[here].float() * (1 / scale[i, j])
            assert torch.equal(fp8[here].double(), nearest_e4m3(scaled.double()))
    assert torch.equal(dequantise(fp8, scale), fp8.float() * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns])


def test_blocks_without_a_size_and_beyond_all_sizes() -> None:
    weight = torch.zeros(1, 5 * 128)
    weight[0, 128], weight[0, 256], weight[0, 384], weight[0, 512] = 1e-44, 3e38, float("inf"), float("nan")
    fp8, scale = quantise(weight)
    assert scale[0, :3].tolist() == [1.0, 2.0**-126, (torch.tensor(3e38) / 448).item()]
    assert (scale[0, 3].isinf(), scale[0, 4].isnan()) == (True, True)
    assert fp8[0, 256].float() == 448
    assert [column for column in range(640) if fp8[0, column].float().isnan()] == [384, *range(512, 640)]


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize("seed", range(30))
def test_parts_of_a_matrix_in_any_order_have_the_bytes_of_the_whole(seed: int, choice: backend.Backend) -> None:
    """Cut anywhere, of any magnitude; the compiled form and the one in torch, against the whole matrix in torch."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, columns = draw.randint(2, 300), draw.randint(2, 300)
    whole = (torch.randn(rows, columns) * 10 ** draw.uniform(-42, 37)).to(draw.choice([torch.float32, torch.bfloat16]))
    whole[: draw.choice([0, 128])] = 0
    if seed % 3 == 0:
        whole[draw.randrange(rows), draw.randrange(columns)] = draw.choice([torch.inf, -torch.inf, torch.nan, 3e38, 1e-40, -0.0])
    with backend.chosen("reference"):
        fp8, scale = quantise(whole)
    middle, left = draw.randrange(1, rows), draw.randrange(1, columns)
    parts = [(row, column) for row in (slice(0, middle), slice(middle, rows)) for column in (slice(0, left), slice(left, columns))]
    draw.shuffle(parts)
    largest, out = torch.zeros_like(scale), torch.full_like(fp8, 1.0)
    with backend.chosen(choice):
        for row, column in parts:
            kernel.largest_magnitudes(whole[row, column], largest, row=row.start, column=column.start)
        for row, column in parts:
            kernel.encode(whole[row, column], scales_of(largest), out[row, column], row=row.start, column=column.start)
    assert torch.equal(scales_of(largest).nan_to_num(-1.0), scale.nan_to_num(-1.0))
    ours, theirs = out.view(torch.uint8), fp8.view(torch.uint8)
    assert bool(((ours == theirs) | ((ours & 0x7F == 0x7F) & (theirs & 0x7F == 0x7F))).all())


def test_larger_than_one_part_and_strided() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2 * 4096 + 130).T
    fp8, scale = quantise(weight)
    pieces = [quantise(weight[start : start + 128].contiguous()) for start in range(0, len(weight), 128)]
    assert torch.equal(fp8.float(), torch.cat([piece for piece, _ in pieces]).float())
    assert torch.equal(scale, torch.cat([part for _, part in pieces]))


def test_what_has_no_blocks_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight_MN is \(3,\) torch.float32; blocks of 128 x 128 need a matrix"):
        quantise(torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight_MN is \(3, 3\) torch.float64"):
        quantise(torch.zeros(3, 3).double())
    with pytest.raises(ValueError, match=r"scale is \(1, 1\); a matrix of 129 x 3 has scales \(2, 1\)"):
        dequantise(torch.zeros(129, 3), torch.ones(1, 1))


@triton.jit
def _encode_kernel(x, scales, out, num, HARDWARE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    values, scale = tl.load(x + at, mask=at < num, other=0.0), tl.load(scales + at, mask=at < num, other=1.0)
    tl.store(out + at, encode(values, scale, HARDWARE), mask=at < num)


@triton.jit
def _scale_kernel(x, out, TILE: tl.constexpr):
    values = tl.load(x + tl.program_id(0) * TILE + tl.arange(0, TILE))
    tl.store(out + tl.program_id(0), block_scale(largest_magnitude(values)))


@pytest.mark.parametrize("hardware", [False, True])
def test_the_triton_form_has_the_same_bits(hardware: bool) -> None:
    if hardware and not (DEVICE == "cuda" and casts_in_hardware(torch.empty(0, device=DEVICE))):
        pytest.skip("needs a GPU of compute capability 8.9")
    torch.manual_seed(1)
    halfway = (E4M3[1:] + E4M3[:-1]).float() / 2
    special = torch.tensor([0.0, -0.0, 448.0, 448.00003, 1e-44, 2.0**-10, 2.0**-6, 2.0**-126])
    around = torch.cat([halfway, torch.nextafter(halfway, torch.tensor(0.0)), torch.nextafter(halfway, torch.tensor(500.0)), special])
    spread = torch.rand(4000) * 448 * torch.logspace(-6, 0, 4000)
    x = torch.cat([around, -around, spread, -spread])
    scales = torch.ones_like(x)
    scales[-4000:] = torch.rand(4000) + 0.5  # so that products are rounded too
    x[-4000:] *= scales[-4000:]
    out = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    _encode_kernel[triton.cdiv(len(x), 2048),](x.to(DEVICE), scales.to(DEVICE), out, len(x), HARDWARE=hardware, TILE=2048)
    wanted = (x * scales.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out.cpu(), wanted.view(torch.uint8))


def test_the_triton_scale_has_the_same_bits() -> None:
    torch.manual_seed(2)
    blocks = torch.randn(12, 64) * torch.logspace(-44, 36, 12)[:, None]
    blocks[3] = 0.0
    blocks[4, 7], blocks[5, 9] = float("inf"), float("nan")
    out = torch.empty(12, device=DEVICE)
    _scale_kernel[12,](blocks.to(DEVICE), out, TILE=64)
    wanted = torch.cat([quantise(block[None])[1][:, 0] for block in blocks])
    assert torch.equal(out.cpu().nan_to_num(nan=-1), wanted.nan_to_num(nan=-1))
    assert wanted.isnan().tolist() == [i == 5 for i in range(12)]
