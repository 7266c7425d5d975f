"""The harness of the kernel benchmarks: answer first, then times of all implementations on the same inputs.

    python benchmarks/SUBJECT.py [--device cuda] [--case forward] [--seconds 1] [--out DIR]
                                 [--compare benchmarks/baselines/FILE] [--profile torch|ncu] [--quick] [--heavy-first]

To add a subject, write benchmarks/NAME.py (same stem as the kernel's folder) after this pattern:

    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

    from benchmarks.harness import Case, Subject, main

    def cases(device: torch.device) -> list[Case]:             # the smallest first: --quick runs that one alone
        return [Case(name="forward", shape={"T": 4096, "H": 1024}, dtype=torch.bfloat16, ..., inputs=..., exact=..., runs={...})]

    SUBJECT = Subject(name="norm", about="RMSNorm", cases=cases)

    if __name__ == "__main__":
        main(SUBJECT)

`runs` maps names to functions from the inputs to the output tensors. The first is what the project offers on that device and what
baselines are held against: "kernel" on a GPU, "reference" on a CPU. Then come "reference" and the peers that are installed
(`installed("liger_kernel")`). Flop and bytes are those that the task needs (each input read once, each output written once),
the same for all runs, so that the percentage of the floor compares them. Inputs and outputs need not be rebuilt: a run may change
its inputs, each check gets fresh ones from the same seed. What a case computes in fp64 must fit in memory: where it would not, give
a smaller case of the same kind as `check_on`.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.instruments import Rates, Sampler, Timer, peak_bytes
from benchmarks.results import OURS, TABLE_HEAD, Row, append_rows, plot_roofline, read_rows, regressions, table_lines

ROOT = Path(__file__).resolve().parent.parent
MIN_REPEATS, MAX_REPEATS, QUICK_REPEATS = 5, 200, 2
PEER_SLACK = 10.0  # a peer that is off by up to this many tolerances is timed, and its error marked with (!)
FLOP_PER_BYTE = 200  # of a recent GPU in bf16
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "flash-attn-4")

Run = Callable[[Any], "torch.Tensor | Sequence[torch.Tensor]"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one computation."""

    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype  # of the operands: chooses the matrix rate of the floor
    flop: float  # that the task needs; 0 where it only moves bytes
    bytes: float  # read and written at least
    inputs: Callable[[torch.device], Any]  # called with the seed set
    exact: Callable[[Any], Sequence[torch.Tensor]]  # the outputs in fp64, from the same inputs
    tolerances: Sequence[float]  # largest relative Frobenius error of each output
    runs: Mapping[str, Run]
    check_on: "Case | None" = None  # whose answer is checked instead; it must have the same runs


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What one script measures."""

    name: str
    about: str
    cases: Callable[[torch.device], Sequence[Case]]


class WrongAnswer(Exception):
    """One of our own implementations is further from fp64 than its tolerance, or failed."""


def installed(package: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, for peers: every size compiled for itself, and backward passes that can be repeated, whose buffers it would reuse."""
    import torch._dynamo.config
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 64  # sizes that are checked and timed, with gradients and without
    return torch.compile(function, dynamic=False)


def main(subject: Subject, argv: Sequence[str] | None = None) -> None:
    """The command line of every subject. Exit status: 1 for a wrong answer or a regression, 2 for bad input."""
    parser = argparse.ArgumentParser(description=subject.about)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", default="", help="only cases whose name and sizes (as in the table) contain this")
    parser.add_argument("--run", nargs="+", default=[], help="only these implementations")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each implementation of each case")
    parser.add_argument("--quick", action="store_true", help="the first case alone, two repeats: does it work?")
    parser.add_argument("--heavy-first", action="store_true", help="the largest cases first, for a run that may be cut short")
    parser.add_argument("--out", type=Path, help="folder for SUBJECT.jsonl (appended to), SUBJECT.png and profiles")
    parser.add_argument("--compare", type=Path, help="JSON lines of an earlier run: end with status 1 if this one is slower or larger")
    parser.add_argument("--profile", choices=("torch", "ncu"), help="profile one call of each implementation into --out instead of timing")
    parser.add_argument("--commit", default="", help="what to record where git cannot tell")
    args = parser.parse_args(argv)
    device = torch.empty(0, device=args.device).device  # with its number, as tensors have it
    cases = [case for case in subject.cases(device) if args.case in label(case)]
    if args.profile and args.out is None:
        parser.error("--profile needs --out, a folder for what it writes")
    if args.compare and not args.compare.is_file():
        parser.error(f"--compare {args.compare}: no such file")
    if not cases:
        parser.error(f"no case of {subject.name} contains {args.case!r}: {'; '.join(label(case) for case in subject.cases(device))}")
    unknown = set(args.run) - {name for case in cases for name in case.runs}
    if unknown:
        parser.error(f"--run {' '.join(sorted(unknown))}: no such implementation; {', '.join(cases[0].runs)} can run here")
    if args.profile == "ncu":
        sys.exit(_run_ncu(subject, args))
    try:
        cases = cases[:1] if args.quick else cases
        rows = _run_cases(subject, sorted(cases, key=_weight, reverse=True) if args.heavy_first else cases, device, args)
    except WrongAnswer as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if not rows:
        return
    if args.out and not all(row.failed for row in rows):
        plot_roofline(args.out / f"{subject.name}.png", rows)
    if args.compare:
        try:
            found = regressions(rows, read_rows(args.compare), device.type)
        except ValueError as error:
            parser.error(f"--compare {args.compare}: {error}")
        print("\n".join(found) or f"no regression against {args.compare}")
        sys.exit(1 if found else 0)


