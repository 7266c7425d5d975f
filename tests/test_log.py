"""What a run writes: metrics, samples, traces, and how it goes on after a kill."""

import builtins
import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tandem.engine.config import LogConfig
from tandem.engine.log import RunLog, read_metrics
from tandem.engine.progress import PlainDisplay, TerminalDisplay, duration, numbers_line
from tandem.engine.trace import TraceWriter, merge_trace, read_part

QUIET = LogConfig(tensorboard=False, progress=False)


def open_log(run_dir: Path, *, rank: int = 0, num_steps: int = 4, config: LogConfig = QUIET) -> RunLog:
    return RunLog(run_dir, rank=rank, num_ranks=2, config=config, num_steps=num_steps)


def test_each_step_is_one_line_at_once_and_nan_is_null(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.metrics(0, {"rollout/reward": 0.5, "train/kl": float("nan"), "train/loss": float("inf"), "note": "x", "count": 3})
    [line] = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 0
    assert line["time"] > 1.7e9
    assert (line["rollout/reward"], line["train/kl"], line["train/loss"], line["note"], line["count"]) == (0.5, None, None, "x", 3)
    log.close()


def test_only_rank_0_writes_metrics(tmp_path: Path) -> None:
    log = open_log(tmp_path, rank=1)
    log.metrics(0, {"a": 1.0})
    log.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_phase_seconds_of_nested_phases_add_up_to_the_step(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with log.phase("serving"):
        with log.phase("rollout"):
            sum(range(200_000))
        with log.phase("rollout"):
            sum(range(200_000))
        sum(range(200_000))
    seconds = log.phase_seconds()
    log.metrics(0, {})
    log.metrics(1, {})
    log.close()
    first, second = read_metrics(tmp_path)
    parts = list(read_part(tmp_path / "trace/rank_0.json"))
    serving = next(event for event in parts if event["name"] == "serving")
    assert seconds["serving"] + seconds["rollout"] == pytest.approx(serving["dur"] / 1e6)  # each nanosecond is counted once
    assert first["phase_s/rollout"] > 0
    assert first["step_s"] >= first["phase_s/serving"] + first["phase_s/rollout"] - 1e-5  # values are rounded to a microsecond
    assert "phase_s/rollout" not in second


def test_a_phase_that_is_open_at_metrics_is_divided_between_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [1.0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: int(clock_s[0] * 1e9))
    log = open_log(tmp_path)
    with log.phase("sft"):
        for _ in range(2):
            clock_s[0] += 3.0
            log.metrics(-1, {})
        with log.phase("data"):
            clock_s[0] += 0.5
            assert log.phase_seconds() == {"data": 0.5, "sft": 0.0}
            log.metrics(-1, {})
            clock_s[0] += 0.25
        clock_s[0] += 1.0
    clock_s[0] += 2.0
    log.metrics(0, {})
    log.close()
    lines = [{name: value for name, value in line.items() if name.endswith("_s") or "/" in name} for line in read_metrics(tmp_path)]
    assert lines == [
        {"step_s": 3.0, "phase_s/sft": 3.0},
        {"step_s": 3.0, "phase_s/sft": 3.0},
        {"step_s": 0.5, "phase_s/data": 0.5, "phase_s/sft": 0.0},
        {"step_s": 3.25, "phase_s/data": 0.25, "phase_s/sft": 1.0},
    ]
    whole = {event["name"]: event["dur"] for event in read_part(tmp_path / "trace/rank_0.json") if event["ph"] == "X"}
    assert whole == {"data": 0.75e6, "sft": 7.75e6}


def test_the_first_step_holds_no_start_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [1.0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: int(clock_s[0] * 1e9))
    log = open_log(tmp_path)
    with log.phase("checkpoint"):
        clock_s[0] += 60.0
    log.begin_steps()
    assert (log.phase_seconds(), log.step_seconds()) == ({}, 0.0)
    with log.phase("rollout"):
        clock_s[0] += 2.0
    log.metrics(0, {})
    log.close()
    [line] = read_metrics(tmp_path)
    assert (line["step_s"], line["phase_s/rollout"]) == (2.0, 2.0)
    assert "phase_s/checkpoint" not in line
    assert {event["name"] for event in read_part(tmp_path / "trace/rank_0.json") if event["ph"] == "X"} == {"checkpoint", "rollout"}


def test_a_phase_that_fails_is_still_in_the_trace(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(KeyError), log.phase("swap"):
        raise KeyError("x")
    with log.phase("train", updates=4) as args:
        args["tokens"] = 12
    log.close()
    events = {event["name"]: event for event in read_part(tmp_path / "trace/rank_0.json")}
    assert "swap" in events
    assert events["train"]["args"] == {"updates": 4, "tokens": 12}


def test_rewind_forgets_later_steps_and_a_half_written_line(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.metrics(-1, {"sft/loss": 2.0})
    for step in range(3):
        log.rollouts(step, [row()])
        log.metrics(step, {"a": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "a"')
    log = open_log(tmp_path)
    log.rewind(1)
    log.metrics(1, {"a": 10})
    log.close()
    assert [(line["step"], line.get("a")) for line in read_metrics(tmp_path)] == [(-1, None), (0, 0), (1, 10)]
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_00000_rank_0.parquet"]


def test_a_half_written_line_is_cut_off_when_nothing_is_rewound(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    log = open_log(tmp_path)
    log.metrics(1, {})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a metrics line"):
        read_metrics(tmp_path)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    log = open_log(tmp_path, config=LogConfig(progress=False))
    log.metrics(-1, {"sft/loss": 0.25})
    for step in range(3):
        log.metrics(step, {"rollout/reward": step / 2, "note": "text"})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("rollout/reward")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert [event.value for event in events.Scalars("sft/loss")] == [0.25]
    assert [event.step for event in events.Scalars("step_s")] == [0, 1, 2]  # of iterations only


def test_wandb_without_the_package_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def without_wandb(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(RuntimeError, match=r"pip install 'tandem-rl\[wandb\]'"):
        open_log(tmp_path, config=LogConfig(wandb_project="p", progress=False))


def row(**values: Any) -> dict[str, Any]:
    filled = {"prompt_id": "a", "prompt": "1+1?", "response": "A:2.", "answer": "2", "extracted": None, "correct": True, "reward": 1.0}
    return filled | {"advantage": 0.0, "num_tokens": 4, "stop": "finished", "num_segments": 1, "policy_versions": [0]} | values


def test_rollouts_have_one_schema_even_where_all_values_are_missing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.rollouts(0, [row(), row(extracted="2")])
    log.rollouts(1, [row(extracted=None, policy_versions=[])])
    log.close()
    paths = sorted((tmp_path / "rollouts").iterdir())
    assert [path.name for path in paths] == ["step_00000_rank_0.parquet", "step_00001_rank_0.parquet"]
    assert pq.read_schema(paths[0]).equals(pq.read_schema(paths[1]))
    assert pq.read_table(paths[0]).to_pylist()[1]["extracted"] == "2"
    assert pq.read_table(paths[1])["step"].to_pylist() == [1]


@pytest.mark.parametrize(("every", "written"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (4, [0, 4, 5]), (0, [])])
def test_rollouts_are_written_at_the_first_the_last_and_every_nth_step(tmp_path: Path, every: int, written: list[int]) -> None:
    log = open_log(tmp_path, num_steps=6, config=LogConfig(tensorboard=False, progress=False, rollouts_every=every))
    assert [step for step in range(6) if log.wants_rollouts(step)] == written
    for step in range(6):
        log.rollouts(step, [row()])
    log.close()
    assert len(list(tmp_path.glob("rollouts/*.parquet"))) == len(written)


def test_the_merged_trace_holds_all_ranks_on_one_clock(tmp_path: Path) -> None:
    logs = [open_log(tmp_path, rank=rank) for rank in range(2)]
    for log in logs:
        with log.phase("rollout"):
            pass
        log.counter("swap", bytes_moved=10.0)
        log.event("resumed", step=3)
    for log in reversed(logs):
        log.close()
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        trace = json.load(file)
    events = trace["traceEvents"]
    assert {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"} == {0: "rank 0", 1: "rank 1"}
    times = {event["pid"]: event["ts"] for event in events if event["name"] == "rollout"}
    assert 0 <= times[0] < times[1] < 1e6  # the first event is at 0, the second rank's phase came after the first's
    assert {event["ph"] for event in events} == {"M", "X", "C", "i"}


def test_a_trace_goes_on_after_a_kill(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, 0)
    writer.instant("before", {})
    writer.flush()
    with (tmp_path / "rank_0.json").open("a") as file:
        file.write('{"ph": "X", "na')
    writer = TraceWriter(tmp_path, 0)
    writer.instant("after", {})
    writer.flush()
    merge_trace(tmp_path, tmp_path / "trace.json.gz")
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    assert [name for name in names if name in ("before", "after")] == ["before", "after"]


NUMBERS = {"rollout/reward": 0.5, "rollout/response_tokens": 33.25, "rollout/tokens_per_s": 4321.0, "eval/pass_at_1": 0.75}


def test_a_log_file_gets_one_line_an_iteration_with_units_and_time_left() -> None:
    text = io.StringIO()
    display = PlainDisplay(Console(file=text, width=60), num_steps=4)
    display.progress("rollout", 3, 10)  # too early to say
    display.step_done(0, NUMBERS, 2.0)
    display.step_done(1, {"rollout/reward": 0.6}, 4.0)
    assert text.getvalue().splitlines() == [
        "iteration 1/4 · reward 0.500 · pass@1 0.750 · length 33.2 tokens · rollout 4,321 tokens/s · 2.0 s · 6.0 s left",
        "iteration 2/4 · reward 0.600 · pass@1 0.750 · length 33.2 tokens · rollout 4,321 tokens/s · 4.0 s · 6.0 s left",
    ]


def test_a_log_file_hears_of_a_long_phase_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock_s[0])
    text = io.StringIO()
    display = PlainDisplay(Console(file=text), num_steps=4)
    for num_finished in range(1, 131):  # one a second
        clock_s[0] += 1.0
        display.progress("rollout", num_finished, 200)
    assert text.getvalue().splitlines() == ["  rollout: 60 of 200 (30%)", "  rollout: 120 of 200 (60%)"]


def test_a_terminal_is_told_of_progress_no_more_often_than_it_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock_s[0])
    display = TerminalDisplay(Console(file=io.StringIO(), force_terminal=True), num_steps=4)
    shown: list[float] = []
    update = display._bars.update

    def record(task: Any, **fields: Any) -> None:
        if fields.get("total"):
            shown.append(fields["completed"])
        update(task, **fields)

    monkeypatch.setattr(display._bars, "update", record)
    display.phase("rollout")
    for num_finished in range(1, 1001):  # a thousand a second
        clock_s[0] += 0.001
        display.progress("rollout", num_finished, 1000)
    display.phase("evaluate")
    display.progress("evaluate", 1, 10)  # another phase begins at once
    display.close()
    assert shown[0] == 1
    assert shown[-2:] == [1000, 1]  # the end of a phase is always shown
    assert len(shown) <= 8


def test_a_bar_comes_back_after_a_phase_within_its_own() -> None:
    display = TerminalDisplay(Console(file=io.StringIO(), force_terminal=True), num_steps=4)
    display.phase("rollout")
    for num_finished in range(1, 4):
        display.progress("rollout", num_finished, 10)
        display.phase("grade")
        display.phase("rollout")
    bar = display._bars.tasks[1]
    display.close()
    assert (bar.description.strip(), bar.completed, bar.total, bar.fields["note"]) == ("rollout", 3, 10, "3 of 10")


def test_the_evaluation_after_the_last_iteration_is_not_called_an_iteration() -> None:
    text = io.StringIO()
    PlainDisplay(Console(file=text), num_steps=4).step_done(4, {"eval/pass_at_1": 0.75}, 2.0)
    assert text.getvalue() == "after 4 iterations · pass@1 0.750\n"


def test_a_terminal_shows_the_phase_the_numbers_and_the_time_left() -> None:
    text = io.StringIO()
    display = TerminalDisplay(Console(file=text, width=100, force_terminal=True), num_steps=4)
    display.phase("rollout")
    display.progress("rollout", 3, 10)
    display.step_done(0, NUMBERS, 2.0)
    display.say("saved a checkpoint")
    display.progress("train", 1, 4)
    display._live.refresh()
    display.close()
    shown = text.getvalue()
    for part in ("iteration 1/4", "6.0 s left", "reward 0.500", "33.2 tokens", "4,321 tokens/s", "train", "1 of 4", "saved a checkpoint"):
        assert part in shown


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0.04, 59.94, 65, 3600, 7800)] == ["0.0 s", "59.9 s", "1 min 05 s", "1 h 00 min", "2 h 10 min"]


def test_missing_numbers_are_left_out() -> None:
    assert numbers_line({"rollout/reward": None, "rollout/response_tokens": 2.0}) == "length 2.0 tokens"
