"""A layer of experts: grouping rows by expert, the grouped products, and the whole layer; against torch's grouped products on a GPU.

python benchmarks/moe.py [--case layer] [--out DIR]        options: benchmarks/harness.py
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Subject, main
from tandem.kernels.backend import chosen
from tandem.kernels.grouped_gemm import grouped_linear
from tandem.kernels.permute import gather_weights, permute, route, unpermute
from tandem.kernels.swiglu import weighted_swiglu

Outputs = tuple[torch.Tensor, ...]
Run = Callable[[Any], Outputs]


class Sizes(NamedTuple):
    tokens: int
    experts: int
    chosen: int
    hidden: int
    ffn: int


class Inputs(NamedTuple):
    sizes: Sizes
    x_TH: torch.Tensor
    map_TE: torch.Tensor
    scores_TE: torch.Tensor
    first: Sequence[torch.Tensor]  # of each expert, [2F, H]
    second: Sequence[torch.Tensor]  # [H, F]
    grad_TH: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [self.x_TH, self.scores_TE, *self.first, *self.second]


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The most popular expert gets some three times as many tokens as the mean."""
    tokens, experts, num_chosen, hidden, ffn = sizes
    popular_E = torch.linspace(1.5, 0.0, experts, device=device)
    gumbel_TE = -torch.empty(tokens, experts, device=device).exponential_().log()
    chosen_TK = (gumbel_TE + popular_E).topk(num_chosen, dim=-1).indices

    def matrices(num_outputs: int, num_inputs: int) -> list[torch.Tensor]:
        return [(torch.randn(num_outputs, num_inputs, device=device) * num_inputs**-0.5).to(dtype).requires_grad_() for _ in range(experts)]

    return Inputs(
        sizes,
        torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_(),
        torch.zeros(tokens, experts, dtype=torch.bool, device=device).scatter_(1, chosen_TK, True),
        torch.rand(tokens, experts, device=device).requires_grad_(),
        matrices(2 * ffn, hidden),
        matrices(hidden, ffn),
        torch.randn(tokens, hidden, device=device).to(dtype),
    )


def _layer(x: Inputs) -> torch.Tensor:
    plan = route(x.map_TE, num_rows=x.sizes.tokens * x.sizes.chosen, max_per_token=x.sizes.chosen)
    inner = grouped_linear(permute(x.x_TH, plan), x.first, plan.offsets_E1)
    return unpermute(grouped_linear(weighted_swiglu(inner, gather_weights(x.scores_TE, plan)), x.second, plan.offsets_E1), plan)