def label(case: Case) -> str:
    """The case as the table writes it."""
    return f"{case.name} {' '.join(f'{name}={size}' for name, size in case.shape.items())} {_dtype_name(case.dtype)}"


def _weight(case: Case) -> float:
    """By which cases are ordered: FLOP, or bytes times what a GPU computes while it moves one."""
    return max(case.flop, FLOP_PER_BYTE * case.bytes)


def measure(
    subject: str, case: Case, device: torch.device, rates: Rates, *, seconds: float, only: Sequence[str] = (), quick: bool
) -> list[Row]:
    """Check, then time all implementations in turns, so that all meet the same clocks and the same load.

    Raises: WrongAnswer. A peer that fails or computes something else gets a row that says so.
    """
    runs = {name: run for name, run in case.runs.items() if not only or name in only}
    checked = _check(subject, case.check_on or case, list(runs), device)
    timed = {name: run for name, run in runs.items() if not checked[name][1]}
    inputs = _inputs(case, device)
    timer = Timer(device)
    peaks: dict[str, int] = {}
    failed = {name: why for name, (_, why) in checked.items()}
    for name in list(timed):
        try:
            timed[name](inputs)  # compilation, choice of algorithms
            peaks[name] = peak_bytes(lambda run=timed[name]: run(inputs), device)
        except Exception as error:  # third parties' code may raise anything; ours is raised again
            failed[name] = _give_up(subject, case, name, error)
            del timed[name]
    times: dict[str, list[float]] = {name: [] for name in timed}
    start = time.perf_counter()
    fewest, most = (QUICK_REPEATS, QUICK_REPEATS) if quick else (MIN_REPEATS, MAX_REPEATS)
    with Sampler(device) as sampler:
        for repeat in range(most if timed else 0):
            if repeat >= fewest and time.perf_counter() - start > seconds * len(timed):
                break
            for name, run in timed.items():
                with _nvtx(device, f"tandem {subject} {label(case)} {name}"):
                    times[name].append(timer(lambda run=run: run(inputs)))
    during = sampler.report()
    floor_s = rates.floor_s(case.flop, case.bytes, case.dtype)
    rows = []
    for name in runs:
        row = Row(
            subject=subject,
            case=case.name,
            shape=dict(case.shape),
            dtype=_dtype_name(case.dtype),
            run=name,
            ours=name == next(iter(case.runs)),
            peak_bytes=peaks.get(name, 0),
            flop=case.flop,
            bytes=case.bytes,
            floor_s=floor_s,
            errors=checked[name][0],
            tolerances=list((case.check_on or case).tolerances[: len(checked[name][0])]),
            failed=failed[name],
            device=during,
        )
        rows.append(_timed(row, times.get(name, [])))
    return rows


