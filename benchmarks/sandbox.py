"""The code sandbox: start and rate against fresh namespaces, on the same programs; and attacks in a row, which must leave nothing.

    python benchmarks/sandbox.py [--seconds 5] [--workers 2] [--attacks 10000] [--out FILE]

Start is from the call to the program's first instruction. The peer is bubblewrap with the same mounts and namespaces, and a Python that
starts in it, for every run; it has no control group, no time limit and nobody who reads more than its output, all in its favour. Both
are measured in turns. Attacks, one of each kind in turn, are off by default: ten thousand take a quarter of an hour on two cores.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tandem.engine.reward.bubblewrap import UnavailableError, check_available, command, interpreter, interpreter_folders
from tandem.engine.reward.execution import MIB, Limits, Status
from tandem.engine.reward.languages import missing_tools
from tandem.engine.reward.sandbox import Sandbox
from tests.reward.hostile import ATTACKS
from tests.reward.traces import Traces, settled

TRIVIAL = "print(1)"
CLOCK = "import time; print(time.monotonic())"  # of the machine: namespaces share it
CLOCK_CPP = "#include <ctime>\n#include <cstdio>\nint main() { timespec t; clock_gettime(CLOCK_MONOTONIC, &t);" + (
    ' printf("%ld.%09ld", t.tv_sec, t.tv_nsec); }'
)
CLOCK_JS = "console.log(Number(process.hrtime.bigint()) / 1e9)"
ATTACK_LIMITS = Limits(wall_s=0.5, cpu_s=0.4, memory_bytes=64 * MIB, output_bytes=MIB, scratch_bytes=16 * MIB)
ROUNDS = 5

Run = Callable[[str], bytes]


def fresh(source: str) -> bytes:
    """A new bubblewrap and a new Python for one run."""
    python = interpreter()
    words = command(python=python, zygote_arguments=(), info_fd=None, is_root=os.geteuid() == 0, read_only=interpreter_folders(python))
    split = words.index("--")
    scratch = ["--tmpfs", "/box", "--tmpfs", "/tmp", "--tmpfs", "/dev/shm", "--remount-ro", "/"]
    words = words[:split]
    del words[words.index("--remount-ro") : words.index("--remount-ro") + 2]
    done = subprocess.run([*words, *scratch, "--", str(python), "-s", "-B", "-c", source], capture_output=True, check=True)
    return done.stdout


def pooled(sandbox: Sandbox, source: str, language: str = "python") -> bytes:
    done = sandbox.run(source, language=language)
    assert done.status is Status.OK, done
    return done.stdout


def start_ms(run: Run, source: str) -> float:
    """Milliseconds from the call to the program's first instruction."""
    before = time.monotonic()
    return 1000 * (float(run(source)) - before)


def rate(run: Run, seconds: float, num_threads: int) -> float:
    """Trivial programs per second, from as many threads as there are workers."""
    counts = [0] * num_threads
    deadline = time.monotonic() + seconds

    def work(index: int) -> None:
        while time.monotonic() < deadline:
            assert run(TRIVIAL) == b"1\n"
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - start)


def measure(sandbox: Sandbox, seconds: float) -> dict[str, float]:
    """Medians over rounds in which both take turns."""
    ours: Run = lambda source: pooled(sandbox, source)  # noqa: E731
    for run in (ours, fresh):
        run(CLOCK)
    starts: dict[str, list[float]] = {"pool": [], "fresh": []}
    rates: dict[str, list[float]] = {"pool": [], "fresh": []}
    for _ in range(ROUNDS):
        for name, run in (("pool", ours), ("fresh", fresh)):
            deadline = time.monotonic() + seconds / 2
            while time.monotonic() < deadline:
                starts[name].append(start_ms(run, CLOCK))
            rates[name].append(rate(run, seconds / 2, sandbox.num_workers))
    found = {}
    for name in starts:
        found[f"{name} start ms, median"] = statistics.median(starts[name])
        found[f"{name} start ms, 90th percentile"] = statistics.quantiles(starts[name], n=10)[-1]
        found[f"{name} runs/s"] = statistics.median(rates[name])
        found[f"{name} runs/s per core used"] = statistics.median(rates[name]) / min(sandbox.num_workers, len(os.sched_getaffinity(0)))
    found["rate, pool / fresh"] = statistics.median([a / b for a, b in zip(rates["pool"], rates["fresh"], strict=True)])
    found["start, fresh / pool"] = found["fresh start ms, median"] / found["pool start ms, median"]
    for language, source in (("cpp", CLOCK_CPP), ("javascript", CLOCK_JS)):
        if not missing_tools(language):
            pooled(sandbox, source, language)  # compiled, and in the page cache
            others = [start_ms(lambda text, language=language: pooled(sandbox, text, language), source) for _ in range(20)]
            found[f"pool start ms, median, {language}"] = statistics.median(others)
    return found


def attack(num_attacks: int, num_workers: int) -> dict[str, object]:
    """Run them, all workers at once, and look for what is left. Raises: AssertionError naming what an attack got."""
    before = Traces.now()
    ends: Counter[str] = Counter()
    numbers = iter(range(num_attacks))
    lock = threading.Lock()
    problems: list[str] = []
    start = time.monotonic()

    def work(sandbox: Sandbox) -> None:
        while not problems:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            chosen = ATTACKS[number % len(ATTACKS)]
            done = sandbox.run(chosen.source, stdin=__file__)
            with lock:
                ends[done.status.value] += 1
                if b"BROKEN" in done.stdout:
                    problems.append(f"{chosen.name}: {done.stdout[:1000]!r}")
                if (number + 1) % 1000 == 0:
                    print(f"{number + 1} attacks, {time.monotonic() - start:.0f} s", flush=True)

    with Sandbox(ATTACK_LIMITS, num_workers=num_workers) as sandbox:
        threads = [threading.Thread(target=work, args=(sandbox,)) for _ in range(num_workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        num_replaced = sandbox.num_replaced
    assert not problems, problems
    after = settled(before)
    assert after == before, f"left behind: {after}; before: {before}"
    return {"attacks": num_attacks, "ends": dict(ends), "workers replaced": num_replaced, "seconds": time.monotonic() - start}


def header(sandbox: Sandbox) -> dict[str, object]:
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    bwrap = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}",
        "python": platform.python_version(),
        "bubblewrap": bwrap,
        "load": os.getloadavg()[0],
        "workers": sandbox.num_workers,
        "not enforced": sandbox.not_enforced,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of the two in each of the rounds")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--attacks", type=int, default=0, help="attacks to run after the measurements")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    args = parser.parse_args()
    tempfile.gettempdir()  # may write a file to find out; before traces are taken
    try:
        check_available(is_root=os.geteuid() == 0)
    except UnavailableError as error:
        print(f"skipped: {error}")
        return
    with Sandbox(Limits(), num_workers=args.workers) as sandbox:
        row: dict[str, object] = {"benchmark": "sandbox", **header(sandbox)}
        print(json.dumps(row, indent=1))
        figures = measure(sandbox, args.seconds)
    print("\n| | |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:.2f} |")
    row.update(figures)
    if args.attacks:
        left = attack(args.attacks, args.workers)
        print(f"\n{json.dumps(left)}: nothing is left")
        row.update(left)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
