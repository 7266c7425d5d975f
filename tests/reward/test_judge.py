"""The judge chooses the grader, never waits for one, and never takes a failure for a wrong answer."""

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.config import RewardConfig
from tandem.engine.reward import judge as judge_module
from tandem.engine.reward.judge import GradingError, Judge
from tandem.engine.reward.workers import WorkerPool
from tandem.engine.types import Grader, Group, Prompt, Response, Segment, StopState, Verdict
from tests.reward import worker_calls as calls
from tests.reward.test_workers import is_running
from tests.reward.worker_grader import WorkerGrader


class ByteTokenizer:
    """Bytes, and 256 as the end token."""

    eos_token_id: int | None = 256
    pad_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: object, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return bytes(token for token in token_ids if token < 256).decode()  # type: ignore[attr-defined]


class ByHand:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.futures: list[tuple[str, Future[Verdict]]] = []

    def check(self, prompt: Prompt) -> None:
        pass

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Future[Verdict]:
        self.futures.append((text, Future()))
        return self.futures[-1][1]

    def close(self) -> None:
        pass


class AtOnce:
    """Answers at once as a function says."""

    def __init__(self, verdict_of: Callable[[str], Verdict]) -> None:
        self._verdict_of = verdict_of

    def check(self, prompt: Prompt) -> None:
        pass

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Verdict:
        return self._verdict_of(text)

    def close(self) -> None:
        pass


UNGRADED = Verdict(correct=False, reason="nobody knows", graded=False)


def group_of(
    *texts: str, domain: str = "arithmetic", answer: str = "18", stop: StopState = StopState.FINISHED, serial: int = 0, grading: str = ""
) -> Group:
    token_ids = [(*text.encode(), 256) for text in texts]
    segments = [Segment(token_ids=ids, logprobs=(0.0,) * len(ids), policy_version=0) for ids in token_ids]
    return Group(
        prompt=Prompt(id="p", text="", token_ids=(1,), answer=answer, domain=domain, grading=grading),
        responses=tuple(Response(sample=i, segments=(segment,), stop=stop) for i, segment in enumerate(segments)),
        serial=serial,
    )


@contextlib.contextmanager
def judge_with(grader: Grader | None = None, **options: Any) -> Iterator[Judge]:
    """A judge whose arithmetic is graded by `grader`, if one is given."""
    judge = Judge(RewardConfig(**options), ByteTokenizer())
    if grader is not None:
        judge._graders["arithmetic"] = grader
    with contextlib.closing(judge):
        yield judge


def verdicts(group: Group, **options: Any) -> list[tuple[bool, bool]]:
    with judge_with(**options) as judge:
        judge.submit(group)
        (scored,) = judge.finish()
    assert scored.responses == group.responses
    return [(verdict.correct, verdict.graded) for verdict in scored.verdicts]


def test_the_domain_chooses_the_grader() -> None:
    assert verdicts(group_of("A:18.", "it is 18")) == [(True, True), (False, True)]
    assert verdicts(group_of("A:18.", "it is 18", domain="math")) == [(True, True), (True, True)]
    assert verdicts(group_of("the answer is Eighteen", "18.5", domain="k12", answer="eighteen")) == [(True, True), (False, True)]


def test_a_cut_arithmetic_response_is_wrong_and_a_cut_math_response_needs_its_answer_marked() -> None:
    for stop in (StopState.LENGTH, StopState.REPETITION):
        assert verdicts(group_of("A:18.", stop=stop)) == [(False, True)]
        assert verdicts(group_of("#### 18", "it is 18", domain="math", stop=stop)) == [(True, True), (False, True)]


@pytest.mark.parametrize("domain", ["arithmetic", "math", "k12"])
def test_an_empty_response_is_wrong(domain: str) -> None:
    group = group_of("", domain=domain)
    empty = dataclasses.replace(group, responses=(Response(sample=0, stop=StopState.FINISHED),))
    assert verdicts(empty) == [(False, True)]


def test_only_the_end_of_a_long_response_is_read() -> None:
    assert verdicts(group_of("A:18." + "x" * 20, "x" * 50 + "A:18."), max_response_chars=10) == [(False, True), (True, True)]
    with pytest.raises(ValueError, match=r"reward\.max_response_chars is 0"):
        RewardConfig(max_response_chars=0)


def test_markers_must_stand_in_the_whole_response_one_after_the_other() -> None:
    texts = ["<think>x</think>A:18.", "</think><think>A:18.", "A:18.", "<think>" + "x" * 50 + "</think>A:18."]
    with judge_with(format_markers=("<think>", "</think>"), max_response_chars=20) as judge:
        judge.submit(group_of(*texts))
        (scored,) = judge.finish()
    assert [verdict.well_formed for verdict in scored.verdicts] == [True, False, False, True]
    assert [verdict.correct for verdict in scored.verdicts] == [True, True, True, True]


