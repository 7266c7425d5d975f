"""Grading within the loop: how fast it is changes nothing, and what becomes of responses that could not be graded."""

import dataclasses
import json
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tandem.engine.config import CheckpointConfig, DataConfig, EvaluationConfig, LogConfig, RewardConfig
from tandem.engine.log import read_metrics
from tandem.engine.reward import judge as judge_module
from tandem.engine.reward.domains import ArithmeticGrader
from tandem.engine.reward.workers import WorkerPool
from tandem.engine.train import train
from tandem.engine.types import Group, Prompt, Verdict
from tests.launched import Launched
from tests.ranks import run_ranks
from tests.reward import worker_calls as calls
from tests.reward.worker_grader import WorkerGrader, share_of
from tests.small_toy import small_toy, steps_of, weights_of

SHARE = 1 / 16  # of the responses that a test has the grader fail on
SHOWN: dict[str, Any] = {
    "evaluation": EvaluationConfig(every=0, max_prompts=4),
    "log": LogConfig(tensorboard=False, rollouts_every=1, progress=False),
}
TWO_STEPS: dict[str, Any] = {"steps": 2, "checkpoint": CheckpointConfig(every=1, keep=4), **SHOWN}


class SometimesLate(WorkerGrader):
    """Passes its deadline, and loses its worker, on some texts of each prompt: so many times on each."""

    def __init__(self, num_failures: int) -> None:
        super().__init__(WorkerPool(2, deadline_s=60), calls.is_arithmetic_answer)
        self._num_failures = num_failures
        self._failures: dict[str, int] = defaultdict(int)

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Future[Verdict]:
        key = prompt.id + text
        if share_of(key) < SHARE and self._failures[key] < self._num_failures:
            self._failures[key] += 1
            return self.when_done(self.pool.submit(calls.sleep, 600, deadline_s=0.05), is_complete=is_complete)
        return super().grade(text, prompt, is_complete=is_complete)


def graded_by(monkeypatch: pytest.MonkeyPatch, opened: Callable[[], WorkerGrader]) -> None:
    """Ranks, which are forked later, open this grader for any domain."""
    monkeypatch.setattr(judge_module, "open_grader", lambda domain, config, *, num_workers: opened())


def copy_of(run_dir: Path, name: str) -> Path:
    return Path(shutil.copytree(run_dir, run_dir.with_name(name)))


