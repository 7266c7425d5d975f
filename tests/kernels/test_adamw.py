"""AdamW against its formula in fp64 and against torch's, in plain torch and in Triton, with the 8-bit form of what it stepped."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel
from tests.kernels.offline import compile_offline

import torch  # isort: skip

from tandem.kernels import backend
from tandem.kernels.adamw import FusedAdamW, Tensors
from tandem.kernels.adamw.triton import TILE
from tandem.kernels.block_fp8 import quantise, scale_shape

BACKENDS: list[Any] = ["reference", "triton"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def tensors_of(size: int, grad: torch.dtype = FP32, copy: torch.dtype | None = BF16, offset: int = 0) -> Tensors:
    """A weight that has been stepped before; `offset` elements into its memory, as a rank's part may lie."""

    def made(values: torch.Tensor) -> torch.Tensor:
        return values.to(DEVICE)[offset:]

    normal = [torch.randn(size + offset) for _ in range(4)]
    weight, mean, square = (made(x) for x in (normal[0], 0.1 * normal[1], normal[2].square()))
    return Tensors(weight, made(normal[3].to(grad)), mean, square, None if copy is None else made(torch.zeros(size + offset, dtype=copy)))


def exact_step(x: Tensors, num_steps: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Tensors:
    grad = x.grad.double()
    mean = betas[0] * x.exp_avg.double() + (1 - betas[0]) * grad
    square = betas[1] * x.exp_avg_sq.double() + (1 - betas[1]) * grad.square()
    direction = mean / (1 - betas[0] ** num_steps) / ((square / (1 - betas[1] ** num_steps)).sqrt() + eps)
    return Tensors((1 - lr * weight_decay) * x.weight.double() - lr * direction, grad, mean, square)


def cloned(tensors: Sequence[Tensors]) -> list[Tensors]:
    return [Tensors(*(None if y is None else y.clone() for y in x)) for x in tensors]  # pyright: ignore[reportArgumentType]


def empty_8_bit(num_rows: int, num_columns: int) -> torch.Tensor:
    return torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn, device=DEVICE)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item() if wanted.numel() else 0.0


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize(("grad", "copy"), [(FP32, BF16), (BF16, BF16), (FP32, None), (FP32, FP32), (BF16, FP16)], ids=str)
def test_several_steps_of_ragged_tensors(grad: torch.dtype, copy: torch.dtype | None, choice: Any) -> None:
    torch.manual_seed(0)
    tensors = [tensors_of(size, grad, copy) for size in (0, 1, 3, TILE - 1, TILE, TILE + 1, 2 * TILE + 517)]
    first, wanted, kernel = cloned(tensors), list(tensors), FusedAdamW()
    with backend.chosen(choice):
        for num_steps in (3, 4, 5):
            wanted = [exact_step(x._replace(grad=y.grad), num_steps, **SETTINGS) for x, y in zip(wanted, tensors, strict=True)]
            kernel.step(tensors, **SETTINGS, num_steps=num_steps)
            for x in tensors:
                x.grad.copy_(torch.randn(x.grad.shape))
    for x, before, right in zip(tensors, first, wanted, strict=True):
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            assert error(getattr(x, name), getattr(right, name)) < 1e-6  # a few roundings of fp32
        # Where a step is 1e-3 of the weight, fp32 keeps four digits of it.
        assert error(x.weight - before.weight, right.weight - before.weight) < 2e-4
        assert x.copy is None or torch.equal(x.copy, x.weight.to(x.copy.dtype))


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0, "betas": (0.0, 0.99)}, {"lr": 0.0, "eps": 1e-3}], ids=str)
def test_the_reference_has_the_bits_of_torch(changes: dict[str, Any]) -> None:
    """Of the loop over tensors that torch takes on a CPU: what runs there does not change with the kernel."""
    torch.manual_seed(1)
    settings: dict[str, Any] = SETTINGS | changes
    sizes = (1, 7, 1000, 4099)
    tensors = [Tensors(torch.randn(n), torch.randn(n), torch.zeros(n), torch.zeros(n)) for n in sizes]
    weights = [torch.nn.Parameter(x.weight.clone()) for x in tensors]
    torchs, kernel = torch.optim.AdamW(weights, foreach=False, **settings), FusedAdamW()
    for num_steps in range(1, 6):
        for x, weight in zip(tensors, weights, strict=True):
            weight.grad = x.grad.clone()
        torchs.step()
        kernel.step(tensors, **settings, num_steps=num_steps)
        for x, weight in zip(tensors, weights, strict=True):
            assert torch.equal(x.weight, weight.detach())
            assert torch.equal(x.exp_avg, torchs.state[weight]["exp_avg"])
            assert torch.equal(x.exp_avg_sq, torchs.state[weight]["exp_avg_sq"])
            x.grad.copy_(torch.randn(x.grad.shape))