def test_a_grader_that_raises_leaves_its_response_ungraded_with_the_reason() -> None:
    def fail(text: str) -> Verdict:
        if "deep" in text:
            raise RecursionError(f"too deep: {text}")
        return Verdict(correct=True)

    with judge_with(AtOnce(fail)) as judge:
        judge.submit(group_of("deep", "fine"))
        ((failed, fine),) = (group.verdicts for group in judge.finish())
    assert (failed.correct, failed.graded, failed.reason) == (False, False, "RecursionError: too deep: deep")
    assert (fine.correct, fine.graded) == (True, True)


def test_unknown_domains_empty_groups_and_unfinished_responses_are_errors() -> None:
    with pytest.raises(ValueError, match="domain 'chess'; there are graders for arithmetic, math"):
        verdicts(group_of("x", domain="chess"))
    with pytest.raises(ValueError, match="has no responses"):
        verdicts(group_of())
    with pytest.raises(ValueError, match="sample 0 of prompt 'p' stopped by budget"):
        verdicts(group_of("x", stop=StopState.BUDGET))


def test_prompts_that_cannot_be_graded_are_refused_before_a_run() -> None:
    with judge_with() as judge:
        judge.check([group_of("x", domain=domain, answer="18").prompt for domain in ("arithmetic", "math", "k12")])
        for domain in ("arithmetic", "math", "k12"):
            with pytest.raises(ValueError, match=f"prompt 'p' of domain {domain} cannot be graded: it has no answer"):
                judge.check([group_of("x", domain=domain, answer="").prompt])


def test_groups_come_out_in_the_order_in_which_they_went_in() -> None:
    grader = ByHand()
    with judge_with(grader) as judge:
        for serial in range(3):
            judge.submit(group_of("a", "b", serial=serial))
        futures = [future for _, future in grader.futures]
        for i in (5, 4, 2, 3, 1):
            futures[i].set_result(Verdict(correct=True))
        assert judge.take_scored() == []
        futures[0].set_result(Verdict(correct=False))
        assert [group.serial for group in judge.take_scored()] == [0, 1, 2]
        assert judge.finish() == []


def test_what_cheap_graders_answer_at_once_can_be_taken_at_once() -> None:
    with judge_with() as judge:
        judge.submit(group_of("A:18.", serial=7))
        assert [group.serial for group in judge.take_scored()] == [7]


def test_a_mixture_of_domains_is_scored_in_order_each_by_its_grader() -> None:
    texts = {"arithmetic": "A:18.", "math": r"\boxed{\sqrt{324}}", "k12": "The answer is 18 apples."}
    domains = [random.Random(0).choice(list(texts)) for _ in range(30)]
    with judge_with() as judge:
        for serial, domain in enumerate(domains):
            judge.submit(group_of(texts[domain], "no", domain=domain, serial=serial))
        scored = judge.finish()
        stats = judge.take_stats()
    assert [group.serial for group in scored] == list(range(30))
    assert all([verdict.correct for verdict in group.verdicts] == [True, False] for group in scored)
    assert {domain: of.num_responses for domain, of in stats.items()} == {domain: 2 * domains.count(domain) for domain in set(domains)}
    assert judge.take_stats() == {}


def test_what_is_not_graded_is_tried_again_and_then_given_up() -> None:
    tries: dict[str, int] = {}

    def second_time(text: str) -> Verdict:
        tries[text] = tries.get(text, 0) + 1
        return Verdict(correct=True) if tries[text] > 1 and text != "never" else UNGRADED

    with judge_with(AtOnce(second_time), max_retries=2) as judge:
        judge.submit(group_of("a", "never", "b"))
        (scored,) = judge.finish()
        stats = judge.take_stats()["arithmetic"]
    assert [verdict.graded for verdict in scored.verdicts] == [True, False, True]
    assert tries == {"a": 2, "b": 2, "never": 3}
    assert (stats.num_responses, stats.num_not_graded, stats.num_retries, stats.num_dropped_groups) == (3, 1, 4, 0)


@pytest.mark.parametrize(("rule", "kept"), [("complete", [0, 1, 3]), ("drop", [0, 3])])
def test_a_group_with_an_ungraded_response_is_completed_or_dropped_and_one_without_a_graded_one_is_dropped(
    rule: str, kept: list[int]
) -> None:
    with judge_with(AtOnce(lambda text: UNGRADED if text == "?" else Verdict(correct=True)), not_graded=rule) as judge:
        for serial, texts in enumerate([("a", "b"), ("a", "?"), ("?", "?"), ("b",)]):
            judge.submit(group_of(*texts, serial=serial))
        assert [group.serial for group in judge.finish()] == kept
        assert judge.take_stats()["arithmetic"].num_dropped_groups == 4 - len(kept)


def test_a_run_whose_groups_are_all_dropped_ends_with_the_graders_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "MAX_DROPPED_IN_A_ROW", 3)
    with judge_with(AtOnce(lambda text: UNGRADED if text == "?" else Verdict(correct=True))) as judge:
        for text in ("?", "?", "a", "?", "?"):
            judge.submit(group_of(text))
        assert len(judge.finish()) == 1
        judge.submit(group_of("?"))
        with pytest.raises(GradingError, match=r"the last 3 groups were dropped.*prompt 'p' \(domain arithmetic\): nobody knows"):
            judge.finish()


