"""Figures by domain over all ranks, and when they raise an alarm."""

import json
import random
import statistics

import pytest

from tandem.engine.config import RewardConfig
from tandem.engine.reward.grading_stats import MIN_RESPONSES, DomainStats, RewardAlarm, grading_metrics
from tandem.engine.types import Verdict


def stats_of(num_right: int, num_wrong: int, num_not_graded: int = 0, latencies_s: list[float] | None = None) -> DomainStats:
    stats = DomainStats()
    verdicts = [Verdict(correct=True)] * num_right + [Verdict(correct=False)] * num_wrong
    verdicts += [Verdict(correct=False, graded=False)] * num_not_graded
    for verdict, latency_s in zip(verdicts, latencies_s or [0.1] * len(verdicts), strict=True):
        stats.add(verdict, latency_s)
    return stats


def test_rates_and_quantiles_are_those_of_all_ranks_together() -> None:
    generator = random.Random(0)
    latencies_s = [generator.lognormvariate(-2, 2) for _ in range(400)]
    ranks = [{"math": stats_of(50, 30, 20, latencies_s[i : i + 100])} for i in range(0, 400, 100)]
    ranks[0]["code"] = stats_of(0, 0, 3, [0.0, 0.0, 0.0])
    ranks[1]["idle"] = DomainStats()
    ranks[2]["math"].num_dropped_groups = 2
    metrics = grading_metrics(ranks)
    assert metrics["reward/math/num_responses"] == 400
    assert metrics["reward/math/zero_rate"] == 30 / 80
    assert metrics["reward/math/not_graded_rate"] == 0.2
    assert metrics["reward/math/num_dropped_groups"] == 2
    assert metrics["reward/math/latency_s_median"] == pytest.approx(statistics.median(latencies_s), rel=0.06)
    assert metrics["reward/math/latency_s_p95"] == pytest.approx(sorted(latencies_s)[379], rel=0.06)
    assert metrics["reward/code/not_graded_rate"] == 1.0
    assert "reward/code/zero_rate" not in metrics
    assert not any("idle" in name for name in metrics)
    assert grading_metrics([{}, {}]) == {}


def observed(alarm: RewardAlarm, zero_rate: float, not_graded_rate: float = 0.0, num: int = 1000) -> list[str]:
    num_not_graded = round(not_graded_rate * num)
    num_wrong = round(zero_rate * (num - num_not_graded))
    return alarm.observe(grading_metrics([{"math": stats_of(num - num_not_graded - num_wrong, num_wrong, num_not_graded)}]))


def test_a_rate_of_zero_scores_that_jumps_either_way_rings_once() -> None:
    for before, after in ((0.4, 0.9), (0.9, 0.1)):
        alarm = RewardAlarm(RewardConfig(alarm_jump=0.3))
        assert [observed(alarm, before) for _ in range(5)] == [[]] * 5
        (warning,) = observed(alarm, after)
        assert warning.startswith(f"domain math: the rate of zero scores is {after:.3f}, its running mean {before:.3f}")
        assert [observed(alarm, after) for _ in range(10)] == [[]] * 10  # it goes on, and becomes the mean
        assert len(observed(alarm, before)) == 1


def test_learning_is_no_jump() -> None:
    alarm = RewardAlarm(RewardConfig())
    assert not any(observed(alarm, 0.9 - 0.04 * i) for i in range(20))


def test_ungraded_responses_ring_from_the_first_iteration_on_and_their_end_does_not() -> None:
    alarm = RewardAlarm(RewardConfig(alarm_not_graded=0.05))
    (warning,) = observed(alarm, 0.5, 0.1)
    assert "the rate of responses that could not be graded is 0.100, its running mean 0.000" in warning
    alarm = RewardAlarm(RewardConfig(alarm_not_graded=0.05))
    assert [observed(alarm, 0.5, 0.04) for _ in range(20)] == [[]] * 20
    assert len(observed(alarm, 0.5, 0.2)) == 1
    assert observed(alarm, 0.5, 0.0) == []


def test_a_few_responses_or_iterations_tell_no_jump() -> None:
    alarm = RewardAlarm(RewardConfig())
    assert [observed(alarm, rate) for rate in (0.1, 0.9, 0.1)] == [[]] * 3
    alarm = RewardAlarm(RewardConfig())
    assert [observed(alarm, 0.5) for _ in range(5)] == [[]] * 5
    assert observed(alarm, 1.0, 0.5, num=MIN_RESPONSES - 1) == []


def test_the_state_follows_from_the_metrics_file() -> None:
    rates = [0.5, 0.55, 0.45, 0.5, 0.9, 0.6, 0.1]
    lines = [grading_metrics([{"math": stats_of(1000 - round(1000 * rate), round(1000 * rate))}]) for rate in rates]
    whole = RewardAlarm(RewardConfig())
    said = [whole.observe(line) for line in lines]
    assert sum(map(len, said)) == 2
    for cut in range(len(lines)):
        resumed = RewardAlarm(RewardConfig())
        for line in lines[:cut]:
            resumed.observe(json.loads(json.dumps({"step": 0, "train/loss": None, "hardware": "cpu"} | line)))
        assert [resumed.observe(line) for line in lines[cut:]] == said[cut:]