def rows_of(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of the first iteration, by prompt."""
    rows = defaultdict(list)
    for rank in (0, 1):
        for row in pq.read_table(run_dir / "rollouts" / f"step_00000_rank_{rank}.parquet").to_pylist():
            rows[row["prompt_id"]].append(row)
    return dict(rows)


def is_late(row: dict[str, Any]) -> bool:
    """Whether `SometimesLate` fails on this response."""
    return share_of(row["prompt_id"] + row["response"]) < SHARE


@pytest.fixture(scope="module")
def plain(warm_started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations with verdicts that come at once, and checkpoints of both."""
    folder = Path(shutil.copytree(warm_started, tmp_path_factory.mktemp("plain") / "run"))
    run_ranks(train, 2, small_toy(folder, **TWO_STEPS))
    return folder


def test_how_long_each_verdict_takes_changes_nothing_and_a_resumed_run_is_the_same(
    run_dir: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = run_dir
    graded_by(monkeypatch, lambda: SometimesLate(num_failures=0))
    run_ranks(train, 2, small_toy(slow, **TWO_STEPS))
    assert weights_of(slow, 2) == weights_of(plain, 2)
    assert steps_of(slow)[0]["reward/arithmetic/latency_s_median"] > steps_of(plain)[0]["reward/arithmetic/latency_s_median"]
    shutil.rmtree(slow / "checkpoints" / "step_00000002")
    run_ranks(train, 2, small_toy(slow, **TWO_STEPS))
    assert weights_of(slow, 2) == weights_of(plain, 2)


def test_a_verdict_at_the_second_try_is_as_good_as_one_at_the_first(run_dir: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retried = run_dir
    graded_by(monkeypatch, lambda: SometimesLate(num_failures=1))
    run_ranks(train, 2, small_toy(retried, steps=1, reward=RewardConfig(max_retries=1), **SHOWN))
    assert weights_of(retried, 1) == weights_of(plain, 1)
    (line,) = steps_of(retried)
    assert line["reward/arithmetic/num_retries"] > 0
    assert (line["reward/arithmetic/not_graded_rate"], line["reward/arithmetic/num_dropped_groups"]) == (0, 0)


def test_groups_with_ungraded_responses_are_completed_from_the_others_or_dropped(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropping = copy_of(run_dir, "dropping")
    graded_by(monkeypatch, lambda: SometimesLate(num_failures=1000))
    shown = SHOWN | {"evaluation": EvaluationConfig(every=0)}
    reward = RewardConfig(max_retries=0, alarm_not_graded=0.01)
    run_ranks(train, 2, small_toy(run_dir, steps=1, reward=reward, **shown))
    run_ranks(train, 2, small_toy(dropping, steps=1, reward=dataclasses.replace(reward, not_graded="drop"), **shown))

    completed, kept = rows_of(run_dir), rows_of(dropping)
    for rows in completed.values():
        assert all(("did not end within" in row["reason"]) == is_late(row) for row in rows)
        rewards = [row["reward"] for row in rows if not is_late(row)]
        mean = sum(rewards) / len(rewards)
        for row in rows:
            assert row["advantage"] == pytest.approx(0.0 if is_late(row) else row["reward"] - mean, abs=1e-6)

    whole = {prompt_id for prompt_id, rows in completed.items() if not any(map(is_late, rows))}
    assert kept.keys() == whole
    assert 0 < len(whole) < len(completed)
    (of_completed,), (of_kept,) = steps_of(run_dir), steps_of(dropping)
    assert of_completed["reward/arithmetic/num_dropped_groups"] == 24 - len(completed)
    assert of_kept["reward/arithmetic/num_dropped_groups"] == 24 - len(whole)
    assert of_kept["rollout/num_responses"] == 8 * len(whole)
    assert of_kept["reward/arithmetic/num_responses"] == of_completed["reward/arithmetic/num_responses"] == 8 * 24
    assert of_kept["reward/arithmetic/not_graded_rate"] == of_completed["reward/arithmetic/not_graded_rate"] > 0.01
    evaluated = {folder: [line for line in read_metrics(folder) if "eval/pass_at_1" in line] for folder in (run_dir, dropping)}
    assert any(line["eval/not_graded"] > 0 for line in evaluated[run_dir])
    assert evaluated[dropping][0]["eval/pass_at_1"] == evaluated[run_dir][0]["eval/pass_at_1"]
    for folder in (run_dir, dropping):
        assert "reward alarm" in (folder / "trace" / "rank_0.json").read_text()


class NeverAnswers(ArithmeticGrader):
    """Once `is_silent` says so."""

    def __init__(self, is_silent: Callable[[], bool]) -> None:
        self._is_silent = is_silent

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Any:
        return Future() if self._is_silent() else super().grade(text, prompt, is_complete=is_complete)


def stop_in_second_wait(rank: int) -> None:
    """For `Launched`: verdicts on rollouts never come, and SIGTERM comes when the rank begins to wait for them."""
    finish, num_waits = judge_module.Judge.finish, 0

    def watched(self: judge_module.Judge) -> list[Group]:
        nonlocal num_waits
        num_waits += 1  # the first is the evaluation's
        if num_waits == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish(self)

    judge_module.Judge.finish = watched
    judge_module.open_grader = lambda domain, config, *, num_workers: NeverAnswers(lambda: num_waits > 0)


def test_sigterm_cuts_the_wait_for_verdicts_and_the_run_goes_on_as_if_nothing_had_been(run_dir: Path, plain: Path, tmp_path: Path) -> None:
    launched = Launched(small_toy(run_dir, **TWO_STEPS), tmp_path / "stopped", prepare=stop_in_second_wait)
    assert launched.wait(240) == [143, 143], launched.output()
    assert "Stopped by SIGTERM; started again, the run goes on with iteration 0" in launched.output()
    run_ranks(train, 2, small_toy(run_dir, **TWO_STEPS))
    assert weights_of(run_dir, 2) == weights_of(plain, 2)


def test_a_run_of_which_nothing_can_be_graded_ends_and_says_why(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "MAX_DROPPED_IN_A_ROW", 5)
    monkeypatch.setattr(f"{__name__}.SHARE", 2.0)
    graded_by(monkeypatch, lambda: SometimesLate(num_failures=1000))
    with pytest.raises(
        RuntimeError, match=r"the last 5 groups were dropped because responses could not be graded.*did not end within 0.05 s"
    ):
        run_ranks(train, 2, small_toy(run_dir, steps=1, reward=RewardConfig(max_retries=0), **SHOWN))


def run_on(prompts: Path, records: list[dict[str, str]]) -> list[dict[str, Any]]:
    """One iteration of an untrained model on these prompts; its metrics."""
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    run_dir = prompts.with_suffix("")
    config = small_toy(run_dir, steps=1, data=DataConfig(prompts=str(prompts)), sft=(), **SHOWN)
    run_ranks(train, 2, config)
    return steps_of(run_dir)


def test_a_mixture_of_domains_is_graded_and_reported_by_domain(tmp_path: Path) -> None:
    domains = ("arithmetic", "math", "k12")
    records = [{"id": f"{domain}{i}", "question": f"{i}+2+3?", "answer": "0", "domain": domain} for domain in domains for i in range(8)]
    (line,) = run_on(tmp_path / "mixed.jsonl", records)
    for domain in domains:
        assert line[f"reward/{domain}/num_responses"] == 8 * 8
        assert line[f"reward/{domain}/latency_s_p95"] >= line[f"reward/{domain}/latency_s_median"] > 0
        assert 0 <= line[f"reward/{domain}/zero_rate"] <= 1


def test_a_prompt_that_can_never_be_graded_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    record = {"id": "why", "question": "Why?", "domain": "k12", "answer": "Because the water evaporates and then condenses on the lid."}
    with pytest.raises(RuntimeError, match=r"prompt 'why' of domain k12 cannot be graded: its answer .* is for a model judge"):
        run_on(tmp_path / "essay.jsonl", [record])
