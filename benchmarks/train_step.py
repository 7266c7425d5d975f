"""A whole training step of a dense model with random weights through the trainer: model FLOP utilisation and where the time goes.

    python benchmarks/train_step.py [--tokens 32768] [--microbatch 8192] [--recompute none] [--steps 5] [--out DIR] [--quick]

One rank, bf16 on a GPU: policy loss on packed responses, gradients, AdamW. A Qwen3-4B's shape; --quick, and any CPU, takes a tiny one.
Utilisation is the model's FLOP (what is computed again for memory's sake does not count) over the step's time, against the matrix rate
measured here and the one that the maker names. Log-prob and loss are timed from the last norm's output to its gradient.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tandem.engine.trainer  # noqa: F401  before megatron
from benchmarks.harness import describe
from benchmarks.instruments import Rates, Sampler
from benchmarks.results import Row, append_rows
from tandem.engine.algo.pack import Microbatch, TrainingRow, build_microbatch
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh

# Dense bf16 FLOP/s that the maker names.
NOMINAL_FLOP_S = {"H200": 989.4e12, "H100": 989.4e12, "A100": 311.9e12}
LENGTHS = (512, 4096)  # of the responses, prompt included; drawn evenly between


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense Qwen3."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    ffn: int
    vocab: int

    def hf_config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        }

    def flop(self, batches: Sequence[Microbatch]) -> float:
        """Forward and backward: 2 FLOP for each weight of a matrix, three times; the output layer on trained tokens, attention on what is
        visible."""
        matrices = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head + 3 * self.hidden * self.ffn
        tokens = sum(batch.num_tokens for batch in batches)
        trained = sum(int(batch.loss_mask_T.sum()) for batch in batches)
        visible = sum(int((batch.visible_end_S.long() - torch.arange(batch.num_tokens)).sum()) for batch in batches)
        products = tokens * self.layers * matrices + trained * self.hidden * self.vocab
        return 6.0 * (products + visible * self.layers * 2 * self.heads * self.head)


DENSE_4B = Shape(name="dense 4B", layers=36, hidden=2560, heads=32, kv_heads=8, head=128, ffn=9728, vocab=151_936)
TINY = Shape(name="tiny", layers=2, hidden=64, heads=4, kv_heads=2, head=16, ffn=160, vocab=512)


def rows(num_tokens: int, lengths: tuple[int, int], vocab: int) -> list[TrainingRow]:
    """Responses of random lengths that take `num_tokens` positions together; an eighth of each is its prompt."""
    rng, found, left = np.random.default_rng(0), [], num_tokens
    while left >= 8:
        length = min(int(rng.integers(*lengths, endpoint=True)), left)
        tokens, prompt = rng.integers(0, vocab, length + 1, dtype=np.int32), max(1, length // 8)
        num_trained = len(tokens) - prompt
        found.append(
            TrainingRow(
                prompt_ids=tokens[:prompt],
                response_ids=tokens[prompt:],
                # About what random weights give to any token.
                behaviour_logprobs=np.full(num_trained, -np.log(vocab), dtype=np.float32),
                loss_mask=np.ones(num_trained, dtype=np.bool_),
                on_policy=np.ones(num_trained, dtype=np.bool_),
                advantage=float(rng.choice([-0.5, 0.5])),
                row_id=len(found),
            )
        )
        left -= length
    return found


def pack(of: Sequence[TrainingRow], most: int) -> list[Microbatch]:
    """In order, each of at most so many positions."""
    parts: list[list[TrainingRow]] = [[]]
    for row in of:
        if parts[-1] and sum(other.num_tokens for other in parts[-1]) + row.num_tokens > most:
            parts.append([])
        parts[-1].append(row)
    return [build_microbatch(part) for part in parts]


@dataclass
class Stretches:
    """Times on the device between marks: events on a GPU, the clock on a CPU."""

    on_gpu: bool
    begun: list[Any] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)
    _ranges: list[Any] = field(default_factory=list)  # of NVTX, by which Nsight's tools group kernels

    def begin(self, name: str) -> None:
        if self.on_gpu:
            self._ranges.append(torch.cuda.nvtx.range_start(name))
        self.begun.append(self._mark())

    def end(self) -> None:
        self.ended.append(self._mark())
        if self.on_gpu:
            torch.cuda.nvtx.range_end(self._ranges.pop())

    def seconds(self) -> float:
        """Of all stretches together, which are then forgotten."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = list(zip(self.begun, self.ended, strict=True))
        self.begun.clear()
        self.ended.clear()
        return sum(begun.elapsed_time(ended) / 1e3 if self.on_gpu else ended - begun for begun, ended in pairs)

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def watch_logprob_and_loss(trainer: MegatronTrainer, stretches: Stretches) -> None:
    """From the output of the last layer's norm to the gradient that comes back to it; without stages the one follows the other."""

    def has_output(_module: torch.nn.Module, _inputs: Any, hidden: torch.Tensor) -> None:
        stretches.begin("log-prob and loss")
        hidden.register_hook(lambda _gradient: stretches.end())

    (chunk,) = trainer.chunks
    chunk.decoder.register_forward_hook(has_output)


