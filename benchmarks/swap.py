"""Time of a weight swap against a plain memory copy of the same bytes, side by side, and the memory that it takes.

    python benchmarks/swap.py [--engines embedded sglang] [--megabytes 1024] [--dtype bfloat16] [--ranks 1 2] [--bucket-kib 2048]
        [--quantization block_fp8]

Every rank leads one engine: an embedded one (a child process), or a real SGLang server on the CPU (`make sglang`; one rank). The bytes are
what all engines receive together. Swap and copy alternate, so that both meet the same load of the machine. The copy is one process, one
thread, whole tensors (torch's `copy_`) into memory that was touched before. "first" are the first two swaps: each fills one of the
engine's two copies of the weights for the first time, and the first also plans and opens the shared memory. The engines verify every
checksum before they commit, so a swap that ended moved the right bytes.

With --quantization block_fp8 (SGLang), matrices are quantised on their way into the buckets. The copy is still that of the trainer's bytes,
about twice as many: what a swap would be measured by without it.

Where the time of a swap goes: buckets (from the first one's writing to the last one's verifying), commit, and the rest (agreement of the
ranks). "leave" is the switch back. All are in the trace too, as phases.

Memory of rank 0 and of its engine's process that holds the weights:

extra   what a swap needs while it runs, from the third one on: the shared buckets (pages of the memory that they lie in, counted once) and
        the peaks of both processes over what they held before
kept    what the first two swaps left in the trainer's and in the engine's process: the plan, and who copies what. Anonymous memory;
        without the copies of the weights: a second one that SGLang receives into, two of the embedded engine, which starts without any (in
        bfloat16 with its float32 head, of which there is one)
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tandem.engine.buckets import BucketStream
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.config import LogConfig, RolloutConfig, SGLangConfig, SwapConfig
from tandem.engine.log import RunLog
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_server import ServerSetup, SGLangServer
from tandem.engine.rollout_config import Quantization
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


def large_model(megabytes: int, itemsize: int) -> dict[str, Any]:
    """A Qwen3 of about this size, with the proportions of the 0.6B model."""
    layer_bytes = itemsize * (1024 * (2048 + 2 * 1024 + 2048) + 3 * 1024 * 3072)
    layers = max(1, round((megabytes * 2**20 - itemsize * 1024 * 8192) / layer_bytes))
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": layers}
    return TOY | sizes | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}


class Source:
    """A whole model in one rank, under Megatron's names and in its layout."""

    def __init__(self, hf_config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.hf_config = hf_config
        tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in self._shapes()}
        self._shards = [WeightShard(name=name, tensor=tensor, tp_rank=0, tp_size=1) for name, tensor in tensors.items()]

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


