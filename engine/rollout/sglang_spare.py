"""The parameters of SGLang's model, a spare of each, and the exchange of the two.

Two choices are made once, for the device. *Kept*: on a CPU the spare stays, for filling its page tables anew would take longer than a
swap; on a GPU its memory is needed by the KV cache while SGLang generates, so it exists from `prepare` to `settle` only. *By pointer*: on
a CPU the parameters are given the spare's memory; CUDA graphs know the addresses of parameters, so on a GPU the contents change places,
through a small buffer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from tandem.engine.types import WeightTransferError

_BOUNCE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Holding:
    """How the spare is held: see above."""

    kept: bool
    by_pointer: bool

    @classmethod
    def of(cls, model: torch.nn.Module, targets: Mapping[str, torch.Tensor]) -> Self:
        """The choice for a model whose loaded parameters are `targets`."""
        on_cpu = all(target.device.type == "cpu" for target in targets.values())
        return cls(kept=on_cpu, by_pointer=on_cpu and not _aliases(model, targets))


class Parameters:
    """`serving` are the memories that SGLang computes with, `spare` the others; each flat, in the order of `targets`."""

    def __init__(self, model: torch.nn.Module, targets: Mapping[str, torch.Tensor], holding: Holding) -> None:
        self.holding = holding
        self.names = list(targets)
        self._targets = list(targets.values())
        self._owners = [_owners(model, target) for target in self._targets]
        self.serving = [_flat(target) for target in self._targets]
        self.spare = [self._spare_of(flat) for flat in self.serving]
        self._bounce = torch.empty(0 if holding.by_pointer else _BOUNCE_BYTES, dtype=torch.uint8, device=self.serving[0].device)

    def _spare_of(self, flat: torch.Tensor) -> torch.Tensor:
        spare = torch.empty_like(flat)
        if not self.holding.kept:
            spare.untyped_storage().resize_(0)  # one by one: there may not be room for all
        return spare

    @property
    def num_bytes(self) -> int:
        """Of one set."""
        return sum(flat.nbytes for flat in self.serving)

    @property
    def are_in_place(self) -> bool:
        """Whether SGLang still computes with `serving`; it may have replaced a parameter."""
        return all(
            (owner := registry.get(name)) is not None and owner.data_ptr() == flat.data_ptr() and owner.shape == target.shape
            for flat, target, owners in zip(self.serving, self._targets, self._owners, strict=True)
            for registry, name in owners
        )

    def allocate(self) -> None:
        """Give the spare memory, if it has none. Raises: WeightTransferError if there is too little; it then has none."""
        if self.holding.kept:
            return
        try:
            for flat in self.spare:
                flat.untyped_storage().resize_(flat.nbytes)
        except RuntimeError as error:
            self.release()
            needed = f"{self.num_bytes / 2**30:.2f} GiB for a second copy of its weights"
            raise WeightTransferError(f"SGLang's process has no room for {needed} during a swap ({error})") from error

    def release(self) -> None:
        """Give the spare's memory back, unless it is kept. Views of it stay valid for the next `allocate`."""
        if self.holding.kept:
            return
        for flat in self.spare:
            flat.untyped_storage().resize_(0)
        if self._bounce.is_cuda:
            torch.cuda.empty_cache()

    @torch.no_grad()
    def exchange(self) -> None:
        """Let spare and serving change places, all or none. The spare of a failed exchange has no meaning."""
        if self.holding.by_pointer:
            try:
                self._point_to(self.spare)
            except BaseException:
                self._point_to(self.serving)
                raise
            self.serving, self.spare = self.spare, self.serving
            return
        done: list[tuple[torch.Tensor, torch.Tensor]] = []
        for ours, theirs in self._chunks():
            try:
                self._swap(ours, theirs)
            except BaseException:
                for earlier in reversed(done):
                    self._swap(*earlier)
                raise
            done.append((ours, theirs))
        if self._bounce.is_cuda:
            torch.cuda.synchronize(self._bounce.device)

    def _point_to(self, memories: list[torch.Tensor]) -> None:
        for target, owners, flat in zip(self._targets, self._owners, memories, strict=True):
            for registry, name in owners:
                registry[name].data = torch.as_strided(flat, target.shape, target.stride(), flat.storage_offset())

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for serving, spare in zip(self.serving, self.spare, strict=True):
            yield from zip(serving.view(torch.uint8).split(_BOUNCE_BYTES), spare.view(torch.uint8).split(_BOUNCE_BYTES), strict=True)

    def _swap(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        before = self._bounce[: ours.numel()]
        before.copy_(ours)
        try:
            ours.copy_(theirs)
            theirs.copy_(before)
        except BaseException:
            ours.copy_(before)
            raise


def _flat(target: torch.Tensor) -> torch.Tensor:
    """The memory of a target without gaps, in its own order."""
    return torch.as_strided(target, (target.numel(),), (1,))


def _owners(model: torch.nn.Module, target: torch.Tensor) -> list[tuple[dict[str, Any], str]]:
    """Where modules keep what lies at the target's place, parameter or buffer, under whatever names."""
    place = target.data_ptr(), target.shape, target.stride()
    return [
        (registry, name)
        for module in model.modules()
        for registry in (module._parameters, module._buffers)
        for name, tensor in registry.items()
        if tensor is not None and (tensor.data_ptr(), tensor.shape, tensor.stride()) == place
    ]


def _aliases(model: torch.nn.Module, targets: Mapping[str, torch.Tensor]) -> bool:
    """Whether a module also holds a target as something else than a parameter or buffer, which new pointers would not reach."""
    storages = {target.untyped_storage()._cdata for target in targets.values()}

    def tensors_in(value: object, depth: int = 0) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple, set)) and depth < 3:
            for item in value:
                yield from tensors_in(item, depth + 1)
        elif isinstance(value, dict) and depth < 3:
            yield from tensors_in(list(value.values()), depth)

    attributes = (value for module in model.modules() for name, value in vars(module).items() if name not in ("_parameters", "_buffers"))
    return any(tensor.untyped_storage()._cdata in storages for value in attributes for tensor in tensors_in(value))
