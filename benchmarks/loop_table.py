"""The phases of a finished run: seconds of each, and the memory that was in use in each turn, as Markdown and a JSON line.

    python benchmarks/loop_table.py RUN [--jsonl FILE]

Medians over the iterations but the first, which compiles and starts; of memory the most of all iterations and ranks.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tandem.engine.log import read_metrics
from tandem.engine.report import MEMORY_COLUMNS, memory_by_phase, merge_by_step

GIB = 1 << 30


def phase_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of every phase over the iterations, the longest first."""
    names = {name for row in rows for name in row if name.startswith("phase_s/")}
    medians = {name.removeprefix("phase_s/"): statistics.median(row.get(name, 0.0) for row in rows) for name in names}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--jsonl", type=Path, help="file that the figures are appended to")
    args = parser.parse_args()
    config = json.loads((args.run / "config.json").read_text())
    rows = [row for row in merge_by_step(read_metrics(args.run)) if "phase_s/train" in row]
    if not rows:
        parser.error(f"{args.run}: no iteration has ended")
    timed = rows[1:] or rows
    seconds, memory = phase_seconds(timed), memory_by_phase(rows)
    step_s = statistics.median(row["step_s"] for row in timed)
    print(f"{len(rows)} iterations, median {step_s:.2f} s; {config['rollout']['engine']}, trainer.sleep={config['trainer']['sleep']}\n")
    print("| phase | s | of the iteration |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {value / step_s:.1%} |")
    print(f"\n| turn | {' | '.join(f'{label}, GiB' for label in MEMORY_COLUMNS.values())} |\n|{'---|' * (1 + len(MEMORY_COLUMNS))}")
    for phase, found in memory.items():
        print(f"| {phase} | {' | '.join(f'{found[name] / GIB:.3f}' if name in found else '' for name in MEMORY_COLUMNS)} |")
    if args.jsonl is not None:
        line = {"subject": "loop", "iterations": len(rows), "step_s": step_s, "phase_s": seconds, "memory_bytes": memory, "config": config}
        with args.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
