"""The trainer's state as storages: what leaves the device while the rollout engine has it, and comes back.

    begin_sleep   gradients are dropped (every step begins by clearing them), the optimizer's state is on its way to the host
    end_sleep     the optimizer's state is gone, and the parameters follow
    wake          all of it is back, bit for bit, in the storages that it had

Host memory is one arena of exactly so many bytes (arena.py). What stays on the device: the rotary frequencies and, in bytes, nothing else
that grows with the model; AdamW's step counts are on the host anyway.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from tandem.engine.trainer.arena import HostArena
from tandem.engine.trainer.optimizer import parts_of
from tandem.engine.types import DeviceMemoryError

GRADIENTS, OPTIMIZER, PARAMETERS = "gradients", "optimizer", "parameters"
ADVICE = (
    "lower rollout.sglang.memory_fraction or swap.bucket_bytes, divide the model over more ranks (mesh.tp, mesh.pp, "
    "trainer.distributed_optimizer), or end other processes on this GPU"
)


class TrainerMemory:
    """Moves one trainer's state. Not for use by several threads. A method that fails leaves every value in one place or the other."""

    def __init__(self, chunks: Sequence[Any], optimizer: Any, device: torch.device) -> None:
        """
        Args:
            chunks: Megatron's DistributedDataParallel of every pipeline chunk.
            optimizer: as Megatron built it, its state filled.
            device: what the state lies on while the trainer is awake.
        """
        self._chunks, self._optimizer, self._device = chunks, optimizer, device
        self._storages: dict[str, list[torch.UntypedStorage]] = {}  # by group; known while any of them is gone
        self._sizes: dict[int, int] = {}  # of every storage, by its address as an object
        self._slots: dict[int, int] = {}  # of the arena, likewise
        self._arena: HostArena | None = None
        self._gone: set[str] = set()
        self._copied: torch.cuda.Event | None = None  # the optimizer's state is on its way

    @property
    def is_awake(self) -> bool:
        """Whether all of the trainer's state is on the device."""
        return not self._gone

    @property
    def resident_bytes(self) -> int:
        """Bytes of the trainer's storages on the device: parameters, gradients, master weights and moments."""
        groups = self._storages if self._gone else self._find()
        return sum(storage.nbytes() for storages in groups.values() for storage in storages)

    @property
    def arena_bytes(self) -> int:
        """Bytes of host memory for the state; 0 before it first left."""
        return self._arena.num_bytes if self._arena is not None else 0

    def check_awake(self, what: str) -> None:
        """Raise RuntimeError if any of the state is not on the device: reading it there would read address 0."""
        if self._gone:
            gone = " and ".join(sorted(self._gone))
            raise RuntimeError(f"{what} while the trainer sleeps: its {gone} left the device for the rollout engine; leave `serving` first")

    def begin_sleep(self) -> None:
        """Drop the gradients, and let the optimizer's state begin to leave. Returns at once where a GPU copies by itself.

        Raises: MemoryError if the host has too little memory; nothing has then changed.
        """
        if self._gone or self._copied is not None:
            return
        self._storages = self._find()
        if not all(storage.resizable() for storages in self._storages.values() for storage in storages):
            raise RuntimeError(
                "the trainer cannot sleep: a tensor of its state was given to NumPy, and torch never lets go of such memory; copy it first "
                "(tensor.clone().numpy())"
            )
        self._make_arena()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # whatever still reads them, on whichever stream
        parallel_state.get_global_memory_buffer().buffer.clear()  # gathered activations, which Megatron keeps
        self._free(GRADIENTS)
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                self._copy_out(OPTIMIZER)
                self._copied = torch.cuda.Event()
                self._copied.record(stream)
        else:
            self._copy_out(OPTIMIZER)
            self._free(OPTIMIZER)
        self._return_cache()

    def sleep_optimizer(self) -> None:
        """Wait until the optimizer's state has left."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
            self._free(OPTIMIZER)
            self._return_cache()

    def end_sleep(self) -> None:
        """Wait until all of the state has left. Parameters that were brought back leave again."""
        self.begin_sleep()
        self.sleep_optimizer()
        if PARAMETERS not in self._gone:
            self._copy_out(PARAMETERS)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._free(PARAMETERS)
            self._return_cache()

    def wake_parameters(self) -> None:
        """Bring back the parameters alone, for a swap. Raises: as `wake`."""
        if PARAMETERS in self._gone:
            self._bring_back((PARAMETERS,))

    def wake(self) -> None:
        """Bring everything back.

        Raises: DeviceMemoryError if the device has no room. The trainer then sleeps as before, and may be woken again.
        """
        self.sleep_optimizer()
        self._bring_back(tuple(group for group in (PARAMETERS, OPTIMIZER, GRADIENTS) if group in self._gone))

    @contextlib.contextmanager
    def read_on_host(self) -> Iterator[None]:
        """A block in which tensors whose storage has left are their copies on the host, so that a checkpoint can be made of them.

        Views that are made in the block stay valid until the trainer next falls asleep.
        """
        self.sleep_optimizer()
        kept = [(tensor, tensor.data) for tensor in self._tensors_gone()]
        try:
            for tensor, data in kept:
                assert self._arena is not None
                tensor.data = self._arena.view(self._slots[data.untyped_storage()._cdata], data)
            yield
        finally:
            for tensor, data in kept:
                tensor.data = data

    # What there is

    def _tensors(self) -> dict[str, list[torch.Tensor]]:
        """Every tensor of every group; several may share a storage."""
        modules = [tensor for chunk in self._chunks for tensor in chunk.parameters()]
        modules += [tensor for chunk in self._chunks for _, tensor in chunk.named_buffers()]
        buffers = [buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]  # Megatron's
        mains, states = [], []
        for part in parts_of(self._optimizer):
            mains += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
            states += [
                value
                for state in part.optimizer.state.values()
                for name, value in state.items()
                if torch.is_tensor(value) and name != "step"
            ]
        gradients = [buffer.grad_data for buffer in buffers]
        # Those of float32 shards are views of the same buffers, and no leaves.
        gradients += [tensor.grad for tensor in (*modules, *mains) if tensor.is_leaf and tensor.grad is not None]
        parameters = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
        # The first that names a storage has it: master weights of a float32 model are its parameters.
        return {GRADIENTS: gradients, PARAMETERS: [*modules, *parameters], OPTIMIZER: [*states, *mains]}

    def _find(self) -> dict[str, list[torch.UntypedStorage]]:
        """The storages of every group on the device, each once."""
        seen: set[int] = set()
        found: dict[str, list[torch.UntypedStorage]] = {}
        for group, tensors in self._tensors().items():
            found[group] = []
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage._cdata not in seen and storage.nbytes() and tensor.device.type == self._device.type:
                    seen.add(storage._cdata)
                    found[group].append(storage)
        return found

    def _tensors_gone(self) -> Iterable[torch.Tensor]:
        groups = self._tensors() if self._gone else {}
        away = {storage._cdata for group in self._gone for storage in self._storages[group]}
        unique = {id(tensor): tensor for group in (PARAMETERS, OPTIMIZER) for tensor in groups.get(group, ())}
        return [tensor for tensor in unique.values() if tensor.untyped_storage()._cdata in away]

    # Moving

    def _make_arena(self) -> None:
        """One arena for all that is kept, with a slot for each storage; made again only if the sizes are others."""
        kept = [*self._storages[OPTIMIZER], *self._storages[PARAMETERS]]
        sizes = tuple(storage.nbytes() for storage in kept)
        if self._arena is None or self._arena.sizes != sizes:
            self._arena = None  # the one before goes first
            self._arena = HostArena(sizes, is_page_locked=self._device.type == "cuda")
        self._slots = {storage._cdata: slot for slot, storage in enumerate(kept)}
        self._sizes = {storage._cdata: storage.nbytes() for storages in self._storages.values() for storage in storages}

    def _copy_out(self, group: str) -> None:
        assert self._arena is not None
        for storage in self._storages[group]:
            self._arena.slot(self._slots[storage._cdata]).copy_(self._bytes_of(storage), non_blocking=True)

    def _free(self, group: str) -> None:
        for storage in self._storages[group]:
            storage.resize_(0)
        self._gone.add(group)

    def _bring_back(self, groups: Sequence[str]) -> None:
        """Refill storages, or none of these groups."""
        if not groups:
            return
        arena, done = self._arena, []
        assert arena is not None
        try:
            for group in groups:
                for storage in self._storages[group]:
                    done.append(storage)
                    self._grow(storage, group)
                    if group == GRADIENTS:
                        self._bytes_of(storage).zero_()
                    else:
                        self._bytes_of(storage).copy_(arena.slot(self._slots[storage._cdata]), non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except BaseException:
            for storage in done:  # the host still has what they held
                storage.resize_(0)
            self._return_cache()
            raise
        self._gone -= set(groups)

    def _grow(self, storage: torch.UntypedStorage, group: str) -> None:
        wanted = self._sizes[storage._cdata]
        try:
            storage.resize_(wanted)
        except RuntimeError as error:
            whole = sum(self._sizes[other._cdata] for gone in self._gone for other in self._storages[gone])
            raise DeviceMemoryError(
                f"the trainer cannot wake: {wanted:,} bytes of its {group}, of {whole:,} that are to return to {self._device}, were "
                f"refused ({str(error).splitlines()[0]}); its state is whole in host memory. {ADVICE[0].upper()}{ADVICE[1:]}"
            ) from error

    def _bytes_of(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)  # pyright: ignore[reportArgumentType]

    def _return_cache(self) -> None:
        """What PyTorch's allocator keeps for itself is no use to another process."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
