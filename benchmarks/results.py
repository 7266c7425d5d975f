"""Rows of the benchmarks: as a table, as JSON lines, against a baseline, and as a roofline plot."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# A kernel is slower than its baseline when it takes this much longer, beyond the larger of the two spreads: clocks and placement
# move a GPU's times by a few percent from day to day.
NOISE = 0.05
# Others share a CPU, and CPUs differ: there the quick tenth of the calls is held against a peer's in the same run, and that ratio
# against the baseline's. On one busy machine it moves by up to a half.
RATIO_NOISE = 0.5
# Tensors' bytes do not vary from run to run; the allocator rounds them.
MEMORY_NOISE = 0.02
# Implementations of the project; others are peers.
OURS = ("kernel", "reference")
TABLE_HEAD = """\
| case | dtype | run | error vs fp64 | median ms | spread | TFLOP/s | GB/s | % of floor | peak MiB | × first |
|---|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation on one case."""

    subject: str
    case: str
    shape: dict[str, int]
    dtype: str
    run: str
    ours: bool  # the first run of its case: what a baseline is held against
    median_s: float = math.nan
    p10_s: float = math.nan
    p90_s: float = math.nan
    repeats: int = 0
    flop: float = 0.0
    bytes: float = 0.0
    floor_s: float = math.nan
    peak_bytes: int = 0
    errors: list[float] = field(default_factory=list)  # against fp64, one for each output
    tolerances: list[float] = field(default_factory=list)  # of those errors
    failed: str = ""  # why a peer has no time
    device: dict[str, Any] = field(default_factory=dict)  # name, versions, commit, date, rates; clocks and power during this case

    @property
    def spread(self) -> float:
        """From the 10th to the 90th percentile, as a fraction of the median."""
        return (self.p90_s - self.p10_s) / self.median_s

    def key(self) -> tuple[str, ...]:
        return self.subject, self.case, json.dumps(self.shape, sort_keys=True), self.dtype, self.run, str(self.device.get("name"))


def table_lines(rows: Sequence[Row]) -> str:
    """Lines of the Markdown table under TABLE_HEAD."""
    lines = []
    first_s = {row.key()[:4]: row.median_s for row in rows if row.ours}
    for row in rows:
        case = f"{row.case} " + " ".join(f"{name}={size}" for name, size in row.shape.items())
        errors = ", ".join(
            f"{error:.1e}{'' if error <= limit else ' (!)'}" for error, limit in zip(row.errors, row.tolerances, strict=True)
        )
        head = f"| {case} | {row.dtype} | {row.run} | {errors} |"
        if row.failed:
            lines.append(f"{head} {row.failed} | | | | | | |")
            continue
        numbers = [
            f"{row.median_s * 1e3:.3f}",
            f"{row.spread:.0%}",
            f"{row.flop / row.median_s / 1e12:.4g}" if row.flop else "",
            f"{row.bytes / row.median_s / 1e9:.4g}",
            f"{row.floor_s / row.median_s:.1%}",
            f"{row.peak_bytes / 2**20:.1f}",
            f"{row.median_s / first_s[row.key()[:4]]:.2f}" if row.key()[:4] in first_s else "",
        ]
        lines.append(f"{head} {' | '.join(numbers)} |")
    return "\n".join(lines)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, after those that are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            cleaned = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(row).items()}
            file.write(json.dumps(cleaned) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file. Lines of benchmarks that do not use this harness are left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values: dict[str, Any] = json.loads(line)
        if "case" in values and "run" in values:
            for name in [name for name, value in values.items() if value is None]:
                values[name] = math.nan
            found.append(Row(**values))
    return found


def regressions(rows: Sequence[Row], baseline: Sequence[Row], device_type: str) -> list[str]:
    """What is slower or larger than its baseline, one line each. The last baseline row of a key counts.

    On a GPU times are held against times of the same device, on a CPU ratios to a peer against ratios (see RATIO_NOISE).
    Raises: ValueError if no row of the baseline is about one of these cases on this device.
    """
    on_cpu = device_type == "cpu"
    known = {_key(row, on_cpu): row for row in baseline if not row.failed}
    pairs = [(row, known[_key(row, on_cpu)]) for row in rows if row.ours and _key(row, on_cpu) in known]
    if not pairs:
        names = sorted({str(row.device.get("name")) for row in baseline})
        raise ValueError(f"the baseline has no row about these cases on this device; its devices are {', '.join(names) or 'none'}")
    found = []
    for row, before in pairs:
        slower = _slower_than_peer(row, before, rows, known) if on_cpu else _slower(row, before)
        case = f"{row.subject} {row.case} {row.shape} {row.dtype} {row.run}"
        found += [f"{case}: {slower}"] if slower else []
        if row.peak_bytes > before.peak_bytes * (1 + MEMORY_NOISE):
            found.append(f"{case}: peak {row.peak_bytes:,} bytes, baseline {before.peak_bytes:,}")
    return found


def _key(row: Row, on_cpu: bool) -> tuple[str, ...]:
    """On a CPU without the device's name."""
    return row.key()[:5] if on_cpu else row.key()


