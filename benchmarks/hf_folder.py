"""Peak host memory of import and export of a Hugging Face folder, against the largest shard.

    python benchmarks/hf_folder.py [--megabytes 512] [--dtype float32 bfloat16]

Two tensor-parallel ranks with the real trainer. A rank's shard is what it holds of the model; its peak is the shard and the most by
which the process grew meanwhile (VmHWM, reset before). For `tandem export`, one process that holds no model at all, the peak is the
growth alone, and the shard the largest safetensors file that it writes. Every tensor that comes out must equal the one that went in.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tandem.engine.trainer  # noqa: F401  before megatron
from benchmarks.swap import large_model
from tandem.engine.checkpoint.disk import STATE, find_latest
from tandem.engine.checkpoint.hf_folder import export_hf, load_hf_weights, read_hf_config, write_hf_config, write_model
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.checkpoint.safetensors_folder import SafetensorsWriter, open_safetensors
from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer.layers import DTYPES
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.stored import stored_weights
from tests.ranks import run_ranks

SHARD_BYTES = 256 << 20  # of one safetensors file


def memory(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


@contextmanager
def watched(found: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds, and the most by which this process grew."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held now
    before, started = memory("VmRSS"), time.perf_counter()
    yield
    found[f"{name}_s"], found[f"{name}_growth"] = time.perf_counter() - started, memory("VmHWM") - before


def write_random(folder: Path, megabytes: int, dtype: torch.dtype) -> None:
    folder.mkdir()
    model = large_model(megabytes, torch.float32.itemsize)
    tensors = NameMap(model).tensors(dtype)
    writer = SafetensorsWriter(folder, tensors, SHARD_BYTES)
    write_hf_config(folder, model, dtype)
    writer.write_index()
    for file in range(writer.num_files):
        writer.create(file)
    for meta in tensors:
        writer.write(meta.name, torch.randn(meta.shape).to(dtype))


def in_and_out(source: Path, folder: Path, config: TrainerConfig) -> dict[str, Any]:
    """One rank of two: import, export, and a checkpoint for `tandem export`."""
    hf_config = read_hf_config(source)
    trainer = MegatronTrainer(hf_config, build_mesh(MeshConfig(tp=2), hf_config), config, LossConfig(), 1.0, seed=0)
    found: dict[str, Any] = {"held": sum(shard.tensor.numel() * shard.tensor.element_size() for shard in trainer.weight_shards())}
    with watched(found, "import"):
        load_hf_weights(source, trainer)
    with watched(found, "export"):
        export_hf(trainer, folder / "exported", max_shard_bytes=SHARD_BYTES)
    with CheckpointSaver(folder / "checkpoints", keep=1) as saver:
        saver.save(1, trainer.sharded_state_dict())
    return found


def export_alone(source: Path, folder: Path, config: TrainerConfig) -> dict[str, Any]:
    """What `tandem export` does with the weights."""
    hf_config, found = read_hf_config(source), {}
    checkpoint = find_latest(folder / "checkpoints")
    assert checkpoint is not None
    mesh = build_mesh(MeshConfig(), hf_config)
    with watched(found, "export"):
        weights = stored_weights(hf_config, mesh, config, checkpoint[1] / STATE)
        write_model(hf_config, DTYPES[config.dtype], weights, folder / "alone", max_shard_bytes=SHARD_BYTES)
    return found


def check_equal(first: Path, second: Path) -> None:
    with open_safetensors(first) as one, open_safetensors(second) as other:
        assert one.shapes == other.shapes
        for name, shape in one.shapes.items():
            region = tuple((0, extent) for extent in shape)
            assert torch.equal(one.read(name, region), other.read(name, region)), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the model's weights in float32, in MiB")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root).stdout.strip()
    versions = f"torch {torch.__version__}, commit {commit}, load average {os.getloadavg()[0]:.1f}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    print("| what | dtype | shard bytes | growth bytes | peak / shard | seconds |")
    print("|---|---|---|---|---|---|")
    for dtype in args.dtype:
        config = TrainerConfig(dtype=dtype)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_random(folder / "source", args.megabytes, DTYPES[dtype])
            ranks = run_ranks(in_and_out, 2, folder / "source", folder, config, timeout_s=600)
            alone = run_ranks(export_alone, 1, folder / "source", folder, config, timeout_s=600)[0]
            largest = max(file.stat().st_size for file in (folder / "alone").glob("*.safetensors"))
            check_equal(folder / "source", folder / "exported")
            check_equal(folder / "source", folder / "alone")
        rows = [
            (what, ranks[0]["held"], max(rank[f"{what}_growth"] for rank in ranks), ranks[0][f"{what}_s"]) for what in ("import", "export")
        ]
        for what, shard, growth, seconds in [*rows, ("tandem export", largest, alone["export_growth"], alone["export_s"])]:
            ratio = (growth if what == "tandem export" else shard + growth) / shard
            print(f"| {what} | {dtype} | {shard:,} | {growth:,} | {ratio:.2f} | {seconds:.2f} |")
            row = {"subject": "hf_folder", "what": what, "dtype": dtype, "model": f"{args.megabytes} MiB in float32", "shard_bytes": shard}
            print(json.dumps(row | {"growth_bytes": growth, "ratio": ratio, "seconds": seconds, "commit": commit}))


if __name__ == "__main__":
    main()
