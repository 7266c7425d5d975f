"""The trainer's state as tensors that any layout of the ranks can load: weights, the optimizer's, and the generators of random numbers.

Every moment and master weight is kept under the name of its parameter and with the parameter's place in the whole tensor, so that nothing
in a checkpoint tells how many ranks wrote it. A rank of the distributed optimizer holds a run of a parameter's elements that begins and
ends anywhere. Such a run is a few rectangles of the tensor, and these are saved as they lie in memory: nothing is gathered or copied.

Loading writes into the trainer's own tensors, so that it needs no memory beside them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from tandem.engine.trainer.optimizer import parts_of

MOMENTS = ("exp_avg", "exp_avg_sq")
Rectangle = tuple[tuple[int, ...], tuple[int, ...], int]  # offset, shape, and how many elements of the run lie before it


def rectangles(shape: Sequence[int], start: int, stop: int, before: int = 0) -> Iterator[Rectangle]:
    """Cut elements [start, stop) of a row-major tensor into rectangles; at most 2n - 1 of n dimensions."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,), before) if shape else ((), (), before)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        for offset, size, at in rectangles(shape[1:], start % row, start % row + stop - start, before):
            yield (last, *offset), (1, *size), at
        return
    for offset, size, at in rectangles(shape[1:], start - (first - 1) * row, row if start < first * row else 0, before):
        yield (first - 1, *offset), (1, *size), at
    before += first * row - start
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]), before
    for offset, size, at in rectangles(shape[1:], 0, stop - last * row, before + (last - first) * row):
        yield (last, *offset), (1, *size), at


def sharded_optimizer(optimizer: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    """Moments and master weights for `dist_checkpointing`, and the number of steps done.

    Args:
        model: the sharded state of this rank's chunks, whose data are the live parameters.
    Returns: {"step": int, "tensors": list of ShardedTensors whose data are the optimizer's live tensors}.
    """
    places = {id(place.data): place for place in nested_values(dict(model)) if isinstance(place, ShardedTensor | ShardedTensorFactory)}
    tensors, steps = [], {0}
    for part in parts_of(optimizer):
        for parameter, start, stop, values in _held(part):
            place, is_alone = places[id(parameter)], isinstance(part, DistributedOptimizer)
            for name, value in values.items():
                tensors += cut(place, start, stop, value, prefix=f"optimizer.{name}.", is_alone=is_alone)
        steps.add(_num_steps(part.optimizer))
    assert len(steps) <= 2, f"the parts of the optimizer have done {steps} steps"
    return {"step": max(steps), "tensors": tensors}


def hold_values(state: Mapping[str, Any]) -> None:
    """Let a sharded state hold tensors of its own on the present memory, whatever the trainer's then move to."""
    for place in nested_values(dict(state)):
        if isinstance(place, ShardedTensor) and place.data is not None:
            place.data = place.data.detach()


def set_num_steps(optimizer: Any, num_steps: int) -> None:
    """How many steps the moments are of: what Adam corrects their bias by."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = num_steps
            for parameter in group["params"]:
                step = part.optimizer.state[parameter].get("step")
                if torch.is_tensor(step):  # each parameter has its own: a shared one would be counted up by each of them
                    step.fill_(num_steps)


def _num_steps(optimizer: torch.optim.Optimizer) -> int:
    """torch's AdamW counts for each parameter, the fused ones for each group."""
    counts = {int(group["step"]) for group in optimizer.param_groups if "step" in group and group["params"]}
    counts |= {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1, f"the optimizer's parameters have done {counts} steps"
    return counts.pop() if counts else 0


def _held(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, int, dict[str, torch.Tensor]]]:
    """Every parameter of which this rank has optimizer state: elements [start, stop) of it, and their tensors.

    The master weights of a float32 parameter are the parameter, and left out.
    """
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, index) in part.model_param_group_index_map.items():
            main = part.optimizer.param_groups[group]["params"][index]
            held = part._get_model_param_range_map(parameter)["param"]
            yield parameter, held.start, held.end, _values(part.optimizer, parameter, main)
        return
    pairs = [(parameter, parameter) for group in part.optimizer.param_groups for parameter in group["params"]]
    if isinstance(part, Float16OptimizerWithFloat16Params):
        groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        pairs = [pair for models, mains in groups for pair in zip(models, mains, strict=True)]
        pairs += [(parameter, parameter) for group in part.fp32_from_fp32_groups for parameter in group]
    for parameter, main in pairs:
        yield parameter, 0, parameter.numel(), _values(part.optimizer, parameter, main)


def _values(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, main: torch.Tensor) -> dict[str, torch.Tensor]:
    values = {name: optimizer.state[main][name] for name in MOMENTS}
    return values if parameter.dtype == main.dtype else values | {"master": main.detach()}


def cut(
    place: ShardedTensor | ShardedTensorFactory, start: int, stop: int, value: torch.Tensor, *, prefix: str = "", is_alone: bool = False
) -> Iterator[ShardedTensor]:
    """`value`, the elements [start, stop) of a local parameter, as rectangles of the whole tensor, off the grid of the ranks.

    Args:
        place: of the parameter, as its model's sharded_state_dict() has it.
        prefix: put before the parameter's name.
        is_alone: no other data-parallel rank holds these elements.
    """
    # A factory cuts the parameter further (gate and up): what it makes of a tensor without memory shows where.
    pieces: Any = [place]
    if isinstance(place, ShardedTensorFactory):
        blank = torch.empty(place.data.shape, dtype=value.dtype, device="meta")
        pieces = list(nested_values({"pieces": place.build_fn(place.key, blank, place.replica_id, None)}))
    flat = value.view(-1)
    for piece in pieces:
        assert piece.data.is_contiguous(), piece
        begin = piece.data.storage_offset() if piece is not place else 0
        shape, prepended = tuple(piece.local_shape), piece.prepend_axis_num
        low, high = max(start, begin), min(stop, begin + math.prod(shape))
        for offset, size, before in rectangles(shape, low - begin, high - begin):
            at = low - start + before
            local_shape = (1,) * prepended + size
            whole_offset = [a + b for a, b in zip(piece.global_offset, (*[0] * prepended, *offset), strict=True)]
            yield ShardedTensor(
                key=f"{prefix}{piece.key}",
                data=flat[at : at + math.prod(size)].view(local_shape),
                dtype=value.dtype,
                local_shape=local_shape,
                global_shape=tuple(piece.global_shape),
                global_offset=tuple(whole_offset),
                axis_fragmentations=None,  # not a grid
                replica_id=(*piece.replica_id[:2], 0) if is_alone else piece.replica_id,
            )


def random_state() -> dict[str, Any]:
    """This rank's generators: torch's, the GPU's, and those that Megatron switches between."""
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    tracked: Mapping[str, torch.Tensor] = tracker.get_states()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "tracked": {name: value.clone() for name, value in tracked.items()}}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take over what `random_state` gave on a rank of the same number."""
    torch.set_rng_state(state["torch"])
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states(dict(state["tracked"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
