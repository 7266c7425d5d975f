"""The trainer's errors against Hugging Face in fp64: layout x family x (loss, gradients, weights after two AdamW steps).

    python benchmarks/layout_table.py [--only 'llama' 'PP2 CP2'] [--family qwen3 deepseek_v3]

Runs the comparison of tests/trainer/test_layouts.py (tiny models, float32, one thread a process, every loss) and writes docs/layouts.md. A
part (`--only`: layouts whose name contains one of the texts; `--family`) replaces its own cells and keeps the others, which lie in
benchmarks/baselines/layouts.jsonl. Ends with status 1 if an error exceeds the tests' tolerance.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.ranks import run_ranks
from tests.trainer.compare import OF_THEIRS, TOLERANCE, Errors, combine, compare, rounding_errors
from tests.trainer.families import FAMILIES
from tests.trainer.layouts import LAYOUTS, Layout
from tests.trainer.reference import LOSSES, Reference, make_reference
from tests.trainer.test_layouts import BF16_LAYOUTS, SMOOTH_LOSSES, bf16_references

ROOT = Path(__file__).resolve().parent.parent
RECORDS, DOCUMENT = ROOT / "benchmarks" / "baselines" / "layouts.jsonl", ROOT / "docs" / "layouts.md"
ONE_PROCESS = LAYOUTS[0]
HUGGING_FACE = {"float32": "Hugging Face in fp32", "bfloat16": "Hugging Face in bf16"}


def processor() -> str:
    """The CPU's name, or the architecture's where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def conditions() -> dict[str, str]:
    packages = ("torch", "megatron-core", "transformers")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "commit": commit(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
    }


def record_of(
    family: str, layout: str, num_ranks: int, dtype: str, of_losses: Iterable[str], errors: Errors, seconds: float
) -> dict[str, Any]:
    return {
        "family": family,
        "layout": layout,
        "processes": num_ranks,
        "dtype": dtype,
        "losses": list(of_losses),
        "logprob_error": errors.logprobs,
        "loss_error": errors.loss,
        "gradient_error": errors.gradient,
        "weight_error": errors.weight,
        "too_large": [],
        "seconds": round(seconds, 1),
        **conditions(),
    }


def measure(
    family: str, layout: Layout, reference: Reference, of_losses: Iterable[str], dtype: Any, theirs: Errors | None = None
) -> dict[str, Any]:
    """One cell of the table; `theirs` are the errors of Hugging Face in float32."""
    start = time.monotonic()
    errors = combine(run_ranks(compare, layout.num_ranks, layout, reference, list(of_losses), dtype, timeout_s=300), reference)
    record = record_of(family, layout.name, layout.num_ranks, dtype, of_losses, errors, time.monotonic() - start)
    record["too_large"] = errors.too_large(theirs) if dtype == "float32" else []
    print(f"{family:12} {dtype:8} {layout.name:70} {layout.num_ranks} {record['seconds']:6.1f} s  {errors.worst()}", flush=True)
    return record


def measure_family(family: str, layouts: Iterable[Layout]) -> list[dict[str, Any]]:
    """The cells of a family, and its part of the bf16 table where it has one."""
    fitting = [layout for layout in layouts if layout.fits(experts=FAMILIES[family].has_experts)]
    if not fitting:
        return []
    records = []
    for num_layers in sorted({layout.num_layers for layout in fitting}):
        exact = make_reference(family, num_layers)
        theirs = rounding_errors(family, exact, num_layers)
        if num_layers == ONE_PROCESS.num_layers:
            records.append(record_of(family, HUGGING_FACE["float32"], 1, "float32", LOSSES, theirs, 0.0))
        of_depth = [layout for layout in fitting if layout.num_layers == num_layers]
        records += [measure(family, layout, exact, LOSSES, "float32", theirs) for layout in of_depth]
    if family in BF16_LAYOUTS and ONE_PROCESS in fitting:
        exact, theirs = bf16_references(family)
        records.append(record_of(family, HUGGING_FACE["bfloat16"], 1, "bfloat16", SMOOTH_LOSSES, theirs, 0.0))
        records += [measure(family, layout, exact, SMOOTH_LOSSES, "bfloat16") for layout in (ONE_PROCESS, BF16_LAYOUTS[family])]
    return records


