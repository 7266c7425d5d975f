"""Products and norms of rows of activations. To the last bit, what a row gets does not depend on the other rows.

A phase that is generated again after a fault must continue with the same tokens. The libraries' products round a row alike in any number
of rows that is a multiple of ROW_MULTIPLE (measured with 1 to 8 threads on an AMD CPU), and otherwise not: for a few rows they take
paths of their own. Element-wise functions have vector and scalar paths too, so callers keep the number of rows at that multiple throughout.
"""

import torch
import torch.nn.functional as F

ROW_MULTIPLE = 16
# oneDNN's float32 product runs at 2.2 times the speed of MKL's on an AMD CPU (220 against 100 GFLOP/s, one core of Zen 5), but
# spends a millisecond on every shape that it has not seen and remembers 1024.
MAX_ONEDNN_ROWS = 1024
# MKL adds up float32 products in blocks of at most this many, whose size depends on the length of the sum, and oneDNN in one. Sums up to
# it are rounded alike by both, so that log-probs agree with a trainer on MKL.
MKL_BLOCK = 192
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T for x [T, in], weight [out, in]; T a multiple of ROW_MULTIPLE."""
    assert len(x) % ROW_MULTIPLE == 0, len(x)
    if not _HAS_ONEDNN or x.shape[1] > MKL_BLOCK:
        return F.linear(x, weight)
    parts = [torch.ops.mkldnn._linear_pointwise(part, weight, None, "none", [], "") for part in x.split(MAX_ONEDNN_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dim, in float32, rounded to x's type before the weight as the Hugging Face model does."""
    wide = x.float()
    scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale[..., None]).to(x.dtype).mul_(weight)


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The gated feed-forward layer: x [T, hidden], gate_up [2F, hidden], down [hidden, F]."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(F.silu(gate).mul_(up), down)
