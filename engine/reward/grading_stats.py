"""What grading was like in one iteration, by domain, and the alarm when it changes."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.engine.config import RewardConfig
from tandem.engine.types import Verdict

# Latencies are counted in classes 5 % wide: of any number of responses, and of all ranks, a quantile then costs a few dozen counts.
_CLASS_RATIO = 1.05
_SHORTEST_S = 1e-6
# The running mean of a rate moves by this share of the difference: it remembers about five iterations.
_NEWEST_SHARE = 0.2
# A rate of fewer responses is too noisy, and a mean of fewer iterations too, to tell a jump.
MIN_RESPONSES = 32
MIN_ITERATIONS = 3


@dataclass(kw_only=True)
class DomainStats:
    """Counts of responses that have their final verdict."""

    num_responses: int = 0
    num_wrong: int = 0
    num_not_graded: int = 0
    num_retries: int = 0
    num_dropped_groups: int = 0
    latencies: Counter[int] = field(default_factory=Counter)  # from submission to verdict, by class

    def add(self, verdict: Verdict, latency_s: float) -> None:
        self.num_responses += 1
        self.num_not_graded += not verdict.graded
        self.num_wrong += verdict.graded and not verdict.correct
        self.latencies[math.ceil(math.log(max(latency_s, _SHORTEST_S), _CLASS_RATIO))] += 1

    def merge(self, other: "DomainStats") -> None:
        for name in ("num_responses", "num_wrong", "num_not_graded", "num_retries", "num_dropped_groups"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latencies.update(other.latencies)

    def latency_s(self, quantile: float) -> float:
        """In seconds, at most 5 % too long. There must be responses."""
        rank, seen = math.ceil(quantile * self.num_responses), 0
        for latency, count in sorted(self.latencies.items()):
            seen += count
            if seen >= rank:
                return _CLASS_RATIO**latency
        raise AssertionError("there are no responses")


def grading_metrics(of_ranks: Iterable[Mapping[str, DomainStats]]) -> dict[str, float]:
    """Metrics `reward/DOMAIN/…` over all ranks, of the domains with responses.

    num_responses; latency_s_median and latency_s_p95, seconds from the end of generation to the verdict, the wait in the queue and retries
    included; zero_rate, of the graded ones that are wrong (missing when none was graded); not_graded_rate; num_retries;
    num_dropped_groups.
    """
    domains: dict[str, DomainStats] = {}
    for stats in of_ranks:
        for domain, of_rank in stats.items():
            domains.setdefault(domain, DomainStats()).merge(of_rank)
    metrics: dict[str, float] = {}
    for domain, total in sorted(domains.items()):
        if not total.num_responses:
            continue
        num_graded = total.num_responses - total.num_not_graded
        values = {
            "num_responses": total.num_responses,
            "latency_s_median": total.latency_s(0.5),
            "latency_s_p95": total.latency_s(0.95),
            **({"zero_rate": total.num_wrong / num_graded} if num_graded else {}),
            "not_graded_rate": total.num_not_graded / total.num_responses,
            "num_retries": total.num_retries,
            "num_dropped_groups": total.num_dropped_groups,
        }
        metrics |= {f"reward/{domain}/{name}": value for name, value in values.items()}
    return metrics


@dataclass
class _Mean:
    value: float
    num_iterations: int = 0
    is_ringing: bool = False


class RewardAlarm:
    """Compares an iteration's `grading_metrics` with running means over those before it.

    It rings when a domain's zero_rate differs from its mean, in either direction (a grader that lets everything pass is no better than
    one that lets nothing), by more than `reward.alarm_jump`, or its not_graded_rate exceeds its mean by more than
    `reward.alarm_not_graded`. The mean of the latter begins at 0, as it should be; that of the former begins with the first iteration
    and counts from the fourth on. Iterations with fewer than 32 responses of a domain are left out. An alarm that goes on rings once.

    Its state follows from the metrics alone: a run that resumes observes those in metrics.jsonl again.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._means: dict[str, _Mean] = {}

    def observe(self, metrics: Mapping[str, Any]) -> list[str]:
        """One sentence for each alarm that begins in this iteration."""
        warnings = []
        for name, rate in metrics.items():
            part, _, rest = name.partition("/")
            domain, _, kind = rest.partition("/")
            if part != "reward" or kind not in ("zero_rate", "not_graded_rate") or rate is None:
                continue
            if metrics[f"reward/{domain}/num_responses"] < MIN_RESPONSES:
                continue
            mean = self._means.setdefault(name, _Mean(0.0 if kind == "not_graded_rate" else rate))
            if kind == "zero_rate":
                jumped = mean.num_iterations >= MIN_ITERATIONS and abs(rate - mean.value) > self._config.alarm_jump
            else:
                jumped = rate - mean.value > self._config.alarm_not_graded
            if jumped and not mean.is_ringing:
                what = "zero scores" if kind == "zero_rate" else "responses that could not be graded"
                warnings.append(f"domain {domain}: the rate of {what} is {rate:.3f}, its running mean {mean.value:.3f}")
            mean.is_ringing = jumped
            mean.value += _NEWEST_SHARE * (rate - mean.value)
            mean.num_iterations += 1
        return warnings