def _slower(row: Row, before: Row) -> str:
    bound = 1 + NOISE + max(row.spread, before.spread)
    if row.median_s <= before.median_s * bound:
        return ""
    times = f"{row.median_s * 1e3:.3f} ms, baseline {before.median_s * 1e3:.3f} ms"
    return f"{times}: × {row.median_s / before.median_s:.2f}, over the bound of × {bound:.2f}"


def _slower_than_peer(row: Row, before: Row, rows: Sequence[Row], known: Mapping[tuple[str, ...], Row]) -> str:
    """By the first run of the case that is not ours and was timed both times."""
    of_case = [other for other in rows if other.key()[:4] == row.key()[:4] and not other.ours and not other.failed]
    peer = next((other for other in of_case if other.run not in OURS and _key(other, True) in known), None)
    if peer is None:
        return ""
    ratio, ratio_before = row.p10_s / peer.p10_s, before.p10_s / known[_key(peer, True)].p10_s
    if ratio <= ratio_before * (1 + RATIO_NOISE):
        return ""
    return f"× {ratio:.2f} of {peer.run}, baseline × {ratio_before:.2f}, over the bound of × {ratio_before * (1 + RATIO_NOISE):.2f}"


def plot_roofline(path: Path, rows: Sequence[Row]) -> None:
    """PNG: FLOP/s against FLOP per byte under the measured roofs; bytes a second where nothing is computed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row.failed]
    computes = [row for row in rows if row.flop]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rates = rows[0].device["rates"]
    bytes_s = rates["copy_bytes_s"]
    if computes:
        intensities = [row.flop / row.bytes for row in computes]
        roofs = {dtype: rates["matmul_flop_s"][dtype] for dtype in sorted({row.dtype for row in computes})}
        left, right = min(*intensities, min(roofs.values()) / bytes_s) / 4, max(*intensities, max(roofs.values()) / bytes_s) * 4
        xs = [left * (right / left) ** (i / 200) for i in range(201)]
        for dtype, flop_s in roofs.items():
            label = f"{dtype}: {flop_s / 1e12:.3g} TFLOP/s, {bytes_s / 1e9:.4g} GB/s"
            axes.plot(xs, [min(x * bytes_s, flop_s) / 1e12 for x in xs], color="0.5", linewidth=1, label=label)
        for number, run in enumerate(dict.fromkeys(row.run for row in computes)):
            points = [row for row in computes if row.run == run]
            x, y = [row.flop / row.bytes for row in points], [row.flop / row.median_s / 1e12 for row in points]
            axes.scatter(x, y, marker="o^sDvPX*"[number % 8], label=run, zorder=2)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    else:
        labels = [f"{row.run}: {row.case} {' '.join(f'{k}={v}' for k, v in row.shape.items())}" for row in rows]
        axes.barh(range(len(rows)), [row.bytes / row.median_s / 1e9 for row in rows])
        axes.set_yticks(range(len(rows)), labels, fontsize=7)
        axes.axvline(bytes_s / 1e9, color="0.5", linewidth=1, label=f"copy: {bytes_s / 1e9:.4g} GB/s")
        axes.set(xlabel="GB/s")
    axes.set_title(f"{rows[0].subject}, {rows[0].device['name']}")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
