"""Partial rollouts (Kimi k1.5, 2.6.2): a token budget for each iteration against waiting for the longest response.

    python benchmarks/partial_rollouts.py [--engines embedded sglang] [--iterations 6]

Response lengths are long-tailed and known beforehand (log-normal; no stop token, each request has its own limit), so that every variant
generates the same responses. An engine decodes at most `--max-batch` of them at a time.

- waiting: an iteration takes `--responses` new ones and ends with the longest of them.
- budget: an iteration goes on with what the one before cut, adds new ones until twice as many are in flight (as in the toy recipe), and
  ends after as many tokens as the other variant's have on average. It is repeated until as many tokens of finished responses are there.

The variants take turns, iteration by iteration. Weights are committed before each, as in training: what is resumed is computed anew, and
that counts, as does what an engine generates past the budget. Steps are those of a schedule that gives every running response one token
at a time; how long one takes depends on the machine: on a CPU partly, on a GPU with a small batch hardly on the number of responses.
Draws docs/partial_rollouts.png, prints a table, and a JSON line last.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from rollout import cpu_name, swap_in, toy_model
from transformers import Qwen3ForCausalLM

from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_guard import processes
from tandem.engine.rollout.sglang_server import ServerSetup, SGLangServer
from tandem.engine.rollout.sglang_versions import find_python
from tandem.engine.types import GenerationRequest, StopState

Engine = EmbeddedEngine | SGLangEngine
BLUE, ORANGE = "#2f6bd8", "#d9772b"
CONTEXT_LENGTH = 1024
LONGEST = 960  # tokens of a response
MEDIAN, SIGMA = 48, 1.1  # of the log-normal distribution of lengths


@dataclass(kw_only=True, eq=False)
class Sample:
    """A response that is to get `length` tokens."""

    number: int
    prompt: tuple[int, ...]
    length: int
    tokens: tuple[int, ...] = ()
    num_segments: int = 0

    def request(self) -> GenerationRequest:
        return GenerationRequest(
            request_id=str(self.number),
            token_ids=self.prompt + self.tokens,
            num_prefix_tokens=len(self.tokens),
            max_new_tokens=self.length - len(self.tokens),
            seed=self.number * 1000 + self.num_segments,
        )


def samples() -> Iterator[Sample]:
    """The same for every variant, without end."""
    random, number = np.random.default_rng(0), 0
    while True:
        prompt = tuple(random.integers(1, 264, size=random.integers(8, 49)).tolist())
        length = int(np.clip(random.lognormal(np.log(MEDIAN), SIGMA), 4, LONGEST))
        yield Sample(number=number, prompt=prompt, length=length)
        number += 1


@dataclass(kw_only=True)
class Variant:
    """One way of ending an iteration on one engine, and what it came to."""

    name: str
    budget: int | None
    source: Iterator[Sample] = field(default_factory=samples)
    partial: list[Sample] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each iteration
    cpu_s: list[float] = field(default_factory=list)  # of the engine's processes, which other work on the machine does not lengthen
    finished: list[int] = field(default_factory=list)  # tokens of the responses that ended in it
    rows: list[list[int]] = field(default_factory=list)  # responses that run, at each step of it

    @property
    def tokens_per_s(self) -> float:
        return sum(self.finished) / sum(self.seconds)

    @property
    def num_steps(self) -> int:
        return sum(map(len, self.rows))

    def iterate(self, engine: Engine, num_responses: int, max_batch: int) -> None:
        """One iteration."""
        num_in_flight = num_responses if self.budget is None else 2 * num_responses
        flight = [*self.partial, *(next(self.source) for _ in range(num_in_flight - len(self.partial)))]
        by_id = {str(sample.number): sample for sample in flight}
        self.rows.append(occupancy([sample.length - len(sample.tokens) for sample in flight], max_batch, self.budget))
        requests = [sample.request() for sample in flight]
        start, cpu_start, ended, num_new = time.perf_counter(), cpu_seconds(engine), set[str](), 0
        for completion in engine.generate(requests, token_budget=self.budget):
            sample = by_id[completion.request_id]
            num_new += len(completion.token_ids)
            sample.tokens, sample.num_segments = sample.tokens + completion.token_ids, sample.num_segments + 1
            if completion.stop is StopState.LENGTH:
                assert len(sample.tokens) == sample.length, (len(sample.tokens), sample.length)
                ended.add(completion.request_id)
        self.seconds.append(time.perf_counter() - start)
        self.cpu_s.append(cpu_seconds(engine) - cpu_start)
        assert num_new == sum(self.rows[-1]), (num_new, sum(self.rows[-1]))
        self.finished.append(sum(by_id[name].length for name in ended))
        self.partial = [sample for sample in flight if str(sample.number) not in ended]


def cpu_seconds(engine: Engine) -> float:
    """CPU time that the processes of the engine have taken so far."""
    if isinstance(engine, EmbeddedEngine):
        pids = [engine.pid]
    else:
        (session,) = Path(f"/proc/{engine.server.pid}/task/{engine.server.pid}/children").read_text().split()
        pids = processes(int(session))
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(of[11]) + int(of[12]) for of in fields) / os.sysconf("SC_CLK_TCK")


def occupancy(lengths: Sequence[int], max_batch: int, budget: int | None) -> list[int]:
    """Responses that run at each step, if each gets a token per step and the next one takes a place that gets free."""
    waiting, running, rows = deque(lengths), list[int](), list[int]()
    while waiting or running:
        while waiting and len(running) < max_batch:
            running.append(waiting.popleft())
        num = len(running) if budget is None else min(len(running), budget - sum(rows))
        if num == 0:
            break
        rows.append(num)
        running = [left - 1 for left in running if left > 1]
    return rows


def available(engines: Sequence[str]) -> list[str]:
    """Without SGLang where its environment is missing, and says so."""
    try:
        find_python(None)
    except FileNotFoundError as error:
        print(f"sglang is left out: {error}")
        return [engine for engine in engines if engine != "sglang"]
    return list(engines)


@contextlib.contextmanager
def start(kind: str, model: Qwen3ForCausalLM, max_batch: int) -> Iterator[Engine]:
    """An engine with one thread."""
    config = RolloutConfig(max_batch=max_batch, repetition=RepetitionConfig(max_period=0, ngram=0))
    hf_config = model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    if kind == "embedded":
        engine = EmbeddedEngine(hf_config, config, dtype="float32", context_length=CONTEXT_LENGTH, stop_token_ids=(), num_threads=1)
    else:
        setup = ServerSetup(
            hf_config=hf_config, config=config.sglang, dtype="float32", context_length=CONTEXT_LENGTH, max_running=max_batch
        )
        engine = SGLangEngine(SGLangServer(setup), config, stop_token_ids=())
    with engine:
        engine.wait_until_ready()
        yield engine


def measure(engine: Engine, model: Qwen3ForCausalLM, num_iterations: int, num_responses: int, max_batch: int) -> tuple[Variant, Variant]:
    """Waiting and budget, in turns, after one iteration of each that does not count."""
    lengths = [sample.length for _, sample in zip(range(num_iterations * num_responses), samples(), strict=False)]
    target, version = sum(lengths), 0

    def turn(variant: Variant) -> None:
        nonlocal version
        swap_in(engine, model, version)
        version += 1
        variant.iterate(engine, num_responses, max_batch)

    for warm in (Variant(name="warm", budget=None), Variant(name="warm", budget=target // num_iterations)):
        turn(warm)
    waiting, budget = Variant(name="waiting", budget=None), Variant(name="budget", budget=target // num_iterations)
    for _ in range(num_iterations):
        turn(waiting)
        turn(budget)
    assert sum(waiting.finished) == target, (waiting.finished, target)
    while sum(budget.finished) < target:
        turn(budget)
    return waiting, budget


def draw(results: dict[str, tuple[Variant, Variant]], to: Path) -> None:
    """Lengths, responses that run at each step of the first iterations, and finished tokens per second."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a94a3"})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1, 1.7, 1))
    waiting, budget = next(iter(results.values()))
    lengths = [sample.length for _, sample in zip(range(2000), samples(), strict=False)]
    left.hist(lengths, bins=40, color="#8a94a3")
    left.set_title("response lengths (tokens)", fontsize=11, loc="left")
    left.set_yticks([])
    num_shown = len(waiting.rows[0]) + len(waiting.rows[1])
    for variant, colour, label in ((waiting, BLUE, "waiting for the longest"), (budget, ORANGE, "token budget")):
        rows = [num for iteration in variant.rows for num in iteration][:num_shown]
        middle.plot(rows, color=colour, linewidth=1.4, label=label, drawstyle="steps-post")
    middle.set_title("responses that run, over decode steps", fontsize=11, loc="left")
    middle.set_ylim(0, None)
    middle.legend(frameon=False)
    names = list(results)
    for offset, colour, index in ((-0.2, BLUE, 0), (0.2, ORANGE, 1)):
        rates = [results[name][index].tokens_per_s for name in names]
        right.bar([place + offset for place in range(len(names))], rates, 0.36, color=colour)
    for place, name in enumerate(names):
        of_waiting, of_budget = (variant.tokens_per_s for variant in results[name])
        right.annotate(f"{of_budget / of_waiting:.2f}x", (place + 0.2, of_budget), ha="center", va="bottom")
    right.set_xticks(range(len(names)), names)
    right.set_title("tokens/s of finished responses", fontsize=11, loc="left")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=["embedded", "sglang"], default=["embedded", "sglang"])
    parser.add_argument("--iterations", type=int, default=6, help="of the waiting variant")
    parser.add_argument("--responses", type=int, default=64, help="of an iteration that waits")
    parser.add_argument("--max-batch", type=int, default=32, help="responses that an engine decodes at a time")
    parser.add_argument("--to", type=Path, default=Path("docs/partial_rollouts.png"), help="the picture to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, results, lines = toy_model(CONTEXT_LENGTH), dict[str, tuple[Variant, Variant]](), list[dict[str, Any]]()
    columns = ("engine", "ends by", "iterations", "finished tokens", "decode steps", "mean rows", "seconds", "ms/step", "CPU seconds")
    print(f"| {' | '.join(columns)} | finished tokens/s |\n|{'---|' * (1 + len(columns))}")
    for kind in available(options.engines):
        with start(kind, model, options.max_batch) as engine:
            results[kind] = measure(engine, model, options.iterations, options.responses, options.max_batch)
        for variant in results[kind]:
            rows, seconds, cpu_s = statistics.mean(num for of in variant.rows for num in of), sum(variant.seconds), sum(variant.cpu_s)
            ms = 1e3 * seconds / variant.num_steps
            counts = f"{len(variant.rows)} | {sum(variant.finished)} | {variant.num_steps} | {rows:.1f}"
            print(
                f"| {kind} | {variant.name} | {counts} | {seconds:.2f} | {ms:.2f} | {cpu_s:.2f} | {variant.tokens_per_s:.0f} |",
                flush=True,
            )
            line: dict[str, Any] = {
                "engine": kind,
                "ends": variant.name,
                "finished_tokens": variant.finished,
                "steps": list(map(len, variant.rows)),
            }
            lines.append(line | {"seconds": [round(s, 3) for s in variant.seconds], "cpu_s": [round(s, 2) for s in variant.cpu_s]})
    draw(results, options.to)
    ratios = {}
    for kind, (waiting, budget) in results.items():
        finished = sum(budget.finished) / sum(waiting.finished)
        ratios[kind] = {
            "per_s": round(budget.tokens_per_s / waiting.tokens_per_s, 3),
            "per_cpu_s": round(finished * sum(waiting.cpu_s) / sum(budget.cpu_s), 3),
            "per_step": round(finished * waiting.num_steps / budget.num_steps, 3),
        }
        print(f"{kind}: finished tokens with a budget / waiting: {ratios[kind]}")
    record = {
        "benchmark": "partial_rollouts",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": cpu_name(),
        "torch": torch.__version__,
        "lengths": {"median": MEDIAN, "sigma": SIGMA, "longest": LONGEST},
        "responses": options.responses,
        "max_batch": options.max_batch,
        "ratios": ratios,
        "variants": lines,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