def _run_cases(subject: Subject, cases: Sequence[Case], device: torch.device, args: argparse.Namespace) -> list[Row]:
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.profile == "torch":
        for case in cases:
            _profile(subject.name, case, device, args.out, args.run)
        return []
    rates = Rates(device, repeats=QUICK_REPEATS) if args.quick else Rates(device)
    about = describe(device, args.commit)
    print(f"{subject.name}: {subject.about}\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    matmul = {_dtype_name(case.dtype): rates.matmul_flop_s(case.dtype) for case in cases}
    measured = {"copy_bytes_s": rates.copy_bytes_s(), "matmul_flop_s": matmul}
    print(
        f"measured here: copy {measured['copy_bytes_s'] / 1e9:.4g} GB/s"
        + "".join(f", {k} {v / 1e12:.4g} TFLOP/s" for k, v in matmul.items())
    )
    print(TABLE_HEAD, flush=True)
    rows: list[Row] = []
    for case in cases:
        found = measure(subject.name, case, device, rates, seconds=args.seconds, only=args.run, quick=args.quick)
        found = [replace(row, device={**about, **row.device, "rates": measured}) for row in found]
        print(table_lines(found), flush=True)
        if args.out:  # at once, so that a run that is cut short has left what it knew
            append_rows(args.out / f"{subject.name}.jsonl", found)
        rows += found
    return rows


def _inputs(case: Case, device: torch.device) -> Any:
    torch.manual_seed(0)
    return case.inputs(device)


def _check(subject: str, case: Case, names: Sequence[str], device: torch.device) -> dict[str, tuple[list[float], str]]:
    """Of each implementation the errors of its outputs, and why it is not to be timed ("" if it is)."""
    exact = case.exact(_inputs(case, device))
    checked: dict[str, tuple[list[float], str]] = {}
    for name in names:
        try:
            found = case.runs[name](_inputs(case, device))
        except Exception as error:  # third parties' code may raise anything; ours is raised again
            checked[name] = [], _give_up(subject, case, name, error)
            continue
        outputs = [found] if isinstance(found, torch.Tensor) else list(found)
        assert len(outputs) == len(exact) == len(case.tolerances), f"{subject} {name}: outputs, exact and tolerances differ in number"
        errors = [_error(output, wanted) for output, wanted in zip(outputs, exact, strict=True)]
        wrong = [i for i, (error, limit) in enumerate(zip(errors, case.tolerances, strict=True)) if not error <= limit]
        why = ", ".join(f"output {i} is off by {errors[i]:.1e}, allowed {case.tolerances[i]:.1e}" for i in wrong)
        if wrong and name in OURS:
            raise WrongAnswer(f"{subject} {label(case)}: {name}: {why}")
        useless = any(not errors[i] <= PEER_SLACK * case.tolerances[i] for i in wrong)
        checked[name] = errors, f"wrong: {why}" if useless else ""
    return checked


def _error(output: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius; absolute where all that is wanted is zero. NaN stays NaN, which no tolerance allows."""
    assert output.shape == wanted.shape, (output.shape, wanted.shape)
    size = wanted.double().norm().item()
    return (output.double() - wanted.double()).norm().item() / (size or 1.0)


def _give_up(subject: str, case: Case, name: str, error: Exception) -> str:
    if name in OURS:
        raise WrongAnswer(f"{subject} {label(case)}: {name} failed: {error}") from error
    lines = str(error).splitlines()
    return f"failed: {type(error).__name__}: {lines[0][:100] if lines else ''}".replace("|", "/")


def _timed(row: Row, times: Sequence[float]) -> Row:
    if not times:
        return row
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return replace(row, median_s=statistics.median(times), p10_s=tenths[0], p90_s=tenths[-1], repeats=len(times))


@contextlib.contextmanager
def _nvtx(device: torch.device, name: str) -> Iterator[None]:
    """A named range for Nsight's tools; they group kernels by it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def _profile(subject: str, case: Case, device: torch.device, out: Path, only: Sequence[str]) -> None:
    """A trace of one warm call of each implementation, for https://ui.perfetto.dev, and a table of what it consists of."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    inputs = _inputs(case, device)
    for name, run in case.runs.items():
        if only and name not in only:
            continue
        run(inputs)
        with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profile:
            with _nvtx(device, f"tandem {subject} {label(case)} {name}"):
                run(inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        path = out / f"{subject}-{label(case)}-{name}.trace.json".replace(" ", "_").replace("=", "")
        profile.export_chrome_trace(str(path))
        print(f"{label(case)}: {name}: {path}")
        print(profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=15))


def _run_ncu(subject: Subject, args: argparse.Namespace) -> int:
    """The same script under Nsight Compute, which replays each kernel within our ranges. Clocks are left as they are."""
    ncu = shutil.which("ncu")
    if ncu is None or not torch.cuda.is_available():
        print("error: --profile ncu needs a GPU and Nsight Compute's `ncu` on the PATH; --profile torch does not", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, str(Path(sys.argv[0]).resolve()), "--quick", "--device", args.device, "--case", args.case]
    if args.run:
        script += ["--run", *args.run]
    options = ["--set", "full", "--clock-control", "none", "--nvtx", "--nvtx-include", "regex:tandem .*/", "--force-overwrite"]
    report = args.out / f"{subject.name}.ncu-rep"
    return subprocess.run([ncu, *options, "--export", str(report), *script], check=False).returncode


def describe(device: torch.device, commit: str) -> dict[str, Any]:
    """Who measured: device, versions, commit, date."""
    found: dict[str, Any] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    else:
        found = {"name": f"{_cpu_name()}, {torch.get_num_threads()} threads", "load": round(os.getloadavg()[0], 1)}
    found["python"] = platform.python_version()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"commit": commit or _commit(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _cpu_name() -> str:
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """The commit of the source tree, marked where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False).stdout.strip()
    return f"{head}+changes" if head and changed else head or "unknown"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
