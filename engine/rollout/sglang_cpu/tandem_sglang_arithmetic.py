"""SGLang's float32 on a CPU rounded as the trainer's is: its products and rotations are those of the embedded engine.

Some tokens' log-probs are so sensitive to rounding that float32 leaves them 2e-5 nats from fp64, the trainer's as much as SGLang's. Two
implementations that add in different orders are then as far from each other; rounded alike, they differ by the last bit of a log-prob.
SGLang's norms, activations and log-softmax are rounded so as they are. Its experts are not, and stay as they are; so do other dtypes.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from tandem.engine.rollout import products
from tandem.engine.rollout.products import ROW_MULTIPLE

Function = Callable[..., Any]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias for x [..., in] of any number of rows, weight [out, in]."""
    if not x.dtype == weight.dtype == torch.float32:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    missing = -len(rows) % ROW_MULTIPLE
    out = products.linear(F.pad(rows, (0, 0, 0, missing)) if missing else rows, weight)[: len(rows)]
    return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)


# Replaces torch.nn.functional where SGLang computes its linear layers.
functional = SimpleNamespace(**vars(F) | {"linear": linear})


def head(compute: Function) -> Function:
    """Replaces LogitsProcessor._compute_lm_head."""

    def run(processor: Any, hidden: torch.Tensor, lm_head: Any, embedding_bias: torch.Tensor | None = None, **rest: Any) -> torch.Tensor:
        weight = getattr(lm_head, "weight", None)
        if weight is not None and hidden.dtype == weight.dtype == torch.float32:
            return linear(hidden, weight)
        return compute(processor, hidden, lm_head, embedding_bias, **rest)

    return run


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """Replaces apply_rotary_emb: x [tokens, heads, width], cos and sin [tokens, width / 2]; the pairs are x's halves, or neighbours."""
    cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in (cos, sin))
    first, second = x.chunk(2, dim=-1) if is_neox_style else (x[..., ::2], x[..., 1::2])
    rotated = torch.mul(first, cos).addcmul_(second, sin, value=-1), torch.mul(second, cos).addcmul_(first, sin)
    return torch.cat(rotated, dim=-1) if is_neox_style else torch.stack(rotated, dim=-1).flatten(-2)
