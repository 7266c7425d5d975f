"""The trainer's state leaves the device and comes back, against the rate between host and device that the same run measures.

    python benchmarks/sleep.py [--gib 12] [--repeats 5] [--device cuda] [--out DIR] [--quick]

One rank, a dense model with random weights: bf16 with fp32 master weights and moments on a GPU, fp32 on a CPU. "out" is from the first
call until nothing of the state is on the device, "back" until all of it is there again; freeing and allocating count. Gradients are dropped
and cleared, and not among the bytes. The floor copies as many bytes between one block on the device and one of the same kind of host
memory (page-locked; on a CPU memcpy in its place). Sleep and copies alternate. Afterwards every value must be what it was.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tandem.engine.trainer  # noqa: F401  before megatron
from benchmarks.harness import describe
from benchmarks.results import Row, append_rows
from benchmarks.train_step import TINY, Shape, fill
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer.arena import HostArena
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.memory import OPTIMIZER, PARAMETERS
from tandem.engine.trainer.mesh import build_mesh

# Layers of a Qwen3-4B, and small ones for a CPU; their number makes the size.
LAYERS = {
    "cuda": Shape(name="dense", layers=0, hidden=2560, heads=32, kv_heads=8, head=128, ffn=9728, vocab=32_768),
    "cpu": Shape(name="dense", layers=0, hidden=1024, heads=8, kv_heads=2, head=128, ffn=3072, vocab=8192),
}
STATE_BYTES = {"cuda": 2 + 3 * 4, "cpu": 3 * 4}  # of a parameter: itself, master weight where it is bf16, two moments
BLOCK_BYTES = 4 << 30  # most that the floor's copies hold at a time


def shape_of(num_bytes: int, device: str) -> Shape:
    """Layers of about so much state, and at least one."""
    of = LAYERS[device]
    matrices = of.hidden * (2 * of.heads + 2 * of.kv_heads) * of.head + 3 * of.hidden * of.ffn
    return replace(of, layers=max(1, round((num_bytes / STATE_BYTES[device] - of.hidden * of.vocab) / matrices)))


class Floor:
    """Plain copies of as many bytes, both ways."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        block = min(num_bytes, BLOCK_BYTES)
        self.times, self.rest = divmod(num_bytes, block)
        self.on_host = HostArena([block], is_page_locked=device.type == "cuda").slot(0)
        self.on_device = torch.ones(block, dtype=torch.uint8, device=device)

    def copy(self, *, out: bool) -> None:
        target, source = (self.on_host, self.on_device) if out else (self.on_device, self.on_host)
        for _ in range(self.times):
            target.copy_(source, non_blocking=True)
        target[: self.rest].copy_(source[: self.rest], non_blocking=True)


def timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fingerprints(trainer: MegatronTrainer) -> list[int]:
    """Of every storage that the arena keeps: the exact sum of its 32-bit words."""
    memory = trainer.memory
    groups = memory._find()
    sums = []
    for storage in (*groups[PARAMETERS], *groups[OPTIMIZER]):
        data = memory._bytes_of(storage)
        sums.append(int(data[: len(data) // 4 * 4].view(torch.int32).sum(dtype=torch.int64)))
    return sums


def measure(args: argparse.Namespace, device: torch.device) -> list[Row]:
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    shape = TINY if args.quick else shape_of(int(args.gib * (1 << 30)), device.type)
    mesh = build_mesh(MeshConfig(), shape.hf_config())
    trainer = MegatronTrainer(shape.hf_config(), mesh, TrainerConfig(dtype=dtype), LossConfig(), 1.0, seed=None)
    fill(trainer)
    memory = trainer.memory
    before, whole = fingerprints(trainer), memory.resident_bytes
    memory.end_sleep()  # allocates the host's memory
    assert memory.resident_bytes == 0, memory.resident_bytes
    memory.wake()
    floor = Floor(memory.arena_bytes, device)
    times: dict[str, list[float]] = {"out": [], "back": [], "out floor": [], "back floor": []}
    for _ in range(args.repeats + 1):
        times["out"].append(timed(memory.end_sleep, device))
        times["back"].append(timed(memory.wake, device))
        times["out floor"].append(timed(lambda: floor.copy(out=True), device))
        times["back floor"].append(timed(lambda: floor.copy(out=False), device))
    if fingerprints(trainer) != before or memory.resident_bytes != whole:
        sys.exit("error: the state that came back is not the one that left")
    about = describe(device, args.commit) | {"resident_bytes_awake": whole, "host_bytes": memory.arena_bytes}
    return [_row(name, shape, dtype, memory.arena_bytes, times[name][1:], times[f"{name} floor"][1:], about) for name in ("out", "back")]


def _row(name: str, shape: Shape, dtype: str, num_bytes: int, took_s: Sequence[float], floor_s: Sequence[float], about: dict) -> Row:
    tenths = statistics.quantiles(took_s, n=10, method="inclusive") if len(took_s) > 1 else took_s
    return Row(
        subject="sleep",
        case=name,
        shape={"L": shape.layers, "H": shape.hidden, "V": shape.vocab},
        dtype=dtype,
        run="kernel" if dtype == "bfloat16" else "reference",
        ours=True,
        median_s=statistics.median(took_s),
        p10_s=tenths[0],
        p90_s=tenths[-1],
        repeats=len(took_s),
        bytes=num_bytes,
        floor_s=statistics.median(floor_s),
        device=about,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--gib", type=float, help="of optimizer state and parameters; default 12 on a GPU, 1 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for sleep.jsonl, which is appended to")
    parser.add_argument("--commit", default="", help="what to record where git cannot tell")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two repeats: does it work?")
    args = parser.parse_args()
    args.gib = args.gib if args.gib is not None else (12.0 if args.device == "cuda" else 1.0)
    args.repeats = 2 if args.quick else args.repeats
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":
            torch.cuda.set_device(0)
            device = torch.device("cuda", 0)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        rows = measure(args, device)
        dist.destroy_process_group()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        append_rows(args.out / "sleep.jsonl", rows)
    print(", ".join(f"{name} {value}" for name, value in rows[0].device.items()))
    print("| state | direction | GiB | s (10th–90th percentile) | GB/s | floor GB/s | of the floor |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| L={row.shape['L']} H={row.shape['H']} {row.dtype} | {row.case} | {row.bytes / 2**30:.2f} "
            f"| {row.median_s:.3f} ({row.p10_s:.3f}–{row.p90_s:.3f}) | {row.bytes / row.median_s / 1e9:.1f} "
            f"| {row.bytes / row.floor_s / 1e9:.1f} | {row.floor_s / row.median_s:.0%} |"
        )


if __name__ == "__main__":
    main()
