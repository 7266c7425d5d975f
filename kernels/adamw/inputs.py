"""What AdamW steps, its settings, and their checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tandem.kernels.block_fp8 import scale_shape

GRADIENTS = (torch.float32, torch.bfloat16)
COPIES = (torch.float32, torch.bfloat16, torch.float16)
MOST_COLUMNS = 2**24  # of a matrix with an 8-bit form: places within its blocks are 32-bit numbers


class Tensors(NamedTuple):
    """What belongs to one weight, or to the part of it that this rank steps. All contiguous, on one device, of as many elements."""

    weight: torch.Tensor  # fp32; changed
    grad: torch.Tensor  # fp32 or bf16
    exp_avg: torch.Tensor  # fp32, m; changed
    exp_avg_sq: torch.Tensor  # fp32, v; changed
    copy: torch.Tensor | None = None  # fp32, bf16 or fp16: is written with the stepped weight; must not be its memory
    fp8: torch.Tensor | None = None  # [M, N] float8_e4m3fn: is written with the copy (without one, the weight) as blocks
    scale: torch.Tensor | None = None  # their scales, [ceil(M / 128), ceil(N / 128)] fp32

    @property
    def source(self) -> torch.Tensor:
        """What the 8-bit form is of: what the model computes with."""
        return self.weight if self.copy is None else self.copy


class Scalars(NamedTuple):
    """What the formula needs of the settings, computed in fp64 and rounded once, when it meets the tensors."""

    keep: float  # 1 - lr * decay
    lerp: float  # 1 - β1
    beta2: float
    square: float  # 1 - β2
    root: float  # √(1 - β2ᵗ)
    eps: float
    step_size: float  # lr / (1 - β1ᵗ)


def scalars_of(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, num_steps: int) -> Scalars:
    """Raises: ValueError for a setting out of range."""
    beta1, beta2 = betas
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be a number of at least 0")
    for name, value in (("betas[0]", beta1), ("betas[1]", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must lie in [0, 1)")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; the first step is number 1, else its bias correction divides by 0")
    return Scalars(
        keep=1 - lr * weight_decay,
        lerp=1 - beta1,
        beta2=beta2,
        square=1 - beta2,
        root=(1 - beta2**num_steps) ** 0.5,
        eps=eps,
        step_size=lr / (1 - beta1**num_steps),
    )


def check(tensors: Sequence[Tensors]) -> None:
    """Raises: ValueError for types, sizes, strides or devices that do not fit."""
    for index, x in enumerate(tensors):
        _check_one(index, x, tensors[0].weight.device)


def _check_one(index: int, x: Tensors, device: torch.device) -> None:
    size = x.weight.numel()
    allowed = {"weight": (torch.float32,), "grad": GRADIENTS, "exp_avg": (torch.float32,), "exp_avg_sq": (torch.float32,), "copy": COPIES}
    for name, dtypes in allowed.items():
        tensor: torch.Tensor | None = getattr(x, name)
        if tensor is None:
            continue
        found = f"tensors[{index}].{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        if tensor.dtype not in dtypes:
            raise ValueError(f"{found}; it must be {' or '.join(str(dtype) for dtype in dtypes)}")
        if tensor.numel() != size or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(f"{found}, strides {tensor.stride()}; it must be contiguous, of {size} elements like its weight, on {device}")
    if x.copy is not None and x.copy.data_ptr() == x.weight.data_ptr() != 0:  # 0: without elements
        raise ValueError(f"tensors[{index}].copy is the memory of its weight; leave it out")
    if (x.fp8 is None) != (x.scale is None):
        raise ValueError(f"tensors[{index}] has only one of fp8 and scale; give both, or neither")
    if x.fp8 is None or x.scale is None:
        return
    shape = tuple(x.source.shape)
    if len(shape) != 2 or shape[1] >= MOST_COLUMNS:
        rule = f"leave fp8 out for what is not a matrix [M, N] of fewer than {MOST_COLUMNS} columns"
        raise ValueError(f"tensors[{index}] of shape {shape} has no blocks of 128 x 128; {rule}")
    for name, tensor, wanted, dtype in (
        ("fp8", x.fp8, shape, torch.float8_e4m3fn),
        ("scale", x.scale, scale_shape(*shape), torch.float32),
    ):
        if tuple(tensor.shape) != wanted or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            found = f"tensors[{index}].{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
            raise ValueError(f"{found}; it must be {wanted} {dtype} on {device} and contiguous")
