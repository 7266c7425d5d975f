"""The report: one file, complete, safe to open."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.config import LogConfig, RunConfig
from tandem.engine.log import RunLog, read_metrics
from tandem.engine.plots import figures
from tandem.engine.report import first_and_last, memory_by_phase, merge_by_step, write_report

METRICS = {
    "eval/pass_at_1": 0.5,
    "rollout/reward": 0.25,
    "rollout/success_rate": 0.25,
    "rollout/response_tokens": 30.0,
    "rollout/tokens_per_s": 1000.0,
    "rollout/stop_finished": 0.75,
    "rollout/stop_length": 0.25,
    "train/entropy": 0.5,
    "train/kl": 0.01,
    "train/logprob_diff_max": 1e-6,
    "train/logprob_diff_mean": 1e-7,
}
ATTACK = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&"


def row(prompt_id: str, response: str, **values: Any) -> dict[str, Any]:
    filled = {"prompt_id": prompt_id, "prompt": f"prompt {prompt_id}", "response": response, "answer": "2", "correct": True, "reward": 1.0}
    return filled | {"num_tokens": 4, "stop": "finished"} | values


def make_run(run_dir: Path, *, steps: int = 3, name: str = "toy") -> Path:
    log = RunLog(run_dir, rank=0, num_ranks=1, config=LogConfig(tensorboard=False, progress=False), num_steps=steps)
    (run_dir / "config.json").write_text(json.dumps(RunConfig(name=name, steps=steps).to_dict()))
    with log.phase("sft"):
        log.metrics(-1, {"sft/loss": 2.0, "sft/step": 25})
    log.begin_steps()
    for step in range(steps):
        with log.phase("rollout"):
            pass
        with log.phase("train"):
            pass
        log.rollouts(step, [row("always", f"of step {step}"), row("always", "second sample", correct=False), row(f"only{step}", ATTACK)])
        log.metrics(step, METRICS)
    log.close()
    return run_dir


class Page(HTMLParser):
    """What a browser would fetch, and the elements it would build."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset", "poster", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_fetches_nothing_and_inlines_plotly_once(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert page.tags.count("script") == 2  # plotly.js and the plots
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in text.split("</style>")[0]


def test_the_page_holds_every_plot_of_the_run(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    wanted = "pass@1", "Reward", "Response length", "Entropy", "KL to the reference", "Train/rollout log-prob difference"
    assert set(titles) >= {*wanted, "Stop states", "Time per iteration", "Warm start"}
    assert text.count("Plotly.newPlot(") == len(titles)


def test_plots_without_numbers_are_left_out() -> None:
    assert figures([], []) == []
    assert [figure.title for figure in figures([{"step": 0, "rollout/reward": 0.5, "train/kl": None}], [])] == ["Reward"]


def test_grading_has_a_curve_for_each_domain_in_each_of_its_plots() -> None:
    rows = [
        {"step": step, "reward/math/zero_rate": 0.75, "reward/math/not_graded_rate": 0.1, "reward/math/latency_s_p95": 2.0}
        | {"reward/code/not_graded_rate": 1.0, "reward/code/latency_s_p95": 9.0}  # nothing was graded: no rate of zeros
        for step in range(2)
    ]
    found = {figure.title: {curve["name"]: curve["y"] for curve in figure.data} for figure in figures(rows, [])}
    assert found == {
        "Accuracy by domain": {"math": [0.25, 0.25]},
        "Zero scores by domain": {"math": [0.75, 0.75]},
        "Not graded by domain": {"code": [1.0, 1.0], "math": [0.1, 0.1]},
        "Grading latency by domain": {"code": [9.0, 9.0], "math": [2.0, 2.0]},
    }


def test_text_of_prompts_responses_and_names_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name=ATTACK)
    log = RunLog(run, rank=1, num_ranks=2, config=LogConfig(tensorboard=False, progress=False), num_steps=3)
    for step in range(3):
        log.rollouts(step, [row("attack", ATTACK, prompt=ATTACK, answer=ATTACK, stop=ATTACK)])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "img" not in page.tags
    assert page.tags.count("script") == 2
    assert page.text.count(ATTACK) >= 6  # as text: title, heading, prompt, answer, stop, responses


def test_responses_of_the_first_and_last_iteration_stand_side_by_side(tmp_path: Path) -> None:
    [(first, last)] = first_and_last(make_run(tmp_path) / "rollouts")
    assert (first.step, first.response, last.step, last.response) == (0, "of step 0", 2, "of step 2")
    assert (last.group_correct, last.group_size) == (1, 2)


def test_lines_of_one_step_become_one_row_and_their_times_are_added() -> None:
    lines = [
        {"step": -1, "sft/loss": 1.0},
        {"step": 1, "a": 1, "phase_s/rollout": 1.0, "step_s": 2.0},
        {"step": 0, "a": 0},
        {"step": 1, "b": 2, "phase_s/rollout": 0.5, "step_s": 1.0},
    ]
    assert merge_by_step(lines) == [{"step": 0, "a": 0}, {"step": 1, "a": 1, "b": 2, "phase_s/rollout": 1.5, "step_s": 3.0}]


def test_stages_of_the_warm_start_follow_each_other() -> None:
    lines = [{"step": -1, "sft/step": step, "sft/loss": 1.0} for step in (25, 50, 25, 40)]
    [figure] = figures([], lines)
    assert figure.data[0]["x"] == [25, 50, 75, 90]


def test_bars_show_the_longest_phase_first_and_what_is_in_no_phase() -> None:
    rows = [{"step": step, "step_s": 10.0, "phase_s/train": 3.0, "phase_s/rollout": 5.0} for step in range(2)]
    [figure] = figures(rows, [])
    assert [(bar["name"], bar["y"]) for bar in figure.data] == [("rollout", [5.0, 5.0]), ("train", [3.0, 3.0]), ("in no phase", [2.0, 2.0])]


def test_bars_hold_iterations_only(tmp_path: Path) -> None:
    rows = merge_by_step(read_metrics(make_run(tmp_path)))
    bars = next(figure for figure in figures(rows, []) if figure.title == "Time per iteration").data
    assert {bar["name"] for bar in bars} - {"in no phase"} == {"rollout", "train"}
    assert all(bar["x"] == [0, 1, 2] for bar in bars)


def test_a_run_killed_in_its_first_iteration_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RunConfig(name="toy").to_dict()))
    (tmp_path / "metrics.jsonl").write_text("")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No prompt was seen in two iterations" in text


def test_memory_is_shown_by_turn_at_its_most(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "memory/train/trainer_bytes": 5 << 29, "memory/serve/trainer_bytes": 0},
        {"step": 1, "memory/train/trainer_bytes": 7},
    ]
    assert memory_by_phase(lines) == {"train": {"trainer_bytes": 5 << 29}, "serve": {"trainer_bytes": 0}}
    run = make_run(tmp_path)
    assert "Memory in each turn" not in write_report(run).read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": 0.0} | line) + "\n" for line in lines)
    text = Page(write_report(run).read_text()).text
    assert "Memory in each turn" in text
    assert "2.500" in text  # GiB


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_an_error_that_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    make_run(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"is no run folder.*{missing}"):
        write_report(tmp_path)
