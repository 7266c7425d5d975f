"""What runs where a GPU is at hand: the order and the limits of benchmarks/gpu.sh, and the benchmark of a training step on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, train_step
from benchmarks.harness import Case
from benchmarks.results import read_rows
from tandem.engine.recipes.registry import parse_recipe

ROOT = Path(__file__).parents[1]
# In place of Python: notes what it is asked to run, and takes as long as a benchmark that hangs.
PYTHON = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$2 $1" in
    *logprob.py) sleep 60 ;;
    *adamw.py) echo "error: wrong"; exit 1 ;;
esac
"""
SUBJECTS = ["logprob", "attention", "policy_loss", "train_step", "sleep", "moe", "elementwise", "adamw", "packing", "repetition"]

WITHOUT_THE_ENGINE = "--noconftest -p tests.kernels.interpreter"
TESTS = [*(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/kernels/test_*.py"))), "tests/checkpoint/test_device_buckets.py"]
# What the engine needs and a machine with torch and triton may lack.
LACKING = ("megatron", "tyro", "plotly", "fastapi", "uvicorn", "math_verify", "datasketch", "cyaron")


def test_a_benchmark_that_hangs_takes_only_its_part_of_the_time_and_the_others_follow_in_order(tmp_path: Path) -> None:
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "BUDGET_S": "27", "COMMIT": "abc"}
    script = ["bash", "benchmarks/gpu.sh", "--quick", str(tmp_path / "out")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240, check=False)
    assert done.returncode == 1
    called = calls.read_text().splitlines()
    benchmarks = [line for line in called if line.startswith("benchmarks/")]
    assert [Path(line.split()[0]).stem for line in benchmarks] == SUBJECTS
    assert all("--quick" in line and "--commit abc" in line for line in benchmarks)
    assert all(("--heavy-first" in line) == ("train_step" not in line and "sleep" not in line) for line in benchmarks)
    tested = [line for line in called if "pytest" in line]
    assert all(f" {WITHOUT_THE_ENGINE} " in line for line in tested)
    assert sorted(word for line in tested for word in line.split() if word.endswith(".py")) == [
        *TESTS[-1:],
        "tests/kernels/test_backend.py",
    ]
    log = (tmp_path / "out/bench.log").read_text()
    assert "failed: logprob, status 124, out of time" in log
    assert "failed: adamw, status 1" in log
    assert log.count("failed: ") == 2
    assert "status 1; results in" in done.stdout


def test_what_runs_on_a_gpu_needs_none_of_the_packages_of_the_engine() -> None:
    without = f"import sys; sys.modules.update(dict.fromkeys({LACKING!r})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", without, "--collect-only", "-q", *WITHOUT_THE_ENGINE.split(), "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stdout


def test_the_loop_is_started_with_options_that_its_recipe_knows(tmp_path: Path) -> None:
    python, calls, site = tmp_path / "python", tmp_path / "calls", tmp_path / "site"
    python.write_text(PYTHON)
    python.chmod(0o755)
    site.mkdir()
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "SGLANG_SITE": str(site), "STEPS": "7"}
    script = ["bash", "benchmarks/gpu_loop.sh", str(tmp_path / "out")]
    subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=110, check=False)
    (started,) = [line for line in calls.read_text().splitlines() if "tandem.engine.train" in line]
    config = parse_recipe(started.split()[2:])
    assert (config.name, config.steps, config.trainer.sleep, config.rollout.sglang.release) == ("gpu_loop", 7, "on", "all")
    assert config.rollout.sglang.extra_args == ("--sampling-backend=pytorch",)
    assert config.rollout.sglang.python is not None


def test_every_subject_is_in_the_script_and_its_parts_add_up() -> None:
    text = (ROOT / "benchmarks/gpu.sh").read_text()
    parts = dict(part.split(":") for part in text.partition("parts=(")[2].partition(")")[0].split())
    on_harness = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\nSUBJECT = " in path.read_text()}
    assert set(parts) - {"csrc", "tests", "train_step", "sleep"} == on_harness
    assert sum(map(int, parts.values())) <= 540 - 20


def test_the_heaviest_case_is_the_first_of_a_run_that_may_be_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(name: str, flop: float, num_bytes: float) -> Case:
        return Case(
            name=name,
            shape={"N": 1},
            dtype=torch.float32,
            flop=flop,
            bytes=num_bytes,
            inputs=lambda _: torch.zeros(1),
            exact=lambda x: [x],
            tolerances=[0.0],
            runs={},
        )

    cases = [case("light", 10, 10), case("moves bytes", 0, 1e6), case("computes", 1e9, 10)]
    seen: list[str] = []
    monkeypatch.setattr(harness, "_run_cases", lambda _subject, cases, *_: seen.extend(case.name for case in cases) or [])
    subject = harness.Subject(name="three", about="", cases=lambda device: cases)
    for options in ([], ["--heavy-first"], ["--heavy-first", "--quick"]):
        harness.main(subject, ["--device", "cpu", *options])
    assert seen == ["light", "moves bytes", "computes", "computes", "moves bytes", "light", "light"]


def test_a_training_step_is_timed_and_its_flop_are_those_of_its_products(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/train_step.py", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "train_step.jsonl")
    assert (row.subject, row.run, row.repeats, row.shape["T"]) == ("train_step", "reference", 2, 512)
    about = row.device
    assert 0 < about["logprob_and_loss_share"] < 1
    assert about["mfu_measured"] == pytest.approx(row.floor_s / row.median_s)
    assert about["mfu_nominal"] is None
    assert about["microbatches"] > 1


def test_sleep_and_wake_are_timed_beside_plain_copies(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/sleep.py", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    out, back = read_rows(tmp_path / "sleep.jsonl")
    assert [(row.case, row.repeats) for row in (out, back)] == [("out", 2), ("back", 2)]
    assert out.bytes == back.bytes == out.device["host_bytes"]
    # 4 bytes of gradient beside 12 of parameter and moments, which alone move
    assert out.device["resident_bytes_awake"] * 3 == pytest.approx(out.bytes * 4, rel=1e-3)


def test_flop_of_a_model_by_hand() -> None:
    shape = train_step.Shape(name="", layers=2, hidden=4, heads=2, kv_heads=1, head=3, ffn=5, vocab=7)
    (batch,) = train_step.pack(train_step.rows(16, (16, 16), 7), 100)  # 2 prompt tokens and 15 of the response on 16 positions
    per_token = 2 * (4 * 6 + 4 * 3 + 4 * 3 + 6 * 4 + 3 * 4 * 5)  # q, k, v, out; gate, up, down
    pairs = 16 * 17 // 2
    forward = 2 * (16 * per_token + 15 * 4 * 7 + 2 * pairs * 2 * 2 * 3)
    assert shape.flop([batch]) == 3 * forward