def _loop(x: Inputs) -> torch.Tensor:
    """One expert after the other, as modules would be called."""
    out_TH = torch.zeros_like(x.x_TH)
    for e, (first, second) in enumerate(zip(x.first, x.second, strict=True)):
        (at,) = x.map_TE[:, e].nonzero(as_tuple=True)
        gate, up = (x.x_TH[at] @ first.T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up * x.scores_TE[at, e, None].to(gate.dtype)
        out_TH = out_TH.index_add(0, at, inner @ second.T)
    return out_TH


def _torch_grouped(x: Inputs) -> torch.Tensor:
    """torch's grouped products, which need the matrices in one tensor."""
    grouped: Any = torch.nn.functional.grouped_mm
    ends_E = x.map_TE.sum(0).cumsum(0).int()
    expert, token = x.map_TE.T.nonzero(as_tuple=True)
    gate, up = grouped(x.x_TH[token], torch.stack(list(x.first)).mT, offs=ends_E).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up * x.scores_TE[token, expert, None].to(gate.dtype)
    return torch.zeros_like(x.x_TH).index_add(0, token, grouped(inner, torch.stack(list(x.second)).mT, offs=ends_E))


def _rows(x: Inputs) -> torch.Tensor:
    plan = route(x.map_TE, num_rows=x.sizes.tokens * x.sizes.chosen, max_per_token=x.sizes.chosen)
    return unpermute(permute(x.x_TH, plan), plan)


def _index_add(x: Inputs) -> torch.Tensor:
    _, token = x.map_TE.T.nonzero(as_tuple=True)
    return torch.zeros_like(x.x_TH).index_add(0, token, x.x_TH[token])


def _no_grad(function: Callable[[Inputs], torch.Tensor]) -> Run:
    def run(x: Inputs) -> Outputs:
        with torch.no_grad():
            return (function(x),)

    return run


def _with_gradients(function: Callable[[Inputs], torch.Tensor]) -> Run:
    """The output, the gradients of tokens and scores, and those of all matrices as one tensor."""

    def run(x: Inputs) -> Outputs:
        out_TH = function(x)
        grad_x, grad_scores, *grads = torch.autograd.grad(out_TH, x.leaves(), x.grad_TH.to(out_TH.dtype))
        return out_TH.detach(), grad_x, grad_scores, torch.cat([grad.flatten() for grad in grads])

    return run


def _exact(run: Run) -> Run:
    def in_fp64(x: Inputs) -> Outputs:
        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().double().requires_grad_()

        matrices = [[leaf(weight) for weight in weights] for weights in (x.first, x.second)]
        return run(x._replace(x_TH=leaf(x.x_TH), scores_TE=leaf(x.scores_TE), first=matrices[0], second=matrices[1]))

    return in_fp64


def _in_reference(run: Run) -> Run:
    def with_choice(x: Inputs) -> Outputs:
        with chosen("reference"):
            return run(x)

    return with_choice


def cases(device: torch.device) -> list[Case]:
    """The smallest first. On a GPU the shapes of Qwen3-30B-A3B."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sizes = Sizes(32_768, 128, 8, 2048, 768) if on_gpu else Sizes(2048, 16, 4, 256, 128)
    small = Sizes(509, 8, 3, 120, 72)
    size = dtype.itemsize
    rows = sizes.tokens * sizes.chosen
    matrices = 3 * sizes.experts * sizes.hidden * sizes.ffn * size
    products = 6.0 * rows * sizes.hidden * sizes.ffn
    moved = (rows + sizes.tokens) * sizes.hidden * size
    # A product rounds its result once; three follow each other.
    bound = 2e-2 if on_gpu else 1e-5

    def runs(ours: Callable[[Inputs], torch.Tensor], peers: dict[str, Callable[[Inputs], torch.Tensor]], wrap: Any) -> dict[str, Run]:
        own = {"kernel": wrap(ours), "reference": _in_reference(wrap(ours))} if on_gpu else {"reference": wrap(ours)}
        return own | {name: wrap(peer) for name, peer in peers.items()}

    def case(name: str, exact: Run, found: dict[str, Run], flop: float, num_bytes: float, num_outputs: int) -> Case:
        def sized(of: Sizes, check_on: Case | None) -> Case:
            return Case(
                name=name,
                shape={"T": of.tokens, "E": of.experts, "K": of.chosen, "H": of.hidden, "F": of.ffn},
                dtype=dtype,
                flop=flop,
                bytes=num_bytes,
                inputs=lambda device: _inputs(of, dtype, device),
                exact=exact,
                tolerances=[bound] * num_outputs,
                runs=found,
                check_on=check_on,
            )

        return sized(sizes, sized(small, None))

    layers = {"loop": _loop} | ({"torch grouped_mm": _torch_grouped} if on_gpu else {})
    return [
        case("rows", _exact(_no_grad(_index_add)), runs(_rows, {"index_add": _index_add}, _no_grad), 0, 2 * moved, 1),
        case("layer", _exact(_no_grad(_loop)), runs(_layer, layers, _no_grad), products, matrices + moved, 1),
        case(
            "layer+backward",
            _exact(_with_gradients(_loop)),
            runs(_layer, layers, _with_gradients),
            3 * products,
            2 * matrices + 2 * moved,
            4,
        ),
    ]


SUBJECT = Subject(name="moe", about="a layer of experts", cases=cases)

if __name__ == "__main__":
    main(SUBJECT)
