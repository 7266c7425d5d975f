"""Which elements of which Hugging Face tensors SGLang copies to which places of its parameters, learned from one call of `load_weights`.

The call gets tensors without memory (device meta), and every operation on them and on the model's parameters passes by here: a copy to a
parameter is noted instead of done, so nothing is moved, and what the model serves stays as it is. All that fuses, cuts and transposes
amounts to strided copies. What else a model computes from loaded tensors is not one; it is named, and loaded in another way
(sglang_whole.py). What it computes from its *parameters* once they are loaded is done by its `post_load_weights`, after every commit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tandem.engine.rollout.strided import StridedCopy, View, first_gap, normal, part_of, read_through
from tandem.engine.types import TensorMeta, WeightTransferError

_ATEN = torch.ops.aten
_SAME_ELEMENTS = {_ATEN.clone.default, _ATEN._to_copy.default}
_FILLS = {_ATEN.fill_.Scalar, _ATEN.zero_.default}


class UntraceableError(Exception):
    """The model does something else with its tensors than copying them."""


@dataclass(frozen=True, slots=True)
class TracedCopy:
    """Elements of the tensor `name`, which is row-major, go to elements of target `target`: two views of one shape."""

    name: str
    target: int
    source: View
    destination: View

    @property
    def copy(self) -> StridedCopy:
        return normal(self.source, self.destination)


@dataclass(frozen=True, slots=True)
class TracedFill:
    """Elements of target `target` that get a constant: padding."""

    target: int
    view: View
    value: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What one process of SGLang takes of a model.

    `targets` are the parameters (and buffers) that are loaded, each once, under its first name; views of a target count from its first
    element. Together, copies and fills write every element of every target exactly once.
    """

    targets: dict[str, torch.Tensor]
    copies: tuple[TracedCopy, ...]
    fills: tuple[TracedFill, ...]
    computes_more: bool  # whether the model made something else of its parameters: `post_load_weights` must run after a commit


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor without memory that was made from others: boxes of it, each with the view of a source that it shows."""

    tensor: torch.Tensor
    parts: tuple[tuple[View, str, View], ...]


def trace_load(model: torch.nn.Module, tensors: Iterable[TensorMeta]) -> Trace:
    """Trace `model.load_weights` of these tensors.

    Raises: WeightTransferError naming a parameter that no tensor fills; UntraceableError where it does not only copy; what
        `load_weights` raises.
    """
    sources = {meta.name: torch.empty(meta.shape, dtype=meta.dtype, device="meta") for meta in tensors}
    targets = _targets(model)
    watch = _Watch(sources, targets)
    with torch.no_grad(), watch:
        model.load_weights(iter(list(sources.items())))  # pyright: ignore[reportCallIssue]
    if watch.computes_more and not hasattr(model, "post_load_weights"):
        raise UntraceableError("it computes with its parameters as it loads them, and has no post_load_weights")
    parameters = {_place(parameter) for parameter in model.parameters()}
    used = {copy.target for copy in watch.copies} | {index for index, target in enumerate(targets.values()) if _place(target) in parameters}
    trace = Trace(targets, tuple(dict.fromkeys(watch.copies)), tuple(dict.fromkeys(watch.fills)), watch.computes_more)
    _check_complete(trace, used)
    return _only(trace, used)


def _targets(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that share their place once. Raises: UntraceableError if some overlap otherwise."""
    found: dict[tuple[int, ...], tuple[str, torch.Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.numel():
            found.setdefault(_place(tensor), (name, tensor.data))
    ends: dict[int, tuple[int, str]] = {}
    for name, tensor in sorted(found.values(), key=lambda item: item[1].storage_offset()):
        view = _view(tensor)
        end, before = ends.get(_storage(tensor), (0, ""))
        if view.start < end:
            raise UntraceableError(f"{name} and {before} overlap in memory")
        if view.stop - view.start != view.num_elements:
            raise UntraceableError(f"{name} has gaps between its elements: shape {view.shape}, strides {view.stride}")
        ends[_storage(tensor)] = view.stop, name
    return dict(found.values())


def _check_complete(trace: Trace, used: set[int]) -> None:
    for index, (name, target) in enumerate(trace.targets.items()):
        if index not in used:
            continue
        views = [_sorted(copy.destination) for copy in trace.copies if copy.target == index]
        views += [fill.view for fill in trace.fills if fill.target == index]
        gap = first_gap(views, target.numel())
        if gap is not None and gap[1]:
            raise UntraceableError(f"several tensors are written to the same elements of {name}, the first is {gap[0]}")
        if gap is not None:
            where = "" if not views else f" (from element {gap[0]} of {target.numel()} on)"
            raise WeightTransferError(f"no tensor fills SGLang's parameter {name}{where}")


def _only(trace: Trace, used: set[int]) -> Trace:
    """The trace with the targets that are loaded."""
    number = {old: new for new, old in enumerate(sorted(used))}
    return Trace(
        {name: target for index, (name, target) in enumerate(trace.targets.items()) if index in used},
        tuple(replace(copy, target=number[copy.target]) for copy in trace.copies),
        tuple(replace(fill, target=number[fill.target]) for fill in trace.fills if fill.target in used),
        trace.computes_more,
    )


class _Watch(TorchDispatchMode):
    """Sees every operation of this thread. Tensors are known by their memory, so views need no care."""

    def __init__(self, sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._sources = {_storage(tensor): (name, tensor) for name, tensor in sources.items()}
        self._made: dict[int, _Made] = {}
        self._names = list(targets)
        self._targets: dict[int, list[tuple[int, View]]] = {}
        for index, target in enumerate(targets.values()):
            self._targets.setdefault(_storage(target), []).append((index, _view(target)))
        self.copies: list[TracedCopy] = []
        self.fills: list[TracedFill] = []
        self.computes_more = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is _ATEN.copy_.default and self._is_target(args[0]):
            return self._copy(args[0], args[1])
        if func in _FILLS and self._is_target(args[0]):
            index, view = self._target(args[0])
            self.fills.append(TracedFill(index, _sorted(view), float(args[1]) if len(args) > 1 else 0.0))
            return args[0]
        of_sources = any(self._is_source(tensor) for tensor in tensors)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor)
            if writes and (self._is_target(value) or of_sources):
                raise UntraceableError(f"it loads with {func}")
        if of_sources:
            return self._from_sources(func, args, kwargs)
        result = func(*args, **kwargs)
        known = {_storage(tensor) for tensor in tensors if self._is_target(tensor)}
        if known and any(_storage(leaf) not in known for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            self.computes_more = True
        return result

    def _is_source(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._sources or _storage(tensor) in self._made

    def _is_target(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._targets

    def _target(self, tensor: torch.Tensor) -> tuple[int, View]:
        """Which target a view is of, and where it lies in it."""
        view = _view(tensor)
        for index, whole in self._targets[_storage(tensor)]:
            if whole.start <= view.start and view.stop <= whole.stop:
                return index, view._replace(start=view.start - whole.start)
        raise UntraceableError(f"it writes a view with shape {view.shape} that is of no single parameter")

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        index, to = self._target(target)
        if not self._is_source(source):
            raise UntraceableError(f"it writes to {self._names[index]} what is no part of a tensor")
        if not target.numel():
            return target
        for name, part, view in self._resolve(source.expand(target.shape)):
            copy = TracedCopy(name, index, view, part_of(to, part))
            try:
                normal(copy.source, copy.destination)
            except ValueError as error:
                raise UntraceableError(f"{name} to {self._names[index]}: {error}") from error
            self.copies.append(copy)
        return target

    def _resolve(self, tensor: torch.Tensor) -> list[tuple[str, tuple[slice, ...], View]]:
        """The sources that a tensor shows: name, the part of the tensor that shows it, the view of the source."""
        view = _view(tensor)
        if _storage(tensor) in self._sources:
            return [(self._sources[_storage(tensor)][0], tuple(slice(0, size) for size in view.shape), view)]
        made = self._made[_storage(tensor)]
        try:
            return [
                (name, part, seen) for box, name, source in made.parts for seen, part in read_through(view, box, made.tensor.shape, source)
            ]
        except ValueError as error:
            raise UntraceableError(str(error)) from error

    def _from_sources(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Views pass; what is made by copying is remembered; the rest cannot be traced."""
        if func in _SAME_ELEMENTS:
            kwargs = kwargs | {"memory_format": torch.contiguous_format}
            kwargs |= {"device": torch.device("meta")} if func is _ATEN._to_copy.default else {}
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            raise UntraceableError(f"{func} of a tensor without memory: {error}") from error
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            if self._is_source(tensor):
                continue
            if func in _SAME_ELEMENTS:
                self._note(tensor, [(args[0], 0, 0)])
            elif func is _ATEN.cat.default:
                dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % tensor.ndim
                sizes = [part.shape[dim] for part in args[0]]
                self._note(tensor, [(part, dim, sum(sizes[:i])) for i, part in enumerate(args[0])])
            else:
                raise UntraceableError(f"it computes {func} of the tensors that it loads")
        return result

    def _note(self, made: torch.Tensor, parts: Sequence[tuple[torch.Tensor, int, int]]) -> None:
        """`made` holds every part whole, from `offset` on along `dim`."""
        boxes: list[tuple[View, str, View]] = []
        for tensor, dim, offset in parts:
            if not self._is_source(tensor):
                raise UntraceableError("it joins tensors that it loads with others")
            box = _view(made.narrow(dim, offset, tensor.shape[dim])) if made.ndim else _view(made)
            boxes += [(part_of(box, part), name, view) for name, part, view in self._resolve(tensor)]
        self._made[_storage(made)] = _Made(made, tuple(boxes))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: torch.Tensor) -> tuple[int, ...]:
    return _storage(tensor), int(tensor.storage_offset()), *tensor.shape, *tensor.stride()


def _view(tensor: torch.Tensor) -> View:
    return View(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _sorted(view: View) -> View:
    """The view without dimensions of size 1, with the largest step first."""
    return normal(view, view).source
