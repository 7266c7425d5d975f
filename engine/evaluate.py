"""Greedy pass@1 on held-out prompts: during a run, and of any model folder."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from tandem.engine.build import Parts, stop_token_ids
from tandem.engine.checkpoint.hf_folder import read_hf_config
from tandem.engine.checkpoint.serve_folder import serve_folder
from tandem.engine.config import DataConfig, RepetitionConfig, RewardConfig, RolloutConfig
from tandem.engine.data.images import refuse_images
from tandem.engine.data.prompts import load_prompts
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.reward.domains import DOMAINS
from tandem.engine.reward.judge import Judge
from tandem.engine.rollout.budget import generate_groups, new_group
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.run import Run
from tandem.engine.types import Prompt


def evaluation_is_due(run: Run, step: int) -> bool:
    """At the first and the last version, and every `evaluation.every` iterations between."""
    every = run.config.evaluation.every
    return step in (0, run.config.steps) or (every > 0 and step % every == 0)


def evaluate(run: Run, parts: Parts, step: int) -> dict[str, float]:
    """Pass@1 and mean response length (tokens) of one greedy response per held-out prompt; {} when not due. A collective.

    A response that could not be graded does not pass; `eval/not_graded` is the fraction of them.
    """
    if not parts.eval_prompts or not evaluation_is_due(run, step):
        return {}
    with run.log.phase("evaluate"):
        mine: Sequence[Prompt] = []
        if run.is_leader:
            mine = parts.eval_prompts[run.leaders.index(run.rank) :: len(run.leaders)]
        groups = [new_group(prompt, 1, first_iteration=step, serial=i) for i, prompt in enumerate(mine)]
        num_tokens = 0
        for group in parts.generation.generate(groups, step, temperature=0.0):
            parts.judge.submit(group)
            num_tokens += group.responses[0].num_tokens
        num_correct = sum(group.verdicts[0].correct for group in parts.finish_grading(step))
        # taken here, for those of an iteration are of its rollouts
        num_not_graded = sum(stats.num_not_graded for stats in parts.judge.take_stats().values())
        num_prompts = len(parts.eval_prompts)
        return {
            "eval/pass_at_1": run.sum(num_correct) / num_prompts,
            "eval/not_graded": run.sum(num_not_graded) / num_prompts,
            "eval/response_tokens": run.sum(num_tokens) / num_prompts,
        }


def evaluate_model(
    model: Path,
    prompts: Path,
    *,
    max_response_tokens: int,
    prompt_template: str = "{question}",
    use_chat_template: bool = False,
    num_threads: int = 1,
    reward: RewardConfig = RewardConfig(),  # noqa: B008  (frozen)
) -> dict[str, float]:
    """Greedy pass@1 and mean response length (tokens) of a Hugging Face folder, on the embedded engine in float32.

    Nothing but an end token or the length limit ends a response. One that could not be graded does not pass; `not_graded` is the
    fraction of them.

    Args:
        max_response_tokens: longest response, in tokens.
        prompt_template, use_chat_template: how a question is put, as in `DataConfig`.
        reward: how responses are graded.
    Raises: ValueError for a folder that is no model, or none that can be trained here, a prompts file with a bad line, a prompt that
        cannot be graded, and one with an image, which this engine does not see; GradingError when nothing can be graded any more.
    """
    hf_config = read_hf_config(model)
    tokenizer = load_tokenizer(model)
    context_length = hf_config["max_position_embeddings"]
    config = RolloutConfig(max_response_tokens=max_response_tokens, repetition=RepetitionConfig(max_period=0, ngram=0))
    data = DataConfig(prompt_template=prompt_template, use_chat_template=use_chat_template)
    loaded = load_prompts(prompts, tokenizer, data, context_length=context_length, domains=DOMAINS)
    refuse_images(loaded, "evaluate with rollout.engine=sglang in a run")
    judge = Judge(reward, tokenizer, num_workers=num_threads)
    with (
        contextlib.closing(judge),
        EmbeddedEngine(
            hf_config,
            config,
            dtype="float32",
            context_length=context_length,
            stop_token_ids=stop_token_ids(tokenizer, model),
            num_threads=num_threads,
        ) as engine,
    ):
        judge.check(loaded)
        serve_folder(model, engine, torch.float32)
        groups = generate_groups(
            engine,
            [new_group(prompt, 1) for prompt in loaded],
            config=config,
            context_length=context_length,
            seed_of=lambda group, sample, segment: 0,  # greedy draws no random numbers
            token_budget=None,
            temperature=0.0,
        )
        num_tokens = 0
        for group in groups:
            judge.submit(group)
            num_tokens += group.responses[0].num_tokens
        num_correct = sum(group.verdicts[0].correct for group in judge.finish())
        num_not_graded = sum(stats.num_not_graded for stats in judge.take_stats().values())
    return {
        "pass_at_1": num_correct / len(loaded),
        "response_tokens": num_tokens / len(loaded),
        "not_graded": num_not_graded / len(loaded),
        "num_prompts": float(len(loaded)),
    }
