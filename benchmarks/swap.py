"""Time of a weight swap against a plain memory copy of the same bytes, side by side.

    python benchmarks/swap.py [--megabytes 512] [--ranks 1 2] [--bucket-kib 4096]

Every rank leads one embedded engine (a child process), as in a run on CPUs; the bytes are what all engines receive together.
Swap and copy alternate, so that both meet the same load of the machine. The copy is one process, one thread, whole tensors
(torch's `copy_`) into memory that was touched before. "first" are the first two swaps: each fills one of the engine's two
copies of the weights for the first time, and the first also starts the engine, plans and opens the shared memory. The engines
verify every checksum before they commit, so a swap that ended moved the right bytes.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tandem.engine.checkpoint.names import NameMap
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.config import RolloutConfig, SwapConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import WeightShard
from tests.ranks import run_ranks

TOY = {
    "model_type": "qwen3",
    "vocab_size": 264,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
}


def large_model(megabytes: int) -> dict[str, Any]:
    """A Qwen3 of about this size in fp32, with the proportions of the 0.6B model."""
    layer_bytes = 4 * (1024 * (2048 + 2 * 1024 + 2048) + 3 * 1024 * 3072)
    layers = max(1, round((megabytes * 2**20 - 4 * 1024 * 8192) / layer_bytes))
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": layers}
    return TOY | sizes | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}


class Source:
    """A whole model in one rank, under Megatron's names and in its layout."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        self.hf_config = hf_config
        self._shards = [WeightShard(name=name, tensor=torch.randn(shape), tp_rank=0, tp_size=1) for name, shape in self._shapes()]

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        sizes = NameMap(self.hf_config).sizes
        hidden, ffn = sizes["hidden"], sizes["ffn"]
        yield "embedding.word_embeddings.weight", (sizes["vocab"], hidden)
        for layer in range(sizes["layers"]):
            name = f"decoder.layers.{layer}."
            yield f"{name}input_layernorm.weight", (hidden,)
            yield f"{name}self_attention.linear_qkv.weight", (sizes["query"] + 2 * sizes["key_value"], hidden)
            yield f"{name}self_attention.q_layernorm.weight", (sizes["head"],)
            yield f"{name}self_attention.k_layernorm.weight", (sizes["head"],)
            yield f"{name}self_attention.linear_proj.weight", (hidden, sizes["query"])
            yield f"{name}pre_mlp_layernorm.weight", (hidden,)
            yield f"{name}mlp.linear_fc1.weight", (2 * ffn, hidden)
            yield f"{name}mlp.linear_fc2.weight", (hidden, ffn)
        yield "decoder.final_layernorm.weight", (hidden,)

    def weight_shards(self) -> list[WeightShard]:
        return self._shards

    def weights_changed(self) -> None: ...


def measure(hf_config: Mapping[str, Any], config: SwapConfig, repeats: int) -> dict[str, Any]:
    """One rank: swaps and copies in turn; the copies are rank 0's, of the bytes of all engines."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    source = Source(hf_config)
    tensors = [shard.tensor for shard in source.weight_shards()]
    copies = [[torch.zeros_like(tensor) for tensor in tensors] for _ in range(num_ranks if rank == 0 else 0)]
    engine = EmbeddedEngine(hf_config, RolloutConfig(), dtype="float32", context_length=128, stop_token_ids=(), num_threads=1)
    assert dist.group.WORLD is not None
    swap = WeightSwap(source, engine, config, control_group=dist.group.WORLD)
    swap_s, copy_s = [], []
    for version in range(repeats + 2):
        dist.barrier()
        start = time.perf_counter()
        with swap.serving(version):
            swap_s.append(time.perf_counter() - start)
        dist.barrier()
        start = time.perf_counter()
        for targets in copies:
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor)
        copy_s.append(time.perf_counter() - start)
    stats = swap.last_stats
    assert stats is not None
    assert engine.policy_version == repeats + 1
    engine.close()
    return {"bytes": stats.num_bytes, "buckets": stats.num_buckets, "first_s": swap_s[:2], "swap_s": swap_s[2:], "copy_s": copy_s[2:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the large model, in MiB")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bucket-kib", type=int, nargs="+", default=[SwapConfig().bucket_bytes >> 10])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root).stdout.strip()
    versions = f"torch {torch.__version__}, commit {commit}, load average {os.getloadavg()[0]:.1f}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    print("| model | ranks | bytes received | buckets | swap ms (min–max) | GB/s | copy ms (min–max) | GB/s | swap / copy | first ms |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for label, model in (("toy", TOY), (f"{args.megabytes} MiB", large_model(args.megabytes))):
        for num_ranks in args.ranks:
            for kib in args.bucket_kib:
                repeats = args.repeats * (3 if label == "toy" else 1)
                found = run_ranks(measure, num_ranks, model, SwapConfig(bucket_bytes=kib << 10), repeats, timeout_s=600)[0]
                swap_s, copy_s = statistics.median(found["swap_s"]), statistics.median(found["copy_s"])
                row = {
                    "subject": "swap",
                    "model": label,
                    "dtype": "float32",
                    "ranks": num_ranks,
                    "bytes": found["bytes"],
                    "bucket_bytes": kib << 10,
                    "buckets": found["buckets"],
                    "swap_s": swap_s,
                    "swap_min_s": min(found["swap_s"]),
                    "swap_max_s": max(found["swap_s"]),
                    "first_s": found["first_s"],
                    "copy_s": copy_s,
                    "copy_min_s": min(found["copy_s"]),
                    "ratio": swap_s / copy_s,
                    "commit": commit,
                }
                cells = [
                    f"{s * 1e3:.2f} ({min(all_s) * 1e3:.2f}–{max(all_s) * 1e3:.2f}) | {found['bytes'] / s / 1e9:.2f}"
                    for s, all_s in ((swap_s, found["swap_s"]), (copy_s, found["copy_s"]))
                ]
                first = ", ".join(f"{s * 1e3:.0f}" for s in found["first_s"])
                size = f"{found['bytes']:,} | {found['buckets']} × {kib} KiB"
                print(f"| {label} | {num_ranks} | {size} | {cells[0]} | {cells[1]} | {swap_s / copy_s:.2f} | {first} |")
                print(json.dumps(row))


if __name__ == "__main__":
    main()
