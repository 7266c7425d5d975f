"""Kernels as operators of torch, so that its own checks (`torch.library.opcheck`), tracing and fake tensors know them.

`torch.library.custom_op` would do the same, but imports torch's compiler at the first call: more than a second in every rank.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "tandem"


class Operator:
    """A function of tensors, numbers and strings, registered as tandem::NAME. It must not change its inputs or return one of them."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = f"{NAMESPACE}::{name}"
        torch.library.define(self._name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(self._name, ("cpu", "cuda"))(function)
        self.overload: Any = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def register_fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the same arguments that makes empty outputs."""
        return torch.library.register_fake(self._name, shapes)

    def register_autograd(self, gradients: Callable[..., Any], *, keep: Callable[..., Any]) -> None:
        """`keep(ctx, inputs, output)` saves what `gradients(ctx, *gradients of the outputs)` needs."""
        torch.library.register_autograd(self._name, gradients, setup_context=keep)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator. The function's annotations are its schema."""
    return lambda function: Operator(name, function)
