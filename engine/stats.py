"""The end of an iteration: what its rollouts looked like over all ranks, what is logged, and the checkpoint."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tandem.engine.build import Parts
from tandem.engine.deal import DealtBatch
from tandem.engine.resident import memory_metrics
from tandem.engine.reward.grading_stats import grading_metrics
from tandem.engine.run import Run
from tandem.engine.types import Group, StopState, Tokenizer

# Phases that are the work itself; the rest of a step is overhead, grading too, though the engine generates meanwhile. Held-out
# evaluation is neither.
COMPUTE_PHASES = ("rollout", "reference", "train")


def finish_step(run: Run, parts: Parts, step: int, groups: Sequence[Group], batch: DealtBatch, stats: dict[str, float]) -> None:
    """Write samples and metrics, and the checkpoint when due. A collective.

    The checkpoint comes last: a run that is killed before it does this step again, and one that is killed after it lacks no line.
    Its time is booked on the next line.
    """
    with run.log.phase("log"):
        if run.log.wants_rollouts(step):
            run.log.rollouts(step, rollout_rows(groups, batch, parts.tokenizer))
        metrics = {name if name.startswith("eval/") else f"train/{name}": value for name, value in stats.items()}
        metrics |= rollout_stats(run, groups, batch, step)
        metrics |= grading_metrics(run.gather(parts.judge.take_stats()))
        for warning in parts.alarm.observe(metrics):
            run.log.event("reward alarm", step=step, warning=warning)
            run.log.say(f"Reward alarm in iteration {step}: {warning}.")
        metrics["rollout/new_tokens"] = run.sum(parts.generation.num_tokens)
        num_reused = run.sum(parts.generation.num_reused)
        metrics |= memory_metrics(run.gather(parts.weights.take_memory()))
        metrics["length_penalty/weight"] = run.config.length_penalty.weight_at(step)
    seconds = run.log.phase_seconds()
    compute_s = sum(seconds.get(name, 0.0) for name in COMPUTE_PHASES)
    step_s = run.log.step_seconds() - seconds.get("evaluate", 0.0)
    metrics["overhead_fraction"] = 1.0 - compute_s / step_s
    num_generated = metrics["rollout/new_tokens"] - num_reused
    metrics["rollout/tokens_per_s"] = num_generated / max(1e-9, seconds["rollout"] + seconds.get("grade", 0.0))
    metrics["train/tokens_per_s"] = stats.get("tokens", 0) / max(1e-9, seconds["train"])
    run.log.metrics(step, metrics)
    parts.checkpoint_if_due(step + 1)


def rollout_stats(run: Run, groups: Sequence[Group], batch: DealtBatch, step: int) -> dict[str, float]:
    """Means over all responses that reach the trainer in this iteration. A collective; the same on every rank.

    `rollout/response_tokens` counts tokens per response, `rollout/stop_*` are fractions, `rollout/stale_tokens` is the fraction of
    tokens that an earlier policy generated.
    """
    counts: Counter[str] = Counter()
    rewards = iter(batch.scores.rewards_R.tolist())
    for group in groups:
        counts["groups"] += 1
        counts["mixed_groups"] += 0 < group.success_rate < 1
        counts["waited"] += step - group.first_iteration
        for response, verdict in zip(group.responses, group.verdicts, strict=True):
            counts["responses"] += 1
            counts["correct"] += verdict.correct
            counts["not_graded"] += not verdict.graded
            counts["reward"] += next(rewards)
            counts["tokens"] += response.num_tokens
            counts["stale"] += sum(len(segment.token_ids) for segment in response.segments if segment.policy_version != step)
            counts[f"stop_{response.stop}"] += 1
            counts["resumed"] += len({segment.policy_version for segment in response.segments}) > 1
    longest = max(run.gather(max((r.num_tokens for g in groups for r in g.responses), default=0)))
    total: Counter[str] = Counter()
    for of_rank in run.gather(counts):
        total.update(of_rank)
    num_responses, num_groups = max(1, total["responses"]), max(1, total["groups"])
    finals = [state for state in StopState if state.is_final]
    return {
        "rollout/num_responses": total["responses"],
        "rollout/success_rate": total["correct"] / num_responses,
        "rollout/not_graded": total["not_graded"] / num_responses,
        "rollout/reward": total["reward"] / num_responses,
        "rollout/response_tokens": total["tokens"] / num_responses,
        "rollout/response_tokens_max": longest,
        "rollout/stale_tokens": total["stale"] / max(1, total["tokens"]),
        "rollout/resumed": total["resumed"] / num_responses,
        "rollout/mixed_groups": total["mixed_groups"] / num_groups,
        "rollout/iterations_waited": total["waited"] / num_groups,
        **{f"rollout/stop_{state}": total[f"stop_{state}"] / num_responses for state in finals},
    }


def rollout_rows(groups: Sequence[Group], batch: DealtBatch, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One row per response of this leader's groups, for people to read."""
    scores = zip(batch.scores.rewards_R.tolist(), batch.scores.advantages_R.tolist(), strict=True)
    return [
        {
            "prompt_id": group.prompt.id,
            "sample": response.sample,
            "level": group.prompt.level,
            "domain": group.prompt.domain,
            "prompt": group.prompt.text,
            "response": tokenizer.decode(response.token_ids, skip_special_tokens=True),
            "answer": group.prompt.answer,
            "extracted": verdict.answer,
            "reason": verdict.reason,
            "correct": verdict.correct,
            "reward": reward,
            "advantage": advantage,
            "num_tokens": response.num_tokens,
            "stop": str(response.stop),
            "num_segments": len(response.segments),
            "policy_versions": sorted(set(response.policy_versions)),
        }
        for group in groups
        for response, verdict, (reward, advantage) in zip(group.responses, group.verdicts, scores, strict=False)
    ]
