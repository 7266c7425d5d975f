"""Triton's CPU interpreter, made to compute bfloat16: as it is it stores bfloat16 as bit patterns and computes with those (triton 3.7.1).

Import this before any kernel runs. On a machine with a GPU nothing is changed and the kernels run there.
"""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
_Handle: Any = interpreter.TensorHandle
_Builder: Any = interpreter.InterpreterBuilder


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    """The same values in float32; other types are left as they are."""
    if not _is_bf16(handle):
        return handle
    bits = np.asarray(handle.data).astype(np.uint32) << np.uint32(16)
    return _Handle(bits.view(np.float32), tl.float32)


def _narrowed(values: Any) -> Any:
    """float32 to bfloat16 bit patterns, rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return _Handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _teach_bfloat16() -> None:
    plain = {
        name: getattr(_Builder, name) for name in ("binary_op", "unary_op", "create_dot", "create_fma", "cast_impl", "create_fp_to_fp")
    }

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) or _is_bf16(right)):
            return plain["binary_op"](self, left, right, op)
        with np.errstate(all="ignore"):
            out = op(_widened(left).data, _widened(right).data)
        return _Handle(out, left.dtype.scalar) if out.dtype == np.bool_ else _narrowed(out)

    def unary_op(self: Any, value: Any, op: Any) -> Any:
        return _narrowed(op(_widened(value).data)) if _is_bf16(value) else plain["unary_op"](self, value, op)

    def create_dot(self: Any, left: Any, right: Any, total: Any, *rest: Any) -> Any:
        return plain["create_dot"](self, _widened(left), _widened(right), total, *rest)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return plain["create_fma"](self, x, y, z)
        return _narrowed(_widened(x).data * _widened(y).data + _widened(z).data)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            wide = _widened(source)
            return wide if target.scalar == tl.float32 else plain["cast_impl"](self, wide, target)
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return _narrowed(source.data)
        return plain["cast_impl"](self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if _is_bf16(source) and target.scalar == tl.float32:
            return _widened(source)
        nearest = mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32 and nearest:
            return _narrowed(source.data)
        return plain["create_fp_to_fp"](self, source, target, mode)

    for replacement in (binary_op, unary_op, create_dot, create_fma, cast_impl, create_fp_to_fp):
        setattr(_Builder, replacement.__name__, replacement)

    reduce: Any = interpreter.ReduceOps
    plain_sum = reduce.sum

    def reduce_sum(self: Any, value: Any) -> Any:
        if not _is_bf16(value.handle):
            return plain_sum(self, value)
        total = np.sum(_widened(value.handle).data, axis=self.axis, keepdims=self.keep_dims)
        narrow = _narrowed(total).data
        return self.to_tensor(narrow if np.ndim(total) else narrow.item(), value.dtype)

    reduce.sum = reduce_sum


if not HAS_GPU:
    _teach_bfloat16()
