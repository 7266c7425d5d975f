"""Makes the CPU a device that megatron-core 0.16 can train on over gloo.

Megatron is written for CUDA and NCCL: it asks for the current CUDA device, puts tensors on "cuda", orders work by streams, and
gathers pieces of different size, which gloo cannot. Here the CPU answers in their place. `install` changes the torch namespace of the
whole process and does nothing where CUDA is available.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like", "rand", "randn", "randint")


class _Stream:
    """A stream of a device that runs everything in order."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: Any) -> float:
        return 0.0


def install() -> None:
    """Patch torch and megatron-core for a process without CUDA. Calling it again changes nothing."""
    if torch.cuda.is_available() or torch.cuda.Stream is _Stream:
        return
    _import_uncompiled()
    _patch_cuda()
    _patch_factories()
    _patch_tensor()
    _patch_collectives()
    _patch_megatron()


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    cpu, stream = torch.device("cpu"), _Stream()

    def answer(value: Any = None) -> Callable[..., Any]:
        # One function for each name: torch's compiler, which its optimizers import, refuses an object known under two.
        return lambda *_, **__: value

    cuda.current_device = answer(cpu)
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, answer())
    cuda.Stream = cuda.ExternalStream = _Stream
    cuda.Event = _Event
    cuda.current_stream, cuda.default_stream = answer(stream), answer(stream)
    cuda.stream = lambda _: contextlib.nullcontext()
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, answer())
    cuda.nvtx.range = lambda *_, **__: contextlib.nullcontext()
    # The CPU's generator is the device's generator.
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, int) and not isinstance(device, bool))


def _patch_factories() -> None:
    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            kwargs.pop("pin_memory", None)
            return factory(*args, device=torch.device("cpu") if _is_cuda(device) else device, **kwargs)

        return make

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _patch_tensor() -> None:
    tensor: Any = torch.Tensor
    to, type_ = tensor.to, tensor.type

    def patched_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], torch.dtype | torch.Tensor) and _is_cuda(args[0]):
            args = (torch.device("cpu"), *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return to(self, *args, **kwargs)

    def patched_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers ask whether a parameter's type is 'torch.cuda.FloatTensor'.
        return type_(self, *args, **kwargs) if args or kwargs else type_(self).replace("torch.", "torch.cuda.", 1)

    tensor.to, tensor.type = patched_to, patched_type
    tensor.cuda = lambda self, *_, **__: self
    tensor.record_stream = lambda self, _: None


def _patch_collectives() -> None:
    """gloo has no all_gather and reduce_scatter of pieces of different length: pad them to the longest."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def padded(x: torch.Tensor, length: int) -> torch.Tensor:
        return torch.cat([x, x.new_zeros((length - x.shape[0], *x.shape[1:]))])

    def patched_all_gather(outputs: list[torch.Tensor], x: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if all(output.shape == x.shape for output in outputs):
            return all_gather(outputs, x, group=group, async_op=async_op)
        length = max(output.shape[0] for output in outputs)
        whole = [x.new_empty((length, *x.shape[1:])) for _ in outputs]
        all_gather(whole, padded(x, length), group=group)
        for output, piece in zip(outputs, whole, strict=True):
            output.copy_(piece[: output.shape[0]])
        return None

    def patched_reduce_scatter(
        output: torch.Tensor, inputs: list[torch.Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({x.shape for x in inputs}) == 1:
            return reduce_scatter(output, inputs, op=op, group=group, async_op=async_op)
        length = max(x.shape[0] for x in inputs)
        whole = output.new_empty((length, *output.shape[1:]))
        reduce_scatter(whole, [padded(x, length) for x in inputs], op=op, group=group)
        output.copy_(whole[: output.shape[0]])
        return None

    dist.all_gather, dist.reduce_scatter = patched_all_gather, patched_reduce_scatter  # pyright: ignore[reportAttributeAccessIssue]


def _import_uncompiled() -> None:
    """Import megatron-core while its decorators, which compile, leave functions as they are (and torch's compiler unimported)."""

    def uncompiled(function: Any = None, **_: Any) -> Any:
        return function if function is not None else lambda later: later

    compile_ = torch.compile
    torch.compile = uncompiled  # pyright: ignore[reportAttributeAccessIssue]
    try:
        import megatron.core.distributed
        import megatron.core.jit
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
    finally:
        torch.compile = compile_
    megatron.core.jit.disable_jit_fuser()


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    rng_any: Any = rng
    rng_any._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng_any._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # Recomputation saves and restores "both" generators, which are one here.
    logging.getLogger(rng.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    def maybe_move_tensor_to_cpu(x: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The original turns split sizes into NumPy only when it moves them from a GPU.
        return x.numpy() if as_numpy and torch.is_tensor(x) else x

    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # pyright: ignore[reportAttributeAccessIssue]
