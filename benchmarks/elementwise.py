"""RMSNorm, SwiGLU and rotary embedding, forward and backward: what moves bytes, against plain torch, torch.compile and Liger.

python benchmarks/elementwise.py [--case norm] [--out DIR]        options: benchmarks/harness.py
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Subject, compiled, installed, main
from tandem.kernels.backend import chosen
from tandem.kernels.norm import rms_norm
from tandem.kernels.rope import rope
from tandem.kernels.swiglu import swiglu

EPS = 1e-6
Function = Callable[..., torch.Tensor]  # from x and the constants


@dataclass
class Inputs:
    x: torch.Tensor
    constants: Sequence[torch.Tensor]  # a weight, or cosines and sines
    grad: torch.Tensor  # of the output
    outputs: dict[Any, torch.Tensor] = field(default_factory=dict)  # with their graphs, of each that computes backward passes


def _plain_norm(x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
    wide_TH = x_TH if x_TH.dtype == torch.float64 else x_TH.float()
    return (wide_TH * (wide_TH.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight_H).to(x_TH.dtype)


def _torch_norm(x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x_TH, x_TH.shape[-1:], weight_H, EPS)


def _liger_norm(x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    return LigerRMSNormFunction.apply(x_TH, weight_H, EPS, 0.0, "llama", False)


def _plain_swiglu(x_T2F: torch.Tensor) -> torch.Tensor:
    gate, up = x_T2F.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _liger_swiglu(x_T2F: torch.Tensor) -> torch.Tensor:
    """On contiguous halves, which it needs: copying them is timed too."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    gate, up = x_T2F.chunk(2, -1)
    return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())


def _plain_rope(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    first, second = x_TND.chunk(2, -1)
    return torch.cat([first * cos_T1D - second * sin_T1D, second * cos_T1D + first * sin_T1D], -1).to(x_TND.dtype)


@dataclass(frozen=True)
class Kernel:
    """One function, and bytes of the elements that it moves in each direction, as multiples of its input's."""

    own: Function
    plain: Function
    peers: Mapping[str, Function]
    forward_bytes: float
    backward_bytes: float


KERNELS = {
    "norm": Kernel(lambda x, weight: rms_norm(x, weight, EPS), _plain_norm, {"torch rms_norm": _torch_norm, "liger": _liger_norm}, 2, 3),
    "swiglu": Kernel(swiglu, _plain_swiglu, {"liger": _liger_swiglu}, 1.5, 2.5),
    "rope": Kernel(rope, _plain_rope, {}, 2, 2),
}


def _inputs(name: str, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    *leading, width = shape.values()
    x = torch.randn(*leading, width * (2 if name == "swiglu" else 1), device=device).to(dtype).requires_grad_()
    constants: list[torch.Tensor] = []
    if name == "norm":
        constants = [torch.linspace(0.5, 1.5, width, device=device).to(dtype).requires_grad_()]
    if name == "rope":
        angles = torch.arange(leading[0], device=device)[:, None, None] * torch.linspace(1, 1e-4, width // 2, device=device)
        constants = [angles.cos(), angles.sin()]
    return Inputs(x, constants, torch.randn(*leading, width, device=device).to(dtype))


def _forward(function: Function) -> Callable[[Any], Sequence[torch.Tensor]]:
    def run(x: Inputs) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return [function(x.x, *x.constants)]

    return run


def _backward(function: Function) -> Callable[[Any], Sequence[torch.Tensor]]:
    """The first call on new inputs makes the graph; later ones are the backward pass alone."""

    def run(x: Inputs) -> Sequence[torch.Tensor]:
        if function not in x.outputs:
            x.outputs[function] = function(x.x, *x.constants)
        leaves = [tensor for tensor in (x.x, *x.constants) if tensor.requires_grad]
        return torch.autograd.grad(x.outputs[function], leaves, x.grad, retain_graph=True)

    return run


def _in_fp64(x: Inputs) -> Inputs:
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (x.x, *x.constants)]
    return Inputs(wide[0], wide[1:], x.grad.double())


def _in_reference(function: Function) -> Function:
    def with_choice(*tensors: torch.Tensor) -> torch.Tensor:
        with chosen("reference"):
            return function(*tensors)

    return with_choice


def _case(name: str, shape: Mapping[str, int], functions: Mapping[str, Function], device: torch.device, backward: bool) -> Case:
    kernel, dtype, wrap = KERNELS[name], torch.bfloat16 if device.type == "cuda" else torch.float32, _backward if backward else _forward
    exact = wrap(kernel.plain)
    elements = torch.Size(shape.values()).numel() * (2 if name == "swiglu" else 1)

    def sized(shape: Mapping[str, int], check_on: Case | None) -> Case:
        return Case(
            name=f"{name} {'backward' if backward else 'forward'}",
            shape=shape,
            dtype=dtype,
            flop=0,
            bytes=dtype.itemsize * elements * (kernel.backward_bytes if backward else kernel.forward_bytes),
            inputs=lambda device: _inputs(name, shape, dtype, device),
            exact=lambda x: exact(_in_fp64(x)),
            # One rounding of the result; the gradient of a norm's weight is a sum over all rows.
            tolerances=[6e-3 if dtype == torch.bfloat16 else 5e-6] * (2 if name == "norm" and backward else 1),
            runs={run: wrap(function) for run, function in functions.items()},
            check_on=check_on,
        )

    return sized(shape, sized({**shape, "T": 509}, None))


def cases(device: torch.device) -> list[Case]:
    """On a GPU 32k tokens of an 8B model's shapes."""
    on_gpu = device.type == "cuda"
    shapes = {
        "norm": {"T": 32_768, "H": 4096} if on_gpu else {"T": 2048, "H": 512},
        "swiglu": {"T": 32_768, "F": 12_288} if on_gpu else {"T": 2048, "F": 1024},
        "rope": {"T": 32_768, "N": 32, "D": 128} if on_gpu else {"T": 2048, "N": 8, "D": 64},
    }
    found = []
    for name, kernel in KERNELS.items():
        functions: dict[str, Function] = (
            {"kernel": kernel.own, "reference": _in_reference(kernel.own)} if on_gpu else {"reference": kernel.own}
        )
        functions["plain torch"] = kernel.plain
        if on_gpu:
            functions["torch.compile"] = compiled(kernel.plain)
        functions |= {peer: call for peer, call in kernel.peers.items() if peer != "liger" or (on_gpu and installed("liger_kernel"))}
        found += [_case(name, shapes[name], functions, device, backward) for backward in (False, True)]
    return found


SUBJECT = Subject(name="elementwise", about="RMSNorm, SwiGLU and rotary embedding", cases=cases)

if __name__ == "__main__":
    main(SUBJECT)
