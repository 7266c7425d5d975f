"""Packed attention: against SDPA, varlen attention, FlexAttention and flash-attn on a GPU, and against SDPA on a CPU.

python benchmarks/attention.py [--case "shared prompt forward"] [--out DIR]        options: benchmarks/harness.py

A backward case times the backward pass alone. A shared prompt's peer is the same attention over k copies of the prompt; a detached
prefix's peer is the same attention that computes all gradients.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Subject, compiled, installed, main
from tandem.kernels.attention import AttentionPlan, packed_attention, plan_attention
from tandem.kernels.backend import chosen

# What a backward pass needs in matmuls, where a forward pass needs two: scores, dP, dV, dQ and dK.
BACKWARD_MATMULS = 5


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tokens see which, and the same responses with a prompt each where they share one."""

    name: str
    sizes: dict[str, int]  # for the table
    visible_end_T: torch.Tensor
    grad_start: int = 0
    unshared: "tuple[torch.Tensor, torch.Tensor] | None" = None  # visible ends, and the shared token that each one is

    @property
    def num_tokens(self) -> int:
        return len(self.visible_end_T)

    def flop(self, backward: bool, heads: int, width: int) -> float:
        """Of the pairs that are visible, and in a backward pass on from `grad_start`."""
        places = torch.arange(self.num_tokens)
        ends = self.visible_end_T.long()
        matmul = 2.0 * heads * width
        if not backward:
            return 2 * matmul * float((ends - places).sum())
        from_queries = float((ends - places.clamp(min=self.grad_start)).clamp(min=0).sum())
        from_keys = float((ends - places)[self.grad_start :].sum())
        # Scores, dP and dQ of all pairs whose query has a gradient; dV and dK of those whose key has one too.
        return matmul * ((BACKWARD_MATMULS - 2) * from_queries + 2 * from_keys)


def causal(length: int) -> Layout:
    return Layout(name="causal", sizes={"T": length}, visible_end_T=torch.full((length,), length))


def packed(length: int, sequences: int) -> Layout:
    """Sequences of random lengths, the same ones at every run."""
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, length), sequences - 1, replace=False))
    bounds = np.concatenate([[0], cuts, [length]])
    ends = torch.from_numpy(np.repeat(bounds[1:], np.diff(bounds)))
    return Layout(name="packed", sizes={"T": length, "R": sequences}, visible_end_T=ends)


def shared_prompt(prompt: int, response: int, responses: int) -> Layout:
    length = prompt + responses * response
    ends = torch.cat([torch.full((prompt,), length), prompt + torch.arange(1, responses + 1).repeat_interleave(response) * response])
    whole = prompt + response
    copies_ends = torch.arange(1, responses + 1).repeat_interleave(whole) * whole
    own = torch.arange(responses)[:, None] * response + torch.arange(prompt, whole)
    token = torch.cat([torch.arange(prompt).expand(responses, -1), own], dim=1).flatten()
    sizes = {"P": prompt, "R": response, "k": responses}
    return Layout(name="shared prompt", sizes=sizes, visible_end_T=ends, unshared=(copies_ends, token))


def detached(prefix: int, rest: int) -> Layout:
    length = prefix + rest
    return Layout(
        name="detached prefix", sizes={"prefix": prefix, "T": length}, visible_end_T=torch.full((length,), length), grad_start=prefix
    )


@dataclass
class Inputs:
    layout: Layout
    q_TND: torch.Tensor
    k_TGD: torch.Tensor
    v_TGD: torch.Tensor
    grad_TND: torch.Tensor  # 0 below grad_start
    plan: AttentionPlan
    outputs: dict[Any, torch.Tensor] = field(default_factory=dict)  # with their graphs, of each that computes backward passes

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q_TND, self.k_TGD, self.v_TGD