class Memory:
    """Of a process."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self._before = 0

    @property
    def anonymous(self) -> int:
        """Bytes that are not pages of files: libraries' code is mapped when it first runs, and no swap's."""
        return self._bytes("smaps_rollup", "Anonymous")

    def watch(self) -> None:
        """Let the peak begin anew."""
        (self._folder / "clear_refs").write_text("5")
        self._before = self._bytes("status", "VmRSS")

    @property
    def growth(self) -> int:
        """Bytes of the peak over what was held when the watch began."""
        return self._bytes("status", "VmHWM") - self._before

    def _bytes(self, file: str, field: str) -> int:
        return int(next(line for line in (self._folder / file).read_text().splitlines() if line.startswith(field)).split()[1]) << 10


def shared_bytes() -> int:
    """What the buckets that this process has open take."""
    opened = list[os.stat_result]()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if link.readlink().name.startswith("memfd:tandem-swap"):
                opened.append(link.stat())
    return sum({status.st_ino: status.st_blocks * 512 for status in opened}.values())


def largest_child(pid: int) -> int:
    """Of all that a process started, the one with the most memory: that which holds the weights."""
    found, waiting = dict[int, int](), [pid]
    while waiting:
        one = waiting.pop()
        pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
        found[one] = pages
        for task in Path(f"/proc/{one}/task").iterdir():
            waiting += map(int, (task / "children").read_text().split())
    return max(found, key=found.__getitem__)


class Timed:
    """An engine whose steps of a swap are timed."""

    def __init__(self, engine: EmbeddedEngine | SGLangEngine) -> None:
        self._engine = engine
        self.commit_s, self.verified_at_s = 0.0, 0.0
        self.prepare, self.load, self.rollback = engine.prepare, engine.load, engine.rollback
        self.revert, self.settle = engine.revert, engine.settle
        if isinstance(engine, SGLangEngine):
            self.wanted_regions = engine.wanted_regions
            self.opens_device_memory = engine.opens_device_memory

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    def receive(self, stream: BucketStream, policy_version: int, *, swap: int, first_ticket: int) -> "Timed":
        self._pending = self._engine.receive(stream, policy_version, swap=swap, first_ticket=first_ticket)
        return self

    def check(self) -> None:
        self._pending.check()

    def wait(self) -> None:
        self._pending.wait()
        self.verified_at_s = time.perf_counter()

    def commit(self) -> None:
        start = time.perf_counter()
        self._engine.commit()
        self.commit_s = time.perf_counter() - start


def start(kind: str, hf_config: Mapping[str, Any], dtype: str, quantization: Quantization | None) -> EmbeddedEngine | SGLangEngine:
    sizes: dict[str, Any] = {"dtype": dtype, "context_length": 128}
    if kind == "embedded":
        return EmbeddedEngine(hf_config, RolloutConfig(), stop_token_ids=(), num_threads=1, **sizes)
    config = SGLangConfig(kv_tokens=1024)
    named = {**hf_config, "architectures": ["Qwen3ForCausalLM"]}
    server = SGLangServer(ServerSetup(hf_config=named, config=config, max_running=4, quantization=quantization, **sizes))
    return SGLangEngine(server, RolloutConfig(engine="sglang", sglang=config), stop_token_ids=(), timeout_s=600.0)


def measure(
    kind: str, hf_config: Mapping[str, Any], dtype: str, quantization: Quantization | None, config: SwapConfig, repeats: int, folder: str
) -> dict[str, Any]:
    """One rank: swaps and copies in turn; the copies are rank 0's, of the bytes of all engines."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    source = Source(hf_config, getattr(torch, dtype))
    tensors = [shard.tensor for shard in source.weight_shards()]
    copies = [[torch.zeros_like(tensor) for tensor in tensors] for _ in range(num_ranks if rank == 0 else 0)]
    engine = start(kind, hf_config, dtype, quantization)
    engine.rollback()  # its process has then started and imported all it needs
    timed = Timed(engine)
    assert dist.group.WORLD is not None
    log = RunLog(Path(folder), rank=rank, num_ranks=num_ranks, config=LogConfig(progress=False, tensorboard=False), num_steps=repeats + 2)
    swap = WeightSwap(source, timed, config, control_group=dist.group.WORLD, quantization=quantization, log=log)
    memories = [Memory(os.getpid()), Memory(largest_child(engine.server.pid if isinstance(engine, SGLangEngine) else engine.pid))]
    kept = [-memory.anonymous for memory in memories]
    spent: dict[str, list[float]] = {name: [] for name in ("swap_s", "copy_s", "buckets_s", "commit_s", "leave_s")}
    digest: str | None = None
    for version in range(repeats + 2):
        dist.barrier()
        started_s = time.perf_counter()
        serving = swap.serving(version)
        serving.__enter__()
        spent["swap_s"].append(time.perf_counter() - started_s)
        spent["buckets_s"].append(timed.verified_at_s - started_s)
        spent["commit_s"].append(timed.commit_s)
        if version == repeats + 1:
            digest = engine.weights_digest
        started_s = time.perf_counter()
        with log.phase("back to training"):
            serving.__exit__(None, None, None)
        spent["leave_s"].append(time.perf_counter() - started_s)
        dist.barrier()
        if version == 1:
            for index, memory in enumerate(memories):
                kept[index] += memory.anonymous
                memory.watch()
        started_s = time.perf_counter()
        for targets in copies:
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor)
        spent["copy_s"].append(time.perf_counter() - started_s)
    stats = swap.last_stats
    assert stats is not None
    assert engine.policy_version == repeats + 1
    assert digest is not None
    kept[1] -= (1 if kind == "sglang" else 2) * stats.num_bytes // num_ranks
    if kind == "embedded" and dtype == "bfloat16":
        kept[1] -= hf_config["vocab_size"] * hf_config["hidden_size"] * 4
    found: dict[str, Any] = {"shared_bytes": shared_bytes(), "kept_bytes": kept}
    found["extra_bytes"] = found["shared_bytes"] + sum(memory.growth for memory in memories)
    swap.close()
    engine.close()
    log.close()
    first = spent["swap_s"][:2]
    found["copied_bytes"] = sum(tensor.nbytes for tensor in tensors) * num_ranks
    return {"bytes": stats.num_bytes, "buckets": stats.num_buckets, "route": stats.route, "first_s": first, **found} | {
        name: seconds[2:] for name, seconds in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["embedded"], choices=["embedded", "sglang"])
    parser.add_argument("--megabytes", type=int, default=512, help="size of the large model, in MiB")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="of embedded engines; SGLang runs with one")
    parser.add_argument("--bucket-kib", type=int, nargs="+", default=[SwapConfig().bucket_bytes >> 10])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--quantization", choices=["block_fp8"], help="of what SGLang receives")
    args = parser.parse_args()
    if args.quantization and args.engines != ["sglang"]:
        parser.error("--quantization needs --engines sglang")
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root).stdout.strip()
    versions = f"torch {torch.__version__}, commit {commit}, load average {os.getloadavg()[0]:.1f}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    print(
        "| engine | model | ranks | bytes received | buckets | swap ms (min–max) | GB/s | copy ms (min–max) | GB/s | swap / copy |", end=""
    )
    print(" of it buckets, commit ms | leave ms | extra memory | kept: trainer, engine | first ms |")
    print("|" + "---|" * 15)
    models = (("toy", TOY), (f"{args.megabytes} MiB", large_model(args.megabytes, getattr(torch, args.dtype).itemsize)))
    for kind in args.engines:
        for label, model in models if kind == "embedded" else models[1:]:
            for num_ranks in args.ranks if kind == "embedded" else [1]:
                for kib in args.bucket_kib:
                    repeats = args.repeats * (3 if label == "toy" else 1)
                    with tempfile.TemporaryDirectory() as folder:
                        of = kind, model, args.dtype, args.quantization, SwapConfig(bucket_bytes=kib << 10), repeats, folder
                        found = run_ranks(measure, num_ranks, *of, timeout_s=1800)[0]
                    dtype = args.quantization or args.dtype
                    report(found, {"model": label, "engine": kind, "dtype": dtype, "ranks": num_ranks, "commit": commit}, kib)


