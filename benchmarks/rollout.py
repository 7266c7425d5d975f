"""Tokens/s of the embedded rollout engine against transformers, on the same weights, prompts and response lengths.

    python benchmarks/rollout.py [--requests 768] [--threads 1]

Every engine samples at temperature 1 without a stop token, and every request has its own response length from a long-tailed
distribution, so that all engines generate exactly the same number of tokens. `generate()` runs a padded batch until
its longest response is done and only the tokens asked for count. Each transformers engine is measured at several batch
sizes and its best counts. The embedded engine computes in a child process with as many threads as the others get.
"""

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.types import BucketEntry, Completion, GenerationRequest, TensorMeta, WeightSink

CONTEXT_LENGTH = 256
SAMPLES_PER_PROMPT = 8
PAD = 0


def toy_model(context_length: int = CONTEXT_LENGTH) -> Qwen3ForCausalLM:
    """The network of the toy recipe, with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def workload(num_requests: int) -> list[GenerationRequest]:
    """Prompts of 8 to 48 tokens, `SAMPLES_PER_PROMPT` each; response lengths log-normal around 48, cut to [4, 192]."""
    random = np.random.default_rng(0)
    num_prompts = -(-num_requests // SAMPLES_PER_PROMPT)
    prompts = [tuple(random.integers(1, 264, size=random.integers(8, 49)).tolist()) for _ in range(num_prompts)]
    lengths = np.clip(random.lognormal(np.log(48), 0.8, size=num_requests), 4, 192).astype(int).tolist()
    return [
        GenerationRequest(
            request_id=str(i),
            token_ids=prompts[i // SAMPLES_PER_PROMPT],
            num_prefix_tokens=0,
            max_new_tokens=length,
            seed=i,
        )
        for i, length in enumerate(lengths)
    ]


def swap_in(engine: WeightSink, model: Qwen3ForCausalLM, policy_version: int = 0) -> None:
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    engine.prepare(policy_version, [TensorMeta(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()])
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as bucket:
        for name, tensor in tensors.items():
            raw = tensor.contiguous().numpy().tobytes()
            bucket.seek(0)
            bucket.write(raw)
            bucket.flush()
            entry = BucketEntry(name=name, tensor_start=0, num_bytes=len(raw), bucket_start=0, checksum=xxhash.xxh3_64_intdigest(raw))
            engine.load(bucket.name, [entry])
    engine.commit()


def max_logprob_difference(model: Qwen3ForCausalLM, requests: list[GenerationRequest], completions: list[Completion]) -> float:
    """Largest |difference| in nats between the engine's log-probs and the model's, over some of the completions."""
    by_id = {completion.request_id: completion for completion in completions}
    worst = 0.0
    for request in requests[:: max(1, len(requests) // 64)]:
        completion = by_id[request.request_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*request.token_ids, *completion.token_ids]])).logits[0]
        logprobs = logits.log_softmax(-1)[len(request.token_ids) - 1 : -1].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        worst = max(worst, (logprobs - torch.tensor(completion.logprobs)).abs().max().item())
    return worst


def run_generate(model: Qwen3ForCausalLM, requests: list[GenerationRequest], batch: int) -> None:
    """transformers generate(): batches in request order, padded on the left."""
    for part in _batched(requests, batch):
        longest = max(len(request.token_ids) for request in part)
        ids = torch.full((len(part), longest), PAD)
        for row, request in zip(ids, part, strict=True):
            row[longest - len(request.token_ids) :] = torch.tensor(request.token_ids)
        num_new = max(request.max_new_tokens for request in part)
        generation = GenerationConfig(do_sample=True, max_new_tokens=num_new, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=PAD)
        inputs: Any = {"inputs": ids, "attention_mask": (ids != PAD).long(), "generation_config": generation}
        out = model.generate(**inputs)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(out, torch.Tensor)
        assert out.shape == (len(part), longest + num_new), out.shape


def _batched(items: list[GenerationRequest], size: int) -> list[tuple[GenerationRequest, ...]]:
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]


def run_continuous(manager: Any, requests: list[GenerationRequest]) -> None:
    """transformers continuous batching on a manager that is running and warm."""
    for request in requests:
        manager.add_request(list(request.token_ids), max_new_tokens=request.max_new_tokens)
    num_tokens = num_done = 0
    while num_done < len(requests):
        result = manager.get_result(timeout=600)
        assert result is not None, "continuous batching stopped"
        if result.is_finished():
            num_done += 1
            num_tokens += len(result.generated_tokens)
    assert num_tokens == sum(request.max_new_tokens for request in requests), num_tokens


def tokens_per_s(run: Callable[[], object], num_tokens: int, repeats: int) -> list[float]:
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        rates.append(num_tokens / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=768, help="how many responses are generated")
    parser.add_argument("--threads", type=int, default=1, help="threads of every engine")
    parser.add_argument("--max-batch", type=int, default=256, help="rows of the embedded engine's batch")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each engine; the best counts")
    parser.add_argument("--only", choices=["embedded"], help="leave the peers out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    model, requests = toy_model(), workload(arguments.requests)
    num_tokens = sum(request.max_new_tokens for request in requests)
    lengths = sorted(request.max_new_tokens for request in requests)
    print(f"{len(requests)} responses, {num_tokens} tokens, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}; fp32")
    rows: list[tuple[str, int, list[float]]] = []

    def measure(name: str, batch: int, run: Callable[[], object]) -> None:
        rates = tokens_per_s(run, num_tokens, arguments.repeats)
        rows.append((name, batch, rates))
        print(f"{name:32} batch {batch:4}   {max(rates):9.0f} tokens/s   ({', '.join(f'{rate:.0f}' for rate in rates)})", flush=True)

    config = RolloutConfig(max_batch=arguments.max_batch, repetition=RepetitionConfig(ngram_threshold=1e9, min_repeats=1000))
    setup: dict[str, Any] = {"dtype": "float32", "context_length": CONTEXT_LENGTH, "stop_token_ids": (), "num_threads": arguments.threads}
    with EmbeddedEngine(model.config.to_dict(), config, **setup) as engine:
        swap_in(engine, model)
        completions = list(engine.generate(requests))
        assert sum(len(completion.token_ids) for completion in completions) == num_tokens
        difference = max_logprob_difference(model, requests, completions)
        print(f"log-probs differ from the transformers model by at most {difference:.1e} nats")
        assert difference <= 1e-5, difference
        measure("embedded", arguments.max_batch, lambda: list(engine.generate(requests)))
    if arguments.only:
        return
    for batch in (64, arguments.max_batch):
        run_generate(model, requests[:8], 8)
        measure("transformers generate()", batch, lambda batch=batch: run_generate(model, requests, batch))
    generation = GenerationConfig(do_sample=True, max_new_tokens=CONTEXT_LENGTH, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=PAD)
    for batch in (16, 32, 64, arguments.max_batch):
        continuous = ContinuousBatchingConfig(
            page_size=32, num_blocks=8 * batch + 64, max_batch_tokens=max(64, batch), max_requests_per_batch=batch, return_logprobs=True
        )
        with model.continuous_batching_context_manager(generation_config=generation, continuous_batching_config=continuous) as manager:
            run_continuous(manager, requests[:8])
            measure("transformers continuous batching", batch, lambda manager=manager: run_continuous(manager, requests))
    best = {name: max(max(rates) for n, _, rates in rows if n == name) for name, _, _ in rows}
    ratios = {name: best["embedded"] / rate for name, rate in best.items() if name != "embedded"}
    for name, ratio in ratios.items():
        print(f"embedded / {name}: {ratio:.2f}")
    record = {
        "benchmark": "rollout",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {cpu_name()}",
        "threads": arguments.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "num_requests": len(requests),
        "num_tokens": num_tokens,
        "max_logprob_difference": difference,
        "tokens_per_s": [{"engine": name, "batch": batch, "rates": [round(rate, 1) for rate in rates]} for name, batch, rates in rows],
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }
    print(json.dumps(record))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