def test_the_same_bits_in_every_run_and_wherever_a_part_begins() -> None:
    torch.manual_seed(2)
    aligned = tensors_of(TILE + 300)
    shifted = tensors_of(TILE + 300, offset=1)
    for to, of in zip(shifted[:4], aligned[:4], strict=True):
        assert to is not None
        assert of is not None
        to.copy_(of)
    first, again = cloned([aligned, aligned])
    with backend.chosen("triton"):
        for x in (first, again, shifted):
            FusedAdamW().step([x], **SETTINGS, num_steps=2)
    for x in (again, shifted):
        assert all(torch.equal(y, z) for y, z in zip(x[:5], first[:5], strict=True) if y is not None and z is not None)


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("size", [1, TILE - 3, TILE + 2])
def test_nothing_beside_a_part_is_written(size: int, choice: Any) -> None:
    buffers = [torch.full((size + 2 * TILE,), 7.0, dtype=dtype, device=DEVICE) for dtype in (FP32, FP32, FP32, FP32, BF16)]
    with backend.chosen(choice):
        FusedAdamW().step([Tensors(*(buffer[TILE : TILE + size] for buffer in buffers))], **SETTINGS, num_steps=1)
    for buffer in buffers:
        assert (buffer[:TILE] == 7).all()
        assert (buffer[TILE + size :] == 7).all()
    assert (buffers[0][TILE : TILE + size] != 7).all()


@pytest.mark.parametrize("choice", BACKENDS)
def test_without_a_running_mean_a_large_one_leaves_nothing_behind(choice: Any) -> None:
    """β1 = 0: m + (g - m) would have lost the gradient to rounding."""
    settings: dict[str, Any] = SETTINGS | {"betas": (0.0, 0.95)}
    x = tensors_of(5)
    x.exp_avg.fill_(1e6)
    x.grad.fill_(1e-6)
    with backend.chosen(choice):
        FusedAdamW().step([x], **settings, num_steps=2)
    assert torch.equal(x.exp_avg, x.grad)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_step_waits_for_nothing() -> None:
    tensors, kernel = [tensors_of(size) for size in (5, 3 * TILE)], FusedAdamW()
    kernel.step(tensors, **SETTINGS, num_steps=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.step(tensors, **SETTINGS, num_steps=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, of the interpreter
def test_extreme_gradients_end_like_torchs(choice: Any) -> None:
    grads = torch.tensor([0.0, -0.0, 1e-30, -1e-20, 1e30, -1e30, 3e38, torch.inf, -torch.inf, torch.nan, 1.0], device=DEVICE)
    x = Tensors(torch.linspace(-2, 2, 11, device=DEVICE), grads, torch.zeros(11, device=DEVICE), torch.zeros(11, device=DEVICE))
    weight = torch.nn.Parameter(x.weight.clone())
    torchs, kernel = torch.optim.AdamW([weight], foreach=False, **SETTINGS), FusedAdamW()
    with backend.chosen(choice):
        for num_steps in (1, 2, 3):
            weight.grad = x.grad.clone()
            torchs.step()
            kernel.step([x], **SETTINGS, num_steps=num_steps)
            assert torch.allclose(x.weight, weight.detach(), rtol=1e-6, atol=0, equal_nan=True)
            x.grad.neg_()
    assert x.weight.isnan().tolist() == [False] * 7 + [True] * 3 + [False]


@pytest.mark.parametrize("choice", BACKENDS)
def test_a_gradient_that_moves_is_followed(choice: Any) -> None:
    """The tables of addresses are kept between steps, but only while they are right."""
    torch.manual_seed(3)
    tensors = [tensors_of(40), tensors_of(70)]
    wanted, kernel = cloned(tensors), FusedAdamW()
    with backend.chosen(choice):
        for num_steps in (1, 2, 3):
            FusedAdamW().step(wanted, **SETTINGS, num_steps=num_steps)
            kernel.step(tensors, **SETTINGS, num_steps=num_steps)
            if num_steps == 1:
                grad = torch.randn(70, device=DEVICE)
                tensors[1], wanted[1] = tensors[1]._replace(grad=grad), wanted[1]._replace(grad=grad)
            else:
                tensors, wanted = tensors[1:], wanted[1:]
            for x, right in zip(tensors, wanted, strict=True):
                assert torch.equal(x.weight, right.weight)


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("copy", [BF16, None], ids=str)
def test_the_8_bit_form_of_the_stepped_weights_is_exact(copy: torch.dtype | None, choice: Any) -> None:
    torch.manual_seed(4)
    shapes = [(128, 128), (130, 144), (1, 5), (0, 3)]
    tensors = []
    for shape in shapes:
        x = tensors_of(shape[0] * shape[1], copy=copy)
        matrices = [None if y is None else y.view(shape) for y in x[:5]]
        fp8 = empty_8_bit(*shape)
        tensors.append(Tensors(*matrices, fp8=fp8, scale=torch.empty(scale_shape(*shape), device=DEVICE)))  # pyright: ignore[reportArgumentType]
    for zero in (tensors[2].weight, tensors[2].grad, tensors[2].exp_avg):
        zero.zero_()
    plain = cloned([x._replace(fp8=None, scale=None) for x in tensors])
    with backend.chosen(choice):
        FusedAdamW().step(tensors, **SETTINGS, num_steps=1)
        FusedAdamW().step(plain, **SETTINGS, num_steps=1)
    for x, without in zip(tensors, plain, strict=True):
        fp8, scale = quantise(without.source)
        assert x.fp8 is not None
        assert x.scale is not None
        assert torch.equal(x.fp8.view(torch.uint8), fp8.view(torch.uint8))
        assert torch.equal(x.scale, scale)
    assert tensors[2].scale.tolist() == [[1.0]]  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_a_block_with_a_nan_has_such_a_scale() -> None:
    shape = (128, 160)
    x, mean, square = (torch.ones(shape, device=DEVICE) for _ in range(3))
    x[3, 130] = torch.nan
    fp8, scale = empty_8_bit(*shape), torch.empty(1, 2, device=DEVICE)
    with backend.chosen("triton"):
        FusedAdamW().step([Tensors(x, torch.zeros_like(x), mean, square, None, fp8, scale)], **SETTINGS, num_steps=1)
    assert scale.isnan().tolist() == [[False, True]]
    assert fp8.float().isnan().sum().item() == 128 * 32


def wrong(**changes: Any) -> list[Tensors]:
    return [tensors_of(8), tensors_of(6)._replace(**changes)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(6, dtype=BF16)}, r"tensors\[1\].weight is \(6,\) torch.bfloat16 on cpu; it must be torch.float32"),
        ({"grad": torch.zeros(6, dtype=FP16)}, r"tensors\[1\].grad .* must be torch.float32 or torch.bfloat16"),
        ({"exp_avg": torch.zeros(5)}, r"tensors\[1\].exp_avg is \(5,\) .* of 6 elements"),
        ({"exp_avg_sq": torch.zeros(12)[::2]}, r"tensors\[1\].exp_avg_sq .*strides \(2,\); it must be contiguous"),
        ({"grad": torch.zeros(6, device="meta")}, r"tensors\[1\].grad is \(6,\) torch.float32 on meta"),
        ({"fp8": torch.zeros(6, dtype=torch.float8_e4m3fn)}, r"tensors\[1\] has only one of fp8 and scale"),
        ({"fp8": torch.zeros(6, dtype=torch.float8_e4m3fn), "scale": torch.zeros(1, 1)}, r"tensors\[1\] of shape \(6,\) has no blocks"),
    ],
)
@pytest.mark.skipif(DEVICE == "cuda", reason="the messages name the CPU")
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedAdamW().step(wrong(**changes), **SETTINGS, num_steps=1)