def _inputs(layout: Layout, heads: int, groups: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    q, k, v, grad = (torch.randn(layout.num_tokens, n, width, device=device).to(dtype) for n in (heads, groups, groups, heads))
    grad[: layout.grad_start] = 0
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return Inputs(layout, q, k, v, grad, plan_attention(layout.visible_end_T, device=device))


Attend = Callable[[Inputs, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _ours(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return packed_attention(q, k, v, x.layout.visible_end_T, plan=x.plan, grad_start=x.layout.grad_start)


def _reference(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with chosen("reference"):
        return _ours(x, q, k, v)


def _all_gradients(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return packed_attention(q, k, v, x.layout.visible_end_T, plan=x.plan)


class Unshared:
    """The same attention over copies of the prompt. Copying tokens there and adding gradients back is timed too; it is little."""

    plan: "tuple[Layout, AttentionPlan] | None" = None

    def __call__(self, x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert x.layout.unshared is not None
        ends, token = x.layout.unshared
        if self.plan is None or self.plan[0] is not x.layout:
            self.plan = x.layout, plan_attention(ends, device=q.device)
        token = token.to(q.device)
        out = packed_attention(q[token], k[token], v[token], ends, plan=self.plan[1])
        # Of equal rows the first, so that the prompt's gradient flows once.
        first = torch.full((x.layout.num_tokens,), len(ends), device=q.device)
        first.scatter_reduce_(0, token, torch.arange(len(ends), device=q.device), "amin")
        return out[first]


def _sdpa(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _cudnn(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(x, q, k, v)


def _sequence_bounds(x: Inputs, device: torch.device) -> tuple[torch.Tensor, int]:
    ends = torch.unique_consecutive(x.layout.visible_end_T)
    bounds = torch.cat([ends.new_zeros(1), ends])
    return bounds.to(device, torch.int32), int(bounds.diff().max())


def _varlen(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = _sequence_bounds(x, q.device)
    # Before torch 2.12 it takes fewer heads of keys without being told.
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **options)
    assert isinstance(out, torch.Tensor)
    return out


def _flash_2(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    bounds, longest = _sequence_bounds(x, q.device)
    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=True, deterministic=True)


class Flex:
    """FlexAttention, compiled, with the same mask; its blocks are found before they are timed, as our plan is."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.attend = compiled(flex_attention)
        self.mask: tuple[Layout, Any] | None = None

    def __call__(self, x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import create_block_mask

        if self.mask is None or self.mask[0] is not x.layout:
            ends, length = x.layout.visible_end_T.to(q.device), x.layout.num_tokens
            visible = lambda b, h, i, j: (j <= i) & (i < ends[j])  # noqa: E731
            self.mask = x.layout, create_block_mask(visible, None, None, length, length, device=q.device, _compile=True)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out: Any = self.attend(q, k, v, block_mask=self.mask[1], enable_gqa=True)
        return out[0].transpose(0, 1)


def _exact(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(x.layout.num_tokens, device=q.device)
    visible = (place <= place[:, None]) & (place[:, None] < x.layout.visible_end_T.to(q.device))
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)


def _in_fp64(x: Inputs) -> Inputs:
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in x.operands)
    return Inputs(x.layout, q, k, v, x.grad_TND.double(), x.plan)


def _forward(attend: Attend) -> Callable[[Any], Sequence[torch.Tensor]]:
    def run(x: Inputs) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return [attend(x, *x.operands)]

    return run


def _backward(attend: Attend) -> Callable[[Any], Sequence[torch.Tensor]]:
    """The first call on new inputs makes the graph; later ones are the backward pass alone."""

    def run(x: Inputs) -> Sequence[torch.Tensor]:
        if attend not in x.outputs:
            x.outputs[attend] = attend(x, *x.operands)
        grads = torch.autograd.grad(x.outputs[attend], x.operands, x.grad_TND, retain_graph=True)
        return [grad[x.layout.grad_start :] for grad in grads]

    return run


def _case(
    layout: Layout, small: Layout, attends: dict[str, Attend], sizes: tuple[int, int, int], dtype: torch.dtype, backward: bool
) -> Case:
    heads, groups, width = sizes
    wrap = _backward if backward else _forward
    runs = {name: wrap(attend) for name, attend in attends.items()}
    exact = wrap(_exact)

    def sized(layout: Layout, check_on: Case | None) -> Case:
        tensors = (4 * heads + 4 * groups) if backward else (2 * heads + 2 * groups)
        return Case(
            name=f"{layout.name} {'backward' if backward else 'forward'}",
            shape={**layout.sizes, "N": heads, "G": groups, "D": width},
            dtype=dtype,
            flop=layout.flop(backward, heads, width),
            bytes=float(dtype.itemsize * layout.num_tokens * width * tensors),
            inputs=lambda device: _inputs(layout, *sizes, dtype, device),
            exact=lambda x: exact(_in_fp64(x)),
            # bf16's rounding of inputs and outputs, spec of the kernels; fp32's where the reference is what we offer.
            tolerances=(8e-3,) * 3 if backward else (4e-3,),
            runs=runs,
            check_on=check_on,
        )

    return sized(layout, sized(small, None))


def cases(device: torch.device) -> list[Case]:
    """The smallest first."""
    if device.type == "cpu":
        sizes, dtype = (4, 2, 32), torch.float32
        ours: dict[str, Attend] = {"reference": _ours}
        every: dict[str, Attend] = {}
        plain: dict[str, Attend] = {"SDPA": _sdpa}
        rows = [
            (causal(1024), causal(150), ours | plain),
            (packed(2048, 8), packed(150, 5), ours),
            (shared_prompt(512, 64, 8), shared_prompt(70, 13, 3), {**ours, "unshared": Unshared()}),
            (detached(768, 256), detached(90, 41), {**ours, "all gradients": _all_gradients}),
        ]
    else:
        sizes, dtype = (32, 8, 128), torch.bfloat16
        ours = {"kernel": _ours, "reference": _reference}
        every = {"FlexAttention": Flex()}
        plain = {"SDPA": _sdpa, "SDPA cuDNN": _cudnn}
        sequences: dict[str, Attend] = {"varlen": _varlen}
        if installed("flash_attn"):
            sequences["flash-attn 2"] = _flash_2
        own = {"kernel": _ours}
        rows = [
            (causal(4096), causal(700), ours | every | plain | sequences),  # the only one with the reference: others take it seconds
            (causal(32_768), causal(700), own | every | plain | sequences),
            (packed(32_768, 12), packed(700, 5), own | every | sequences),
            (shared_prompt(16_384, 2048, 8), shared_prompt(301, 67, 3), {**own, **every, "unshared": Unshared()}),
            (detached(98_304, 32_768), detached(301, 299), {**own, "all gradients": _all_gradients}),
        ]
    return [_case(layout, small, attends, sizes, dtype, backward) for layout, small, attends in rows for backward in (False, True)]


SUBJECT = Subject(name="attention", about="packed attention, forward and backward", cases=cases)

if __name__ == "__main__":
    main(SUBJECT)
