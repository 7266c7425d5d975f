"""A model that takes weights in the ways of SGLang's: cut, fused, transposed, padded. It does not compute."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

PADDING = 8  # rows of the embedding that no token has


class ShardedModel(torch.nn.Module):
    """Process `index` of `tp` that share a model of these tensors (of a tiny Qwen3). Parameters start as NaN.

    With `derives`, `post_load_weights` computes something of a parameter.
    """

    model_norm_weight: torch.nn.Parameter
    extra: torch.nn.Parameter  # that a test adds
    kept_aside: Any

    def __init__(self, tensors: Mapping[str, torch.Tensor], index: int = 0, tp: int = 1, *, derives: bool = False) -> None:
        super().__init__()
        self.index, self.tp = index, tp
        sizes: dict[str, list[int]] = {}
        for name, tensor in tensors.items():
            shape = list(tensor.shape)
            kind = name.split(".")[-2]
            if kind in ("o_proj", "down_proj"):
                shape[1] //= tp
            elif tensor.ndim == 2:
                shape[0] //= tp
            sizes.setdefault(self._fused(name)[0], [0, *shape[1:]])[0] += shape[0]
        self._places = {name: self._fused(name)[0].replace(".", "_") for name in tensors}
        sizes["model.embed_tokens.weight"][0] += PADDING
        for name, shape in sizes.items():
            shape = shape[::-1] if "gate_up" in name else shape
            parameter = torch.nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
            self.register_parameter(name.replace(".", "_"), parameter)
        self.derived: torch.Tensor | None = None
        if not derives:
            self.post_load_weights = None  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def _fused(name: str) -> tuple[str, int]:
        """The parameter that holds a tensor, and its turn among those that it holds."""
        for fused, parts in (("qkv", ("q_proj", "k_proj", "v_proj")), ("gate_up", ("gate_proj", "up_proj"))):
            for turn, part in enumerate(parts):
                if part in name:
                    return name.replace(part, fused), turn
        return name, 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        waiting: dict[str, dict[int, torch.Tensor]] = {}
        for name, tensor in weights:
            fused, turn = self._fused(name)
            parameter = parameters[fused.replace(".", "_")]
            dim = 1 if name.split(".")[-2] in ("o_proj", "down_proj") else 0
            rows = tensor.shape[dim] // self.tp if tensor.ndim == 2 else tensor.shape[0]
            part = tensor.narrow(dim, self.index * rows, rows) if tensor.ndim == 2 else tensor
            if "embed" in name:
                parameter[:rows].data.copy_(part)
                parameter[rows:].data.fill_(0)
            elif "gate_up" in fused:  # joined first, then transposed
                both = waiting.setdefault(fused, {})
                both[turn] = part
                if len(both) == 2:
                    parameter.data.copy_(torch.cat([both[0], both[1]], dim=0).transpose(0, 1))
            elif "qkv" in fused:
                keys = (parameter.shape[0] - rows) // 2 if turn == 0 else rows
                start = (0, parameter.shape[0] - 2 * keys, parameter.shape[0] - keys)[turn]
                parameter.data.narrow(0, start, rows).copy_(part)
            else:
                parameter.data.copy_(part.to(parameter.dtype))
        if self.post_load_weights is not None:
            self.post_load_weights()

    def post_load_weights(self) -> None:  # pyright: ignore[reportRedeclaration]
        computed = self.model_norm_weight * 2
        self.derived = computed if self.derived is None else self.derived.copy_(computed)

    def equals(self, other: "ShardedModel") -> bool:
        ours, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        return same and (self.derived is None or other.derived is None or torch.equal(self.derived, other.derived))


def loaded(tensors: Mapping[str, torch.Tensor], index: int = 0, tp: int = 1, *, derives: bool = False) -> ShardedModel:
    """The model after it has loaded the tensors by itself."""
    model = ShardedModel(tensors, index, tp, derives=derives)
    with torch.no_grad():
        model.load_weights(tensors.items())
    return model
