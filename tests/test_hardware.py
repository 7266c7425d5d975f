"""What is found on a machine, and what is said about it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from tandem.engine.config import RunConfig, TrainerConfig
from tandem.engine.hardware import Gpu, Hardware, describe_hardware, explain

CPU = Hardware(cpu="A CPU", num_cores=4, memory_bytes=16 * 10**9, gpus=(), ranks_per_node=2)
GPUS = dataclasses.replace(CPU, gpus=(Gpu(name="H200", memory_bytes=141 * 10**9),) * 2)
RUN = RunConfig(name="x")
BF16 = RunConfig(name="x", trainer=TrainerConfig(dtype="bfloat16"))


def warnings(hardware: Hardware, config: RunConfig) -> list[str]:
    return [line for line in explain(hardware, config) if line.startswith("Warning:")]


def test_this_machine_can_be_described() -> None:
    hardware = describe_hardware(ranks_per_node=2)
    assert hardware.cpu
    assert hardware.num_cores >= 1
    assert hardware.memory_bytes > 10**8
    assert hardware.ranks_per_node == 2
    assert len(hardware.gpus) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("files", "cores", "memory_bytes"),
    [
        ({"cpu.max": "100000 100000", "memory.max": "1000000"}, 1, 1_000_000),
        ({"cpu.max": "50000 100000", "memory.max": "1000000"}, 1, 1_000_000),  # half a core still runs one thread
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "5000"}, 1, 5000),
    ],
)
def test_a_container_gets_what_its_control_group_grants(tmp_path: Path, files: dict[str, str], cores: int, memory_bytes: int) -> None:
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    hardware = describe_hardware(root=tmp_path)
    assert (hardware.num_cores, hardware.memory_bytes) == (cores, memory_bytes)


def test_a_group_without_limits_grants_the_machine(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("max\n")
    here = describe_hardware()
    there = describe_hardware(root=tmp_path)
    assert there.num_cores >= here.num_cores
    assert there.memory_bytes >= here.memory_bytes


def test_a_gpu_that_this_pytorch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    for name, result in (("nvmlInit", None), ("nvmlDeviceGetCount", 8), ("nvmlShutdown", None)):
        monkeypatch.setattr(pynvml, name, lambda result=result: result)
    hardware = describe_hardware()
    assert hardware.gpus == ()
    assert any("8 GPUs are here" in line and "built for CPUs" in line for line in warnings(hardware, RUN))


def test_a_cpu_run_is_explained() -> None:
    text = "\n".join(explain(CPU, RUN))
    for part in ("A CPU, 4 usable cores, 16.0 GB of memory, no GPU", "2 threads each", "gloo"):
        assert part in text
    assert warnings(CPU, RUN) == []


def test_a_gpu_run_is_explained() -> None:
    text = "\n".join(explain(GPUS, BF16))
    for part in ("2 x H200 (141.0 GB)", "one GPU each", "NCCL"):
        assert part in text
    assert warnings(GPUS, BF16) == []


@pytest.mark.parametrize(
    ("hardware", "config", "warning"),
    [
        (dataclasses.replace(CPU, ranks_per_node=8), RUN, "8 ranks share 4 cores"),
        (dataclasses.replace(GPUS, ranks_per_node=4), BF16, "4 ranks share 2 GPUs"),
        (GPUS, RUN, "set trainer.dtype to bfloat16"),
        (CPU, BF16, "float32 is the safe choice"),
    ],
)
def test_what_will_go_wrong_is_said_before(hardware: Hardware, config: RunConfig, warning: str) -> None:
    [line] = warnings(hardware, config)
    assert warning in line


def test_gpus_are_listed_as_pytorch_numbers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = [SimpleNamespace(name=name, total_memory=80 * 10**9) for name in ("A", "A", "B")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    hardware = describe_hardware()
    assert [gpu.name for gpu in hardware.gpus] == ["A", "A", "B"]
    assert "2 x A (80.0 GB), 1 x B (80.0 GB)" in explain(hardware, BF16)[0]
