"""Weight buckets: one layer's cuts packed as bf16, cast from fp32, and block-scaled to fp8.

python benchmarks/packing.py [--case bf16] [--out DIR]        options: benchmarks/harness.py
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Subject, main
from tandem.kernels.backend import chosen
from tandem.kernels.block_fp8 import BLOCK, scale_shape
from tandem.kernels.packing import Packer, Part

FP8 = torch.float8_e4m3fn


class Sizes(NamedTuple):
    """Of one tensor-parallel rank's part of a layer."""

    groups: int  # of query heads that share a key and a value
    queries: int  # heads of a group
    head: int
    hidden: int
    ffn: int


class Inputs(NamedTuple):
    parts: list[Part]
    bucket: torch.Tensor
    packers: dict[str, Packer]  # of each backend


def _cuts(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """As the name map cuts a layer: query, key and value in groups, the columns of a wider matrix, gate and up, norms."""

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * 0.02).to(dtype)

    qkv = random(sizes.groups, (sizes.queries + 2) * sizes.head, sizes.hidden)
    q, k, v = qkv.split([sizes.queries * sizes.head, sizes.head, sizes.head], 1)
    output = random(sizes.hidden, 2 * sizes.groups * sizes.queries * sizes.head)[:, : sizes.groups * sizes.queries * sizes.head]
    gate_up = random(2 * sizes.ffn, sizes.hidden)
    return [q, k, v, output, gate_up[: sizes.ffn], gate_up[sizes.ffn :], random(sizes.hidden, sizes.ffn), *random(2, 1, sizes.hidden)]


def _inputs(sizes: Sizes, dtype: torch.dtype, to: torch.dtype, backends: list[Any], device: torch.device) -> Inputs:
    parts, end = [], 0
    for source in _cuts(sizes, dtype, device):
        num_scales = 0
        if to == FP8:
            rows, columns = scale_shape(source.numel() // source.shape[-1], source.shape[-1])
            num_scales = rows * columns
        scale_start = -(-(end + source.numel() * to.itemsize) // 256) * 256
        parts.append(Part(source=source, start=end, dtype=to, scale_start=scale_start if num_scales else None))
        end = -(-(scale_start + 4 * num_scales) // 256) * 256
    packers = {}
    for backend in backends:
        with chosen(backend):
            packers[backend] = Packer(parts)
    return Inputs(parts, torch.zeros(end, dtype=torch.uint8, device=device), packers)


def _read(x: Inputs) -> list[torch.Tensor]:
    """What lies in the bucket: all elements, and all scales."""
    elements, scales = [], []
    for part in x.parts:
        num_bytes = part.source.numel() * part.dtype.itemsize
        elements.append(x.bucket[part.start : part.start + num_bytes].view(part.dtype).float())
        if part.scale_start is not None:
            (rows, columns), _ = part.scales
            scales.append(x.bucket[part.scale_start : part.scale_start + 4 * rows * columns].view(torch.float32))
    return [torch.cat(elements), *([torch.cat(scales)] if scales else [])]


def _pack(backend: str, *, reads: bool) -> Callable[[Inputs], list[torch.Tensor]]:
    def run(x: Inputs) -> list[torch.Tensor]:
        x.packers[backend].pack(x.bucket)
        return _read(x) if reads else [x.bucket]

    return run


def _foreach(x: Inputs, *, reads: bool) -> list[torch.Tensor]:
    """torch's copy of a list of tensors."""
    targets = [
        x.bucket[part.start : part.start + part.source.numel() * part.dtype.itemsize].view(part.dtype).view(part.source.shape)
        for part in x.parts
    ]
    torch._foreach_copy_(targets, [part.source for part in x.parts])  # pyright: ignore[reportPrivateImportUsage]
    return _read(x) if reads else [x.bucket]


def _exact(x: Inputs) -> list[torch.Tensor]:
    """In fp64 but for the roundings that are asked for: to bf16; of the scale and its reciprocal to fp32, and of their product."""
    elements, scales = [], []
    for part in x.parts:
        if part.dtype != FP8:
            elements.append(part.source.to(part.dtype).flatten())
            continue
        matrix = part.source.reshape(-1, part.source.shape[-1])
        for block_row in matrix.split(BLOCK):
            for block in block_row.split(BLOCK, 1):
                scales.append((block.abs().amax().double() / 448).float())
        per_row = scale_shape(*matrix.shape)[1]
        own = torch.stack(scales[-per_row * scale_shape(*matrix.shape)[0] :]).view(-1, per_row)
        inverse = (1 / own.double()).float().repeat_interleave(BLOCK, 0)[: len(matrix)].repeat_interleave(BLOCK, 1)[:, : matrix.shape[1]]
        elements.append((matrix.double() * inverse.double()).float().to(FP8).float().flatten())
    return [torch.cat(elements).double(), *([torch.stack(scales).double()] if scales else [])]


def cases(device: torch.device) -> list[Case]:
    """The smallest first. On a GPU a layer of an 8B shape on one of two tensor-parallel ranks, of which a bucket may hold several."""
    on_gpu = device.type == "cuda"
    names = {"kernel": "auto", "reference": "reference"} if on_gpu else {"reference": "reference"}
    sizes = Sizes(4, 4, 128, 4096, 6144) if on_gpu else Sizes(4, 4, 64, 1024, 3072)
    small = Sizes(2, 3, 64, 320, 208)

    def case(name: str, dtype: torch.dtype, to: torch.dtype) -> Case:
        def sized(of: Sizes, check_on: Case | None) -> Case:
            reads = check_on is None  # what is timed leaves the bucket as it is
            runs: dict[str, Any] = {run: _pack(backend, reads=reads) for run, backend in names.items()}
            if to != FP8:
                runs["torch foreach copy"] = lambda x: _foreach(x, reads=reads)
            matrices = (of.groups * (2 * of.queries + 2) * of.head + 3 * of.ffn) * of.hidden
            num_bytes = (matrices + 2 * of.hidden) * (dtype.itemsize + to.itemsize) + (4 * matrices // BLOCK**2 if to == FP8 else 0)
            return Case(
                name=name,
                shape={"parameters": matrices + 2 * of.hidden},
                dtype=dtype,
                flop=0,
                bytes=num_bytes,
                inputs=lambda device: _inputs(of, dtype, to, list(names.values()), device),
                exact=_exact,
                tolerances=[0.0, 0.0] if to == FP8 else [0.0],  # bit for bit
                runs=runs,
                check_on=check_on,
            )

        return sized(sizes, sized(small, None))

    return [
        case("bf16", torch.bfloat16, torch.bfloat16),
        case("fp32 to bf16", torch.float32, torch.bfloat16),
        case("bf16 to fp8", torch.bfloat16, FP8),
        case("fp32 to fp8", torch.float32, FP8),
    ]


SUBJECT = Subject(name="packing", about="weight buckets", cases=cases)

if __name__ == "__main__":
    main(SUBJECT)
