"""A step of AdamW over the tensors of a model, with the bf16 copy that it computes with: against torch's fused and foreach AdamW.

python benchmarks/adamw.py [--case step] [--out DIR]        options: benchmarks/harness.py
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Subject, main
from tandem.kernels.adamw import FusedAdamW, Tensors
from tandem.kernels.backend import chosen
from tandem.kernels.block_fp8 import quantise, scale_shape

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
NUM_STEPS = 10  # the number of the step: the bias corrections are not those of the first
START = 64  # tensors begin at multiples of it, as in Megatron's buffers

Shape = tuple[int, ...]
Outputs = tuple[torch.Tensor, ...]
Run = Callable[[Any], Outputs]


class Flat(NamedTuple):
    """Of all tensors one after the other: what a step reads and writes."""

    weight: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    copy: torch.Tensor
    fp8: torch.Tensor
    scale: torch.Tensor


class Inputs(NamedTuple):
    shapes: list[Shape]
    flat: Flat
    tensors: list[Tensors]
    kernel: FusedAdamW
    torchs: dict[str, torch.optim.AdamW]  # on the same memory


def _model(num_layers: int, hidden: int, ffn: int, vocab: int) -> list[Shape]:
    layer: list[Shape] = [(3 * hidden // 2, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn), (hidden,), (hidden,)]
    return [*layer * num_layers, (vocab, hidden), (hidden,)]


def _pieces(flat: torch.Tensor, shapes: list[Shape]) -> list[torch.Tensor]:
    found, start = [], 0
    for shape in shapes:
        found.append(flat[start : start + math.prod(shape)].view(shape))
        start += -(-math.prod(shape) // START) * START
    return found


def _total(shapes: list[Shape]) -> int:
    return sum(-(-math.prod(shape) // START) * START for shape in shapes)


def _scale_shapes(shapes: list[Shape]) -> list[Shape]:
    return [scale_shape(*shape) if len(shape) == 2 else (0,) for shape in shapes]


def _inputs(shapes: list[Shape], grad: torch.dtype, device: torch.device, *, with_fp8: bool) -> Inputs:
    total = _total(shapes)

    def normal() -> torch.Tensor:
        return torch.randn(total, device=device)

    copy = torch.zeros(total, dtype=torch.bfloat16, device=device)
    fp8 = torch.zeros(total if with_fp8 else 0, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scale = torch.zeros(_total(_scale_shapes(shapes)) if with_fp8 else 0, device=device)
    flat = Flat(normal(), normal().to(grad), normal().mul_(0.1), normal().square_(), copy, fp8, scale)
    tensors = [Tensors(*pieces) for pieces in zip(*(_pieces(x, shapes) for x in flat[:5]), strict=True)]
    if with_fp8:
        blocks = zip(_pieces(fp8, shapes), _pieces(scale, _scale_shapes(shapes)), strict=True)
        tensors = [x._replace(fp8=y, scale=z) if y.dim() == 2 else x for x, (y, z) in zip(tensors, blocks, strict=True)]
    torchs = {"fused": _torchs(tensors, fused=True), "foreach": _torchs(tensors, foreach=True)} if grad == torch.float32 else {}
    return Inputs(shapes, flat, tensors, FusedAdamW(), torchs)


def _torchs(tensors: list[Tensors], *, fused: bool = False, foreach: bool = False) -> torch.optim.AdamW:
    weights = [torch.nn.Parameter(x.weight) for x in tensors]
    optimizer = torch.optim.AdamW(weights, fused=fused, foreach=foreach, **SETTINGS)
    for weight, x in zip(weights, tensors, strict=True):
        weight.grad = x.grad
        num_steps = torch.tensor(NUM_STEPS - 1.0, device=x.weight.device if fused else "cpu")
        optimizer.state[weight] = {"step": num_steps, "exp_avg": x.exp_avg, "exp_avg_sq": x.exp_avg_sq}
    return optimizer


def _outputs(flat: Flat) -> Outputs:
    outputs = (flat.weight, flat.exp_avg, flat.exp_avg_sq, flat.copy)
    return (*outputs, flat.fp8, flat.scale) if len(flat.fp8) else outputs


def _kernel(x: Inputs) -> Outputs:
    x.kernel.step(x.tensors, **SETTINGS, num_steps=NUM_STEPS)
    return _outputs(x.flat)


def _reference(x: Inputs) -> Outputs:
    with chosen("reference"):
        return _kernel(x)


def _torch_step(name: str) -> Run:
    def run(x: Inputs) -> Outputs:
        x.torchs[name].step()
        with torch.no_grad():
            torch._foreach_copy_([y.copy for y in x.tensors], [y.weight for y in x.tensors])  # pyright: ignore
        return _outputs(x.flat)

    return run


def _exact(x: Inputs) -> Outputs:
    """The padding between the tensors is left as it is."""
    beta1, beta2 = SETTINGS["betas"]
    weight, grad, mean, square = (y.double() for y in x.flat[:4])
    inside = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    for piece in _pieces(inside, x.shapes):
        piece.fill_(True)
    new_mean = beta1 * mean + (1 - beta1) * grad
    new_square = beta2 * square + (1 - beta2) * grad.square()
    direction = new_mean / (1 - beta1**NUM_STEPS) / ((new_square / (1 - beta2**NUM_STEPS)).sqrt() + SETTINGS["eps"])
    new_weight = (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]) * weight - SETTINGS["lr"] * direction
    pairs = ((new_weight, weight), (new_mean, mean), (new_square, square), (new_weight, x.flat.copy))
    outputs = tuple(torch.where(inside, new, old.double()) for new, old in pairs)
    if not len(x.flat.fp8):
        return outputs
    fp8, scale = torch.zeros_like(x.flat.fp8), torch.zeros_like(x.flat.scale)
    copies, scale_shapes = _pieces(outputs[0].bfloat16(), x.shapes), _scale_shapes(x.shapes)
    for copy, to, to_scale in zip(copies, _pieces(fp8, x.shapes), _pieces(scale, scale_shapes), strict=True):
        if copy.dim() == 2:
            found = quantise(copy)
            to.copy_(found[0])
            to_scale.copy_(found[1])
    return *outputs, fp8, scale


def cases(device: torch.device) -> list[Case]:
    """The smallest first. On a GPU 0.9 billion weights, four layers of a dense 8B model and an embedding."""
    on_gpu = device.type == "cuda"
    large = _model(4, 4096, 12_288, 32_768) if on_gpu else _model(4, 512, 1536, 4000)
    small = _model(2, 200, 328, 1001)
    # fp32 rounds three times at most; bf16 once; a copy on the other side of a rounding has another 8-bit form.
    tolerances = [1e-6, 1e-6, 1e-6, 3e-3, 1e-2, 1e-2]

    def case(name: str, grad: torch.dtype, *, with_fp8: bool, with_peers: bool) -> Case:
        runs: dict[str, Run] = {"kernel": _kernel, "reference": _reference} if on_gpu else {"reference": _reference}
        if with_peers:
            runs |= {"torch fused": _torch_step("fused"), "torch foreach": _torch_step("foreach")}

        def sized(shapes: list[Shape], check_on: Case | None) -> Case:
            num_weights = sum(math.prod(shape) for shape in shapes)
            num_in_matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
            return Case(
                name=name,
                shape={"tensors": len(shapes), "N": num_weights},
                dtype=grad,
                flop=0,
                # Weight and both moments are read and written, the gradient is read, the bf16 copy written, and read for the 8-bit form.
                bytes=num_weights * (24 + grad.itemsize + 2) + with_fp8 * num_in_matrices * (2 + 1),
                inputs=lambda device: _inputs(shapes, grad, device, with_fp8=with_fp8),
                exact=_exact,
                tolerances=tolerances[: 6 if with_fp8 else 4],
                runs=runs,
                check_on=check_on,
            )

        return sized(large, sized(small, None))

    return [
        case("step", torch.float32, with_fp8=False, with_peers=True),
        case("step, bf16 gradients", torch.bfloat16, with_fp8=False, with_peers=False),
        case("step+fp8", torch.float32, with_fp8=True, with_peers=False),
    ]


SUBJECT = Subject(name="adamw", about="a step of AdamW", cases=cases)

if __name__ == "__main__":
    main(SUBJECT)
