"""Kernels as operators of torch, so that its own checks (`torch.library.opcheck`), tracing and fake tensors know them.

`torch.library.custom_op` would do the same, but imports torch's compiler at the first call: more than a second in every rank.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "tandem"


class Operator:
    """A function of tensors, numbers and strings, registered as tandem::NAME. It must not change its inputs or return one of them.

    Its annotations are its schema; those of `*arguments` are the fields of a NamedTuple, `takes`.
    """

    def __init__(self, name: str, function: Callable[..., Any], takes: Any = None) -> None:
        self._name = f"{NAMESPACE}::{name}"
        if takes is not None:
            fields = [
                inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=takes.__annotations__[field])
                for field in takes._fields
            ]
            signature = inspect.Signature(fields, return_annotation=inspect.signature(function).return_annotation)
            function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
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


def operator(name: str, takes: Any = None) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator. The function's annotations are its schema, or those of a NamedTuple of its arguments, `takes`."""
    return lambda function: Operator(name, function, takes)
