"""The block-scaled form of a matrix, for use within Triton kernels: the formula of the package, bit for bit."""

import torch
import triton
import triton.language as tl

from tandem.kernels.backend import architecture


def casts_in_hardware(tensor: torch.Tensor) -> bool:
    """Whether the chip that kernels on this tensor run on has an instruction for e4m3 (compute capability 8.9)."""
    found = architecture(tensor)
    return isinstance(found, int) and found >= 89  # the interpreter's own cast is wrong


@triton.jit
def block_scale(amax):
    """fp32 scale of a block whose largest |element| is amax, in fp32; NaN stays NaN."""
    scale = tl.div_rn(amax, 448.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def largest_magnitude(block):
    """Largest |element| of an fp32 tensor, NaN if there is one: as integers, the bits of positive floats have the same order."""
    bits = block.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.ravel(bits.to(tl.int32)), 0).to(tl.float32, bitcast=True)


@triton.jit
def encode(block, scale, HARDWARE: tl.constexpr):
    """The e4m3 bit patterns (uint8) of fp32 elements of blocks with these scales."""
    x = block * tl.div_rn(1.0, scale)
    if HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    magnitude = tl.minimum(magnitude, 0x43E00000)  # 448
    # Down to 2^-6 three of 23 mantissa bits stay, and the exponent's bias becomes 7 instead of 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below it are multiples of 2^-9: what lies between two floats from 2^14 on.
    rounded = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = rounded.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (tl.where(is_nan, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.uint8)