def test_a_copy_in_the_memory_of_its_weight_and_scales_of_other_blocks_are_named() -> None:
    x = tensors_of(6, copy=None)
    with pytest.raises(ValueError, match=r"tensors\[0\].copy is the memory of its weight"):
        FusedAdamW().step([x._replace(copy=x.weight)], **SETTINGS, num_steps=1)
    matrix = Tensors(
        *(torch.zeros(130, 3, device=DEVICE) for _ in range(4)), fp8=torch.zeros(130, 3, device=DEVICE).to(torch.float8_e4m3fn)
    )
    with pytest.raises(ValueError, match=r"tensors\[0\].scale is \(1, 1\) .*; it must be \(2, 1\) torch.float32"):
        FusedAdamW().step([matrix._replace(scale=torch.zeros(1, 1, device=DEVICE))], **SETTINGS, num_steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; it must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"num_steps": 0}, "num_steps is 0; the first step is number 1"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = SETTINGS | {"num_steps": 1} | changes
    with pytest.raises(ValueError, match=message):
        FusedAdamW().step([tensors_of(3)], **settings)


COMPILE = """
import torch
from tests.kernels.offline import compiling
from tandem.kernels.adamw import FusedAdamW, Tensors
from tandem.kernels.adamw.triton import _step_kernel
from tandem.kernels.backend import chosen
f = lambda dtype=torch.float32: torch.empty(4096, 4096, dtype=dtype, device="meta")
def step(**settings):
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "num_steps": 1} | settings
    FusedAdamW().step([Tensors(f(), f(), f(), f(), f(torch.bfloat16))], **settings)
with chosen("triton"), compiling(90) as compiled:
    step()
    step(lr=0.0, betas=(0.0, 0.5), eps=1.0, weight_decay=0.0)
    step(lr=1.0, num_steps=16)
(kernel,) = [kernel for entry in _step_kernel.device_caches.values() for kernel in entry[0].values()]
ptx = kernel.asm["ptx"]
assert ptx.count("ld.global.v4.b32") >= 3 and ptx.count("st.global.v4.b32") == 3, ptx
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="runs on the real chip instead")
def test_it_compiles_once_for_all_settings_and_reads_in_vectors() -> None:
    """Registers and spills are in the table of tests/kernels/compiled.py."""
    compiled = compile_offline(COMPILE)
    assert [kernel.name for kernel in compiled] == ["_step_kernel"] * 3
