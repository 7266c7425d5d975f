"""Rotary embedding in Triton: one program turns all heads of a token, with the angles read once. Shapes as in the package."""
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl

HEADS_PER_TILE = 16
ELEMENTS_PER_WARP = 256  # 16 bytes of 16-bit numbers a thread: with more warps a tile of few heads is read in smaller pieces


@triton.jit
def _rotate_kernel(
    x, cos, sin, out, token_stride, head_stride, N, HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    c = tl.load(cos + token * HALF + column, mask=column < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0)[None, :]
    if BACK:
        s = -s
    for start in range(0, N, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head[:, None] < N) & (column[None, :] < HALF)
        read = x + token * token_stride + head[:, None] * head_stride + column[None, :]
        first = tl.load(read, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(read + HALF, mask=inside, other=0.0).to(tl.float32)
        write = out + (token * N + head[:, None]) * (2 * HALF) + column[None, :]
        tl.store(write, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
        tl.store(write + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def rotate(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor, *, back: bool) -> torch.Tensor:
    """[T, N, D]; `back` turns the other way."""
    if x_TND.stride(-1) != 1:
        x_TND = x_TND.contiguous()
    num_tokens, num_heads, width = x_TND.shape
    out_TND = torch.empty((num_tokens, num_heads, width), dtype=x_TND.dtype, device=x_TND.device)
    heads, padded = min(HEADS_PER_TILE, triton.next_power_of_2(num_heads)), triton.next_power_of_2(width // 2)
    if out_TND.numel():
        _rotate_kernel[(num_tokens,)](
            x_TND,
            cos_T1D.contiguous(),
            sin_T1D.contiguous(),
            out_TND,
            x_TND.stride(0),
            x_TND.stride(1),
            num_heads,
            HALF=width // 2,
            PADDED=padded,
            HEADS=heads,
            BACK=back,
            num_warps=max(1, min(4, heads * padded // ELEMENTS_PER_WARP)),
        )
    return out_TND