def fill(trainer: MegatronTrainer) -> None:
    """Random weights, drawn where they lie: the trainer's own, the same on every layout, come from the CPU, a minute for a few billions."""
    torch.manual_seed(0)
    with torch.no_grad():
        for shard in trainer.weight_shards():
            if shard.tensor.dim() > 1:
                shard.tensor.normal_(0.0, shard.tensor.shape[-1] ** -0.5)
            else:
                shard.tensor.fill_(1.0)
    trainer.weights_changed()


def measure(shape: Shape, args: argparse.Namespace, device: torch.device) -> Row:
    on_gpu = device.type == "cuda"
    mesh = build_mesh(MeshConfig(), shape.hf_config())
    config = TrainerConfig(dtype="bfloat16" if on_gpu else "float32", recompute=args.recompute)
    loss = LossConfig(reference="rollout")
    trainer = MegatronTrainer(shape.hf_config(), mesh, config, loss, 1.0, seed=None)
    fill(trainer)
    batch = rows(args.tokens, LENGTHS if on_gpu else (16, 64), shape.vocab)
    microbatches = pack(batch, args.microbatch)
    flop = shape.flop(microbatches)
    steps, logprobs = Stretches(on_gpu), Stretches(on_gpu)
    watch_logprob_and_loss(trainer, logprobs)

    def step() -> dict[str, float]:
        return trainer.update([microbatches], [float(len(batch))], None)

    stats = step()  # compilation, and the optimizer's state
    assert np.isfinite(stats["loss"]), stats
    logprobs.seconds()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times, shares = [], []
    with Sampler(device) as sampler:
        for _ in range(args.steps):
            steps.begin("step")
            step()
            steps.end()
            times.append(steps.seconds())
            shares.append(logprobs.seconds() / times[-1])
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    rates = Rates(device, repeats=3 if args.quick else 15)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    median = statistics.median(times)
    about = describe(device, args.commit)
    nominal = next((rate for name, rate in NOMINAL_FLOP_S.items() if name in about["name"]), None)
    found = {
        "mfu_measured": flop / median / rates.matmul_flop_s(dtype),
        "mfu_nominal": flop / median / nominal if nominal else None,
        "logprob_and_loss_share": statistics.median(shares),
        "tokens_s": args.tokens / median,
        "microbatches": len(microbatches),
        "recompute": args.recompute,
    }
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return Row(
        subject="train_step",
        case=shape.name,
        shape={"T": sum(part.num_tokens for part in microbatches), "L": shape.layers, "H": shape.hidden, "V": shape.vocab},
        dtype=str(dtype).removeprefix("torch."),
        run="kernel" if on_gpu else "reference",
        ours=True,
        median_s=median,
        p10_s=tenths[0],
        p90_s=tenths[-1],
        repeats=len(times),
        flop=flop,
        floor_s=flop / rates.matmul_flop_s(dtype),
        peak_bytes=peak,
        device=about | sampler.report() | found,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=int, default=32_768, help="of a step")
    parser.add_argument("--microbatch", type=int, default=8192, help="most tokens of one pass")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--out", type=Path, help="folder for train_step.jsonl, which is appended to")
    parser.add_argument("--commit", default="", help="what to record where git cannot tell")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two steps: does it work?")
    args = parser.parse_args()
    device = torch.device(args.device)
    shape = DENSE_4B
    if args.quick or device.type == "cpu":
        shape, args.tokens, args.microbatch, args.steps = TINY, 512, 256, 2
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":
            torch.cuda.set_device(0)
            device = torch.device("cuda", 0)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        row = measure(shape, args, device)
        dist.destroy_process_group()
    if args.out:
        append_rows(args.out / "train_step.jsonl", [row])
    about = row.device
    nominal = f", {about['mfu_nominal']:.1%} of the nominal" if about["mfu_nominal"] else ""
    print(
        f"| {row.case} T={row.shape['T']} {row.dtype} | {row.median_s * 1e3:.1f} ms | {about['tokens_s']:.0f} tokens/s "
        f"| model FLOP: {about['mfu_measured']:.1%} of the measured matrix rate{nominal} "
        f"| log-prob + loss {about['logprob_and_loss_share']:.1%} | peak {row.peak_bytes / 2**30:.1f} GiB |"
    )


if __name__ == "__main__":
    main()
