"""How much memory is in use: of this rank's GPU as NVML tells it, of the machine, and by the trainer's own tensors."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import psutil
import pynvml
import torch

from tandem.engine.checkpoint.engine_side import Resident


class Holder(Protocol):
    """What tells of the trainer's bytes: `TrainerMemory`."""

    @property
    def resident_bytes(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...


class MemoryMeter:
    """One per rank. What other processes have of the GPU when it is made was there before the run, and not counted as the run's.

    Args:
        on_gpu: whether this rank has a GPU, torch's current device.
    Raises: RuntimeError if NVML does not know the GPU.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self.trainer: Holder | None = None  # once there is one
        self._process = psutil.Process()
        self._gpu: Any = _handle() if on_gpu else None
        self._before = 0
        if on_gpu:
            used, _, own = self._read_gpu()
            self._before = max(0, used - own)

    def read(self) -> Resident:
        """What is in use now. Takes well under a millisecond."""
        trainer_bytes = self.trainer.resident_bytes if self.trainer is not None else 0
        arena_bytes = self.trainer.arena_bytes if self.trainer is not None else 0
        if self._gpu is None:
            return Resident(trainer_bytes=trainer_bytes, process_bytes=self._process.memory_info().rss, arena_bytes=arena_bytes)
        used, free, own = self._read_gpu()
        return Resident(
            trainer_bytes=trainer_bytes,
            process_bytes=own,
            arena_bytes=arena_bytes,
            device_bytes=used,
            free_bytes=free,
            others_bytes=max(0, used - own - self._before),
        )

    def _read_gpu(self) -> tuple[int, int, int]:
        """Bytes in use, bytes free, and this process's. What the driver keeps for itself is neither in use nor free."""
        info: Any = pynvml.nvmlDeviceGetMemoryInfo(self._gpu, version=pynvml.nvmlMemory_v2)
        own = own_bytes(pynvml.nvmlDeviceGetComputeRunningProcesses(self._gpu), os.getpid())
        return int(info.used), int(info.free), torch.cuda.memory_reserved() if own is None else own


def own_bytes(processes: Sequence[Any], pid: int) -> int | None:
    """A process's part of a GPU, of NVML's list. None where NVML does not tell processes apart: in a container it may know them by other
    numbers, or list no bytes. What PyTorch has reserved, which lacks the contexts, then stands for it.
    """
    found = [process.usedGpuMemory for process in processes if process.pid == pid]
    return None if not found or any(size is None for size in found) else sum(map(int, found))


def memory_metrics(ranks: Sequence[Mapping[str, Resident]]) -> dict[str, int]:
    """For each phase the most that any rank had: `memory/PHASE/trainer_bytes` and so on."""
    most: dict[str, int] = {}
    for phases in ranks:
        for phase, found in phases.items():
            for field in Resident.__slots__:
                value = getattr(found, field)
                if value is not None:
                    name = f"memory/{phase}/{field}"
                    most[name] = max(value, most.get(name, 0))
    return most


def _handle() -> Any:
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        raise RuntimeError(
            f"NVML does not know GPU {uuid}, whose memory is to be measured ({error}); is the driver's libnvidia-ml visible?"
        ) from error
