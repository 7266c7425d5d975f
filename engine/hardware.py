"""What this machine has, and what follows from it for a run. Works without a GPU, a driver or Linux."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml
import torch

from tandem.engine.config import RunConfig

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that PyTorch can use."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One node, as this process may use it."""

    cpu: str
    num_cores: int  # the smaller of the CPU affinity and the container's quota
    memory_bytes: int  # the smaller of the machine's and the container's limit
    gpus: tuple[Gpu, ...]
    ranks_per_node: int
    unusable_gpus: str = ""  # why GPUs that the driver knows are not in `gpus`


def describe_hardware(*, ranks_per_node: int = 1, root: Path = Path("/")) -> Hardware:
    """Look at this machine. Initialises CUDA where there is a GPU: fork before, not after.

    Args:
        ranks_per_node: how many ranks share the machine.
        root: where /proc and /sys are found.
    """
    gpus, unusable = _gpus()
    quota_cores, limit_bytes = _container_limits(root)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Hardware(
        cpu=_cpu_model(root),
        num_cores=max(1, min(cores, int(quota_cores)) if quota_cores is not None else cores),
        memory_bytes=min(psutil.virtual_memory().total, limit_bytes or 1 << 62),
        gpus=gpus,
        ranks_per_node=ranks_per_node,
        unusable_gpus=unusable,
    )


def explain(hardware: Hardware, config: RunConfig) -> list[str]:
    """Lines for people: what was found, what the run does with it, and warnings."""
    ranks = hardware.ranks_per_node
    threads = max(1, hardware.num_cores // ranks)
    lines = [f"Found: {_summary(hardware)}."]
    if hardware.gpus:
        lines.append(f"Ranks: {ranks} on this node, one GPU each, collectives over NCCL.")
    else:
        lines.append(f"Ranks: {ranks} on this node on the CPU, {threads} {_plural(threads, 'thread')} each, collectives over gloo.")
    tp = config.rollout.tp
    lines.append(f"Weights: {config.trainer.dtype}. Rollout: the {config.rollout.engine} engine, {tp} {_plural(tp, 'rank')} to an engine.")
    return lines + [f"Warning: {warning}" for warning in _warnings(hardware, config)]


def _warnings(hardware: Hardware, config: RunConfig) -> list[str]:
    ranks, dtype = hardware.ranks_per_node, config.trainer.dtype
    warnings = []
    if hardware.unusable_gpus:
        warnings.append(hardware.unusable_gpus)
    if hardware.gpus and ranks > len(hardware.gpus):
        warnings.append(
            f"{ranks} ranks share {len(hardware.gpus)} GPUs, and NCCL wants one each; start {len(hardware.gpus)} ranks on this node."
        )
    if not hardware.gpus and ranks > hardware.num_cores:
        warnings.append(f"{ranks} ranks share {hardware.num_cores} cores and will wait for each other; start at most {hardware.num_cores}.")
    if hardware.gpus and dtype == "float32":
        warnings.append("float32 on a GPU takes twice the memory of bfloat16 and is many times slower; set trainer.dtype to bfloat16.")
    if not hardware.gpus and dtype == "bfloat16":
        warnings.append(
            "bfloat16 on a CPU is fast only with AMX or AVX512-BF16, and its rollout log-probs differ more; float32 is the safe choice."
        )
    return warnings


def _summary(hardware: Hardware) -> str:
    kinds = sorted({(gpu.name, gpu.memory_bytes) for gpu in hardware.gpus})
    counts = [(sum((gpu.name, gpu.memory_bytes) == kind for gpu in hardware.gpus), *kind) for kind in kinds]
    gpus = ", ".join(f"{count} x {name} ({_size(memory)})" for count, name, memory in counts) or "no GPU"
    cores = f"{hardware.num_cores} usable {_plural(hardware.num_cores, 'core')}"
    return f"{hardware.cpu}, {cores}, {_size(hardware.memory_bytes)} of memory, {gpus}"


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that PyTorch can use, and why those that only the driver knows cannot be used."""
    num_usable = torch.cuda.device_count()
    if num_usable:
        properties = [torch.cuda.get_device_properties(index) for index in range(num_usable)]
        return tuple(Gpu(name=p.name, memory_bytes=p.total_memory) for p in properties), ""
    try:
        pynvml.nvmlInit()
        num_present = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no driver, no GPU
        return (), ""
    if num_present == 0:
        return (), ""
    if torch.version.cuda is None:
        return (
            (),
            f"{num_present} GPUs are here, but this PyTorch ({torch.__version__}) is built for CPUs; install one with CUDA to use them.",
        )
    return (), f"{num_present} GPUs are here, but PyTorch may use none of them; is CUDA_VISIBLE_DEVICES empty?"


def _container_limits(root: Path) -> tuple[float | None, int | None]:
    """Cores and bytes of memory that a control group grants (version 2, then 1); None where it sets no limit."""
    cores = memory = None
    if quota := _words(root / "sys/fs/cgroup/cpu.max"):
        cores = None if quota[0] == "max" else int(quota[0]) / int(quota[1])
    elif (quota := _words(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")) and int(quota[0]) > 0:
        cores = int(quota[0]) / int(_words(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")[0])
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = _words(root / "sys/fs/cgroup" / name)
        if limit and limit[0] != "max":
            memory = int(limit[0])
            break
    return cores, memory


def _cpu_model(root: Path) -> str:
    cpuinfo = root / "proc/cpuinfo"
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= GB else f"{num_bytes / 1e6:.1f} MB"
