"""Responses graded per second: plain numbers, structures of numbers, and what needs algebra.

    python benchmarks/grading.py [--seconds 2] [--workers 1 2] [--out DIR]

Every response is checked before it counts. Numbers are graded in this process; algebra in the workers, with all responses in flight.
Answers differ from each other, so that nothing is cached. The peer is math-verify alone, `parse` and `verify` in this process
without a time limit: it grades the answer in a box, and knows what it knows.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from math_verify import parse, verify

from tandem.engine.reward.math import submit_math
from tandem.engine.reward.symbolic import load
from tandem.engine.reward.workers import WorkerPool

Kind = Callable[[int], tuple[str, str]]  # from a number to an answer and an equal reference
KINDS: dict[str, Kind] = {
    "number": lambda i: (f"{i:,}", str(i)),
    "fraction": lambda i: (rf"\frac{{{i}}}{{8}}", str(i / 8)),
    "interval": lambda i: (rf"\left({i}, \frac{{{i + 1}}}{{2}}\right]", f"({i}, {(i + 1) / 2}]"),
    "root": lambda i: (rf"{i}\sqrt{{2}}", rf"\sqrt{{{2 * i * i}}}"),
    "polynomial": lambda i: (f"(x+{i})^2", f"x^2+{2 * i}x+{i * i}"),
}
BEFORE = "We add the two and divide, step by step, until nothing is left. " * 30  # some 2,000 characters of reasoning
NUM_PER_ROUND = 50


def rate(kind: Kind, grade_all: Callable[[list[tuple[str, str]]], list[bool]], seconds: float) -> tuple[float, float]:
    """Median and spread (interquartile range over median) of responses graded per second, over rounds of NUM_PER_ROUND."""
    rates, next_number, end = [], 1000, time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        pairs = [kind(i) for i in range(next_number, next_number + NUM_PER_ROUND)]
        next_number += NUM_PER_ROUND
        responses = [(rf"{BEFORE}It is $\boxed{{{answer}}}$.", reference) for answer, reference in pairs]
        start = time.perf_counter()
        correct = grade_all(responses)
        rates.append(NUM_PER_ROUND / (time.perf_counter() - start))
        if not all(correct):
            raise SystemExit(f"wrong verdict for {pairs[correct.index(False)]}")
    low, middle, high = statistics.quantiles(rates, n=4)
    return statistics.median(rates), (high - low) / middle


def ours(pool: WorkerPool) -> Callable[[list[tuple[str, str]]], list[bool]]:
    def grade_all(responses: list[tuple[str, str]]) -> list[bool]:
        futures = [submit_math(response, reference, pool=pool) for response, reference in responses]
        return [future.result().correct for future in futures]

    return grade_all


def math_verify_alone(responses: list[tuple[str, str]]) -> list[bool]:
    return [
        verify(parse(f"${reference}$", parsing_timeout=None), parse(response, parsing_timeout=None), timeout_seconds=None)  # type: ignore[arg-type]
        for response, reference in responses
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="responses graded per second")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row, at least")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of grading.jsonl")
    args = parser.parse_args()
    header: dict[str, object] = {"machine": platform.machine(), "cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    header["python"] = platform.python_version()
    print(header)
    print(f"{'answers':<12} {'grader':<22} {'graded/s':>10} {'spread':>8}")
    rows = []
    runs: dict[str, Callable[[list[tuple[str, str]]], list[bool]]] = {"math-verify alone": math_verify_alone}
    pools = {num: WorkerPool(num, deadline_s=60, initialise=load) for num in sorted(set(args.workers))}
    for num, pool in pools.items():
        for future in [pool.submit(time.sleep, 0.1) for _ in range(4 * num)]:  # all workers have started when these are done
            future.result()
        runs = {f"ours, {num} worker{'s' * (num > 1)}": ours(pool)} | runs
    for name, kind in KINDS.items():
        for grader, grade_all in runs.items():
            try:
                median, spread = rate(kind, grade_all, args.seconds)
            except SystemExit as wrong:
                if grader.startswith("ours"):
                    raise
                print(f"{name:<12} {grader:<22} {wrong}")
                continue
            print(f"{name:<12} {grader:<22} {median:>10.0f} {spread:>8.0%}")
            rows.append({"answers": name, "grader": grader, "per_second": median, "spread": spread})
    for pool in pools.values():
        pool.close()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "grading.jsonl").open("a") as file:
        file.writelines(json.dumps(header | {"date": f"{datetime.date.today()}"} | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