def report(found: Mapping[str, Any], about: Mapping[str, Any], kib: int) -> None:
    """One row of the table, and the same as JSON."""
    median = {name: statistics.median(found[name]) for name in ("swap_s", "copy_s", "buckets_s", "commit_s", "leave_s")}
    row = {
        "subject": "swap",
        **about,
        "route": found["route"],
        "bytes": found["bytes"],
        "copied_bytes": found["copied_bytes"],
        "bucket_bytes": kib << 10,
        "buckets": found["buckets"],
        **median,
        "swap_min_s": min(found["swap_s"]),
        "swap_max_s": max(found["swap_s"]),
        "copy_min_s": min(found["copy_s"]),
        "ratio": median["swap_s"] / median["copy_s"],
        "extra_bytes": found["extra_bytes"],
        "kept_bytes": found["kept_bytes"],
        "first_s": found["first_s"],
    }
    cells = [
        f"{median[name] * 1e3:.2f} ({min(found[name]) * 1e3:.2f}–{max(found[name]) * 1e3:.2f}) | {found[moved] / median[name] / 1e9:.2f}"
        for name, moved in (("swap_s", "bytes"), ("copy_s", "copied_bytes"))
    ]
    split = f"{median['buckets_s'] * 1e3:.1f}, {median['commit_s'] * 1e3:.1f} | {median['leave_s'] * 1e3:.2f}"
    extra = f"{found['extra_bytes'] / 2**20:.2f} MiB = {found['extra_bytes'] / (kib << 10):.2f} buckets"
    extra += " | " + ", ".join(f"{num_bytes / 2**20:.1f} MiB" for num_bytes in found["kept_bytes"])
    first = ", ".join(f"{s * 1e3:.0f}" for s in found["first_s"])
    size = f"{found['bytes']:,} | {found['buckets']} × {kib} KiB"
    left = f"| {about['engine']} | {about['model']} {about['dtype']} | {about['ranks']} | {size}"
    print(f"{left} | {cells[0]} | {cells[1]} | {row['ratio']:.2f} | {split} | {extra} | {first} |")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