def test_a_cut_ends_the_wait_for_verdicts_with_those_that_came() -> None:
    grader = ByHand()
    with judge_with(grader, timeout_s=600.0) as judge:
        for serial in range(3):
            judge.submit(group_of("A:18.", serial=serial))
        grader.futures[0][1].set_result(Verdict(correct=True))
        # Called while `finish` waits: by its own report of what has come
        judge._on_progress = lambda completed, total: judge.cut()
        threading.Timer(0.01, grader.futures[1][1].set_result, (Verdict(correct=False),)).start()
        assert [group.serial for group in judge.finish()] == [0, 1]
        assert judge.was_cut
        assert judge.finish() == []


def test_a_grader_that_never_answers_holds_a_run_up_for_the_timeout_only_and_late_answers_change_nothing() -> None:
    grader = ByHand()
    with judge_with(grader, timeout_s=2.0) as judge:
        judge.submit(group_of("a", "b"))
        grader.futures[1][1].set_result(Verdict(correct=True))
        (scored,) = judge.finish()
        assert [verdict.graded for verdict in scored.verdicts] == [False, True]
        assert scored.verdicts[0].reason == "no verdict came for 2 s (reward.timeout_s)"
        judge.submit(group_of("c", serial=1))
        grader.futures[0][1].set_result(Verdict(correct=True))
        assert judge.take_scored() == []
        grader.futures[2][1].set_result(Verdict(correct=False))
        assert [group.serial for group in judge.take_scored()] == [1]
        assert judge.take_stats()["arithmetic"].num_responses == 3


def test_text_with_the_graders_is_bounded_and_the_rest_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "MAX_CHARS_OUT", 100)
    grader, answered = ByHand(), 0
    with judge_with(grader) as judge:
        for _ in range(40):
            judge.submit(group_of("x" * 30))
        while answered < 40:
            assert 1 <= len(grader.futures) - answered <= 4  # 4 x 30 is the first that exceeds it
            grader.futures[answered][1].set_result(Verdict(correct=True))
            answered += 1
            judge.take_scored()
        assert len(grader.futures) == 40


def test_five_thousand_responses_are_graded_by_workers_while_the_caller_goes_on(tmp_path: Path) -> None:
    pool, go = WorkerPool(4, deadline_s=120), tmp_path / "go"
    with judge_with(WorkerGrader(pool, calls.is_answer_late)) as judge:
        groups = [group_of(*(f"{go} A:{i % 3 + 17}." for i in range(10)), serial=serial) for serial in range(500)]
        for group in groups:
            judge.submit(group)
        assert judge.take_scored() == []  # and the caller has come this far
        go.touch()
        scored = judge.finish()
        stats = judge.take_stats()["arithmetic"]
    assert [group.serial for group in scored] == list(range(500))
    assert all([verdict.correct for verdict in group.verdicts] == [i % 3 == 1 for i in range(10)] for group in scored)
    assert (stats.num_responses, stats.num_not_graded) == (5000, 0)
    assert stats.latency_s(0.5) > 0


def test_a_crash_and_a_hang_in_a_worker_cost_one_response_each() -> None:
    texts = ["A:18.", "crash", "A:17.", "hang", "A:18."]
    with judge_with(WorkerGrader(WorkerPool(2, deadline_s=2), calls.crash_or_answer), max_retries=0) as judge:
        judge.submit(group_of(*texts))
        (scored,) = judge.finish()
    assert [(verdict.correct, verdict.graded) for verdict in scored.verdicts] == [
        (True, True),
        (False, False),
        (False, True),
        (False, False),
        (True, True),
    ]
    assert "signal 11" in scored.verdicts[1].reason
    assert "did not end within 2 s" in scored.verdicts[3].reason


def test_a_worker_killed_from_outside_costs_at_most_another_try(tmp_path: Path) -> None:
    pool, go, late = WorkerPool(2, deadline_s=120), tmp_path / "go", tmp_path / "late"
    go.touch()
    with judge_with(WorkerGrader(pool, calls.is_answer_late)) as judge:
        for serial in range(20):
            judge.submit(group_of(*[f"{go if serial < 5 else late} A:18."] * 4))
        scored = judge.take_scored()
        while len(scored) < 5:
            time.sleep(0.005)
            scored += judge.take_scored()
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        late.touch()
        scored += judge.finish()
        stats = judge.take_stats()["arithmetic"]
    assert len(scored) == 20
    assert all(verdict.correct for group in scored for verdict in group.verdicts)
    assert stats.num_retries <= 1


def test_a_killed_run_leaves_no_worker_of_its_graders() -> None:
    program = """
import time
from tandem.engine.reward.workers import WorkerPool
from tests.reward import test_judge as t
with t.judge_with(t.WorkerGrader(WorkerPool(2, deadline_s=600), t.calls.is_answer_late)) as judge:
    judge.submit(t.group_of("/", "/"))
    judge.finish()
    judge.submit(t.group_of("/never", "/never"))
    print(*judge._graders["arithmetic"].pool.worker_pids, flush=True)
    time.sleep(600)
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in pids)
