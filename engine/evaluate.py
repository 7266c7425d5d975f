"""Greedy pass@1 on held-out prompts."""

from collections.abc import Sequence

from tandem.engine.build import Parts
from tandem.engine.rollout.budget import new_group
from tandem.engine.run import Run
from tandem.engine.types import Prompt


def evaluation_is_due(run: Run, step: int) -> bool:
    """At the first and the last version, and every `evaluation.every` iterations between."""
    every = run.config.evaluation.every
    return step in (0, run.config.steps) or (every > 0 and step % every == 0)


def evaluate(run: Run, parts: Parts, step: int) -> dict[str, float]:
    """Pass@1 and mean response length (tokens) of one greedy response per held-out prompt; {} when not due. A collective."""
    if not parts.eval_prompts or not evaluation_is_due(run, step):
        return {}
    with run.log.phase("evaluate"):
        mine: Sequence[Prompt] = []
        if run.is_leader:
            mine = parts.eval_prompts[run.leaders.index(run.rank) :: len(run.leaders)]
        groups = [new_group(prompt, 1, first_iteration=step) for prompt in mine]
        num_correct = num_tokens = 0
        for group in parts.generate(groups, step, temperature=0.0):
            num_correct += parts.judge.score(group).verdicts[0].correct
            num_tokens += group.responses[0].num_tokens
        parts.num_generated = 0
        num_prompts = len(parts.eval_prompts)
        return {
            "eval/pass_at_1": run.sum(num_correct) / num_prompts,
            "eval/response_tokens": run.sum(num_tokens) / num_prompts,
        }