def merge(old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All records, a cell's newest only, without those of layouts and families that are gone."""
    cells = {(record["dtype"], record["family"], record["layout"]): record for record in (*old, *new)}
    of_family = {
        family: {layout.name for layout in LAYOUTS if layout.fits(experts=of.has_experts)} | {x.name for x in BF16_LAYOUTS.values()}
        for family, of in FAMILIES.items()
    }
    return [
        record
        for (_, family, layout), record in sorted(cells.items())
        if layout in of_family.get(family, set()) | set(HUGGING_FACE.values())
    ]


def number(x: float) -> str:
    return f"{x:.0e}".replace("e-0", "e-") if x else "0"


def triple(record: Mapping[str, Any]) -> str:
    return " ".join(number(record[name]) for name in ("loss_error", "gradient_error", "weight_error"))


def document(records: Iterable[Mapping[str, Any]]) -> str:
    """docs/layouts.md."""
    cells = {(record["dtype"], record["layout"], record["family"]): record for record in records}
    exact = [record for (dtype, layout, _), record in cells.items() if dtype == "float32" and layout not in HUGGING_FACE.values()]
    families = [family for family in FAMILIES if any(record["family"] == family for record in exact)]
    of_losses = [name for name in LOSSES if all(name in record["losses"] for record in exact)]
    lines = [
        "# The trainer against Hugging Face, layout by layout",
        "",
        "Written by `python benchmarks/layout_table.py` from `benchmarks/baselines/layouts.jsonl`.",
        "",
        "Each cell holds three relative errors of the trainer in float32 against one Hugging Face model in float64 and one process: of",
        "the **loss**, of the **gradient**, and of the **weights after two AdamW steps**. Of a tensor the error is ‖found - wanted‖ /",
        f"‖wanted‖; the largest of all tensors (for the gradient: under any of {len(of_losses)} losses) is shown. The tests refuse more",
        f"than {number(TOLERANCE)}, or than {OF_THEIRS} times what the Hugging Face model (first row) errs by in float32 where that is",
        "more. A dash: the model cannot be trained like that (no experts to spread, or experts with tensor but without sequence",
        "parallelism).",
        "",
        f"The losses: {'; '.join(of_losses)}. Rows are ragged, some tokens stale and left out; some ranks have fewer rows or none.",
        "Names: TP tensor, SP sequence, PP pipeline, VPP virtual pipeline, CP context, DP data, EP expert and ETP expert-tensor parallel.",
        "What is not named is Megatron's plainest: AdamW on every rank, nothing overlapped or recomputed, all-to-all to the experts.",
        "",
        "Seconds are of the whole comparison, from forking the processes on, and tell mostly how busy the machine was.",
        "",
        *_conditions(exact),
        "",
        f"| layout | processes | seconds | {' | '.join(families)} |",
        f"|---|---|---|{'---|' * len(families)}",
    ]
    theirs = [cells.get(("float32", HUGGING_FACE["float32"], family)) for family in families]
    texts = [triple(record) if record is not None else "not measured" for record in theirs]
    lines.append(f"| *{HUGGING_FACE['float32']}* | 1 | | {' | '.join(texts)} |")
    for layout in LAYOUTS:
        of_layout = [cells.get(("float32", layout.name, family)) for family in families]
        seconds = [record["seconds"] for record in of_layout if record is not None]
        if seconds:
            fits = [layout.fits(experts=FAMILIES[family].has_experts) for family in families]
            texts = [
                triple(record) if record is not None else "not measured" if fit else "–"
                for record, fit in zip(of_layout, fits, strict=True)
            ]
            lines.append(f"| {layout.name} | {layout.num_ranks} | {min(seconds):.0f}–{max(seconds):.0f} | {' | '.join(texts)} |")
    worst = {name: max(record[name] for record in exact) for name in ("loss_error", "gradient_error", "weight_error")}
    lines += ["", f"Largest: loss {worst['loss_error']:.1e}, gradient {worst['gradient_error']:.1e}, weights {worst['weight_error']:.1e}."]
    return "\n".join([*lines, *_bf16(cells), ""])


def _conditions(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where and when; parts that were measured at other times each have their line."""
    names = ("machine", "date", "commit", "versions")
    found = sorted({tuple(record[name] for name in names) for record in records})
    return [
        f"Measured on {machine} (one thread a process), {date}, commit {commit}; {versions}.  " for machine, date, commit, versions in found
    ]


def _bf16(cells: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> list[str]:
    rows = [record for (dtype, _, _), record in cells.items() if dtype == "bfloat16"]
    if not rows:
        return []
    return [
        "",
        "## bfloat16",
        "",
        "Against the same model in float64, with weights that bfloat16 holds; losses without clipping, since a ratio that rounding carries",
        "over the clip's edge changes the gradient at once. The tests hold log-probs to 2 times, gradients and weights to 3 times the",
        "error that Hugging Face makes in bfloat16, and losses to 2 %.",
        "",
        "| family | what | processes | log-probs (nats, largest) | loss | gradient | weights |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['family']} | {row['layout']} | {row['processes']} | {row['logprob_error']:.1e} | {row['loss_error']:.1e} | "
            f"{row['gradient_error']:.1e} | {row['weight_error']:.1e} |"
            for row in rows
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="layouts whose name contains one of these texts")
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    args = parser.parse_args()
    layouts = [layout for layout in LAYOUTS if any(text in layout.name for text in args.only)]
    records = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()] if RECORDS.is_file() else []
    for family in args.family:
        records = merge(records, measure_family(family, layouts))
        RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        DOCUMENT.write_text(document(records), encoding="utf-8")
    too_large = [f"{record['family']}, {record['layout']}: {what}" for record in records for what in record["too_large"]]
    if too_large:
        sys.exit("\n".join(["errors above the tests' tolerance:", *too_large]))


if __name__ == "__main__":
    main()
