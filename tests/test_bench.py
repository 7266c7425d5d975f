"""The benchmark harness on made-up subjects, and `tandem bench` on made-up scripts and a real one."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import harness, instruments
from benchmarks.harness import Case, Subject
from benchmarks.instruments import Rates, Sampler, peak_bytes
from benchmarks.results import Row, read_rows, regressions
from tandem.engine import bench, cli

CPU = torch.device("cpu")
SCALARS = 16  # bytes of a Python number that an operation makes a tensor of
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def small_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(instruments.MATMUL_SIDE, "cpu", 64)
    monkeypatch.setitem(instruments.COPY_BYTES, "cpu", 1 << 20)


def _subject(**runs: Any) -> Subject:
    """Doubles 1000 numbers."""
    case = Case(
        name="double",
        shape={"N": 1000},
        dtype=torch.float32,
        flop=1000,
        bytes=8000,
        inputs=lambda device: torch.randn(1000, device=device),
        exact=lambda x: [x.double() * 2],
        tolerances=[1e-6],
        runs={"reference": lambda x: x * 2, **runs},
    )
    return Subject(name="doubling", about="twice a number", cases=lambda device: [case])


def _main(subject: Subject, *args: str | Path) -> int:
    try:
        harness.main(subject, ["--device", "cpu", "--seconds", "0.01", *map(str, args)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _raises(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("not on this machine")


def test_right_runs_are_timed_and_peers_that_fail_or_are_wrong_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def doubles_in_place(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)  # every check gets fresh inputs

    subject = _subject(in_place=doubles_in_place, rough=lambda x: x * (2 + 1e-5), wrong=lambda x: x * 2.1, broken=_raises)
    assert _main(subject, "--out", tmp_path, "--commit", "abc") == 0
    rows = {row.run: row for row in read_rows(tmp_path / "doubling.jsonl")}
    assert list(rows) == ["reference", "in_place", "rough", "wrong", "broken"]
    assert rows["wrong"].failed.startswith("wrong: output 0 is off by 5.0e-02")
    assert rows["broken"].failed == "failed: RuntimeError: not on this machine"
    row = rows["reference"]
    assert row.ours
    assert not rows["in_place"].ours
    assert 0 < row.p10_s <= row.median_s <= row.p90_s
    assert row.repeats >= harness.MIN_REPEATS
    assert row.peak_bytes == pytest.approx(4000, abs=SCALARS)
    assert rows["in_place"].peak_bytes <= SCALARS
    assert row.floor_s == pytest.approx(
        max(1000 / row.device["rates"]["matmul_flop_s"]["float32"], 8000 / row.device["rates"]["copy_bytes_s"])
    )
    assert row.device["commit"] == "abc"
    assert row.device["torch"] == torch.__version__
    assert (tmp_path / "doubling.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "| double N=1000 | float32 | reference |" in table
    assert "not on this machine" in table
    assert "| rough | 5.0e-06 (!) |" in table  # beyond the tolerance, but still the same computation


def test_a_wrong_answer_of_ours_ends_with_status_1_and_is_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(_subject(kernel=lambda x: x * float("nan")), "--out", tmp_path) == 1
    assert "kernel: output 0 is off by nan" in capsys.readouterr().err
    assert _main(_subject(kernel=_raises), "--out", tmp_path) == 1
    assert not (tmp_path / "doubling.jsonl").exists()


def test_a_smaller_case_is_checked_in_place_of_a_large_one() -> None:
    [small] = _subject().cases(CPU)
    runs = {"reference": lambda x: x * (2 if len(x) == 1000 else 3)}
    large = Case(**{**vars(small), "runs": runs, "inputs": lambda device: torch.ones(7), "check_on": Case(**{**vars(small), "runs": runs})})
    [row] = harness.measure("doubling", large, CPU, Rates(CPU), seconds=0.01, quick=True)
    assert row.errors == [0.0]
    assert row.peak_bytes == pytest.approx(28, abs=SCALARS)


def test_slower_or_larger_than_the_baseline_ends_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU by the ratio to a peer in the same run; a hundredth of a ratio is no noise."""
    subject = _subject(peer=lambda x: x + x)
    assert _main(subject, "--out", tmp_path) == 0
    own, peer = (json.loads(line) for line in (tmp_path / "doubling.jsonl").read_text().splitlines())

    def against(factor: float, **changed: Any) -> int:
        slower = {name: own[name] * factor for name in ("median_s", "p10_s", "p90_s")}
        lines = [{"subject": "swap"}, {**own, **slower, **changed}, peer]
        (tmp_path / "baseline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return _main(subject, "--compare", tmp_path / "baseline.jsonl")

    assert against(100.0) == 0
    assert "no regression" in capsys.readouterr().out
    assert against(100.0, device={"name": "another"}) == 0, "ratios are compared between machines"
    assert against(0.01) == 1
    shown = capsys.readouterr().out
    assert "doubling double {'N': 1000} float32 reference: × " in shown
    assert "of peer, baseline × " in shown
    assert against(100.0, peak_bytes=3000) == 1
    assert "bytes, baseline 3,000" in capsys.readouterr().out
    assert against(100.0, case="triple") == 2
    assert "no row about these cases" in capsys.readouterr().err


def test_on_a_gpu_times_are_held_against_those_of_the_same_device() -> None:
    row = Row(subject="norm", case="forward", shape={"T": 1}, dtype="bfloat16", run="kernel", ours=True, device={"name": "H200"})
    before, after = (replace(row, median_s=time, p10_s=time * 0.99, p90_s=time * 1.01) for time in (1.0, 1.2))
    assert regressions([before], [before], "cuda") == []
    assert regressions([before], [after], "cuda") == []
    [line] = regressions([after], [before], "cuda")
    assert "1200.000 ms, baseline 1000.000 ms: × 1.20, over the bound of × 1.07" in line
    with pytest.raises(ValueError, match="its devices are another"):
        regressions([before], [replace(before, device={"name": "another"})], "cuda")


def test_the_baseline_that_is_kept_for_a_cpu_holds_and_a_kernel_slowed_down_is_found() -> None:
    rows = read_rows(ROOT / "benchmarks/baselines/cpu_kernels.jsonl")
    assert {row.subject for row in rows} >= {"attention", "elementwise", "logprob", "moe", "policy_loss"}
    assert regressions(rows, rows, "cpu") == []
    for slowed in [row for row in rows if row.ours and row.run == "reference" and row.subject == "logprob"]:
        slower = replace(slowed, p10_s=slowed.p10_s * 2)
        found = regressions([slower if row is slowed else row for row in rows], rows, "cpu")
        assert len(found) == 1
        assert f"{slowed.case} {slowed.shape} float32 reference: ×" in found[0]


def test_a_profile_is_a_trace_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(_subject(peer=lambda x: x + x), "--profile", "torch", "--run", "peer", "--out", tmp_path) == 0
    [path] = tmp_path.iterdir()
    assert path.name == "doubling-double_N1000_float32-peer.trace.json"
    assert "aten::add" in {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}


@pytest.mark.skipif(torch.cuda.is_available() and shutil.which("ncu") is not None, reason="Nsight Compute can run here")
def test_nsight_compute_without_a_gpu_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(_subject(), "--profile", "ncu", "--out", tmp_path) == 2
    assert "needs a GPU and Nsight Compute" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--case", "triple"], "no case of doubling contains 'triple': double N=1000 float32"),
        (["--run", "other"], "--run other: no such implementation; reference can run here"),
        (["--profile", "torch"], "--profile needs --out"),
        (["--compare", "missing.jsonl"], "--compare missing.jsonl: no such file"),
    ],
)
def test_options_that_do_not_fit_end_with_status_2(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(_subject(), *args) == 2
    assert said in capsys.readouterr().err


def test_a_subject_that_only_moves_bytes_has_a_plot_too(tmp_path: Path) -> None:
    [case] = _subject().cases(CPU)
    subject = Subject(name="moving", about="moves bytes", cases=lambda device: [Case(**{**vars(case), "flop": 0})])
    assert _main(subject, "--out", tmp_path, "--quick") == 0
    assert (tmp_path / "moving.png").exists()


def test_peak_memory_counts_what_lives_at_a_time() -> None:
    def run() -> torch.Tensor:
        first = torch.zeros(1000, dtype=torch.uint8)
        second = first + 1
        del first
        return second + 1  # in what the first left

    assert peak_bytes(run, CPU) == pytest.approx(2000, abs=SCALARS)


def test_without_a_gpu_nothing_is_sampled() -> None:
    with Sampler(CPU) as sampler:
        pass
    assert sampler.report() == {}


def test_on_a_gpu_clocks_power_and_memory_are_sampled_while_a_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's answers are made up; the thread, its interval and what is made of the samples are real."""
    clocks_mhz, two_are_whole = iter([1500, 1200]), threading.Event()

    def clock_mhz(gpu: Any, kind: int) -> int:
        if kind != instruments.pynvml.NVML_CLOCK_SM:
            return 3201
        found = next(clocks_mhz, None)
        if found is None:  # the third sample has begun
            two_are_whole.set()
        return found or 1800

    made_up: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetClockInfo": clock_mhz,
        "nvmlDeviceGetPowerUsage": lambda gpu: 650_000,
        "nvmlDeviceGetTemperature": lambda gpu, kind: 61,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=7 << 30),
    }
    for name, answer in made_up.items():
        monkeypatch.setattr(instruments.pynvml, name, answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    with Sampler(torch.device("cuda")) as sampler:
        assert two_are_whole.wait(60)
    report = sampler.report()
    assert report["driver"] == "580.1"
    assert report["sm_mhz_min"] == 1200
    assert (report["power_w"], report["temperature_c"], report["memory_used_bytes"]) == (650.0, 61.0, 7 << 30)


SCRIPT = '''"""Prints its options.

More of it.
"""
import sys
{subject}
if __name__ == "__main__":
    print({name!r}, *sys.argv[1:], flush=True)
    sys.exit({status})
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, subject, status in (("first", "SUBJECT = 1", 0), ("second", "SUBJECT = 2", 3), ("other", "", 0)):
        (tmp_path / f"{name}.py").write_text(SCRIPT.format(name=name, subject=subject, status=status))
    (tmp_path / "harness.py").write_text('"""No script: `if __name__ == \\"__main__\\":` is in its text only."""\n')
    return tmp_path


def test_without_names_all_subjects_run_and_the_highest_status_counts(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.run_benchmarks(["--seconds", "1"], folder) == 3
    shown = capfd.readouterr()
    assert shown.out == "first --seconds 1\nsecond --seconds 1\n"
    assert "benchmark second ended with status 3" in shown.err
    assert bench.run_benchmarks(["other", "first", "--quick"], folder) == 0
    assert capfd.readouterr().out == "other --quick\nfirst --quick\n"


def test_help_lists_what_there_is_and_an_unknown_name_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run_benchmarks(["--help"], folder) == 0
    kernels, _, others = capsys.readouterr().out.partition("kernels:\n")[2].partition("others")
    assert kernels.split() == ["first", "Prints", "its", "options.", "second", "Prints", "its", "options."]
    assert "other" in others
    with pytest.raises(ValueError, match="no benchmark is called 'third'; there are first, other, second"):
        bench.run_benchmarks(["third"], folder)
    with pytest.raises(ValueError, match="benchmarks come with the source tree only"):
        bench.run_benchmarks([], folder / "missing")


def test_the_command_runs_a_real_subject(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tandem.engine.cli", "bench", "logprob", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert {row.run for row in read_rows(tmp_path / "logprob.jsonl")} == {"reference", "plain torch"}


def test_bench_is_a_command_among_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--help"])
    assert ended.value.code == 0
    assert "logprob" in capsys.readouterr().out
