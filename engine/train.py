"""The main loop: generate, grade, update, again.

    torchrun --nproc-per-node 2 -m tandem.engine.train toy_cpu [--field value]

Every rank runs `train()`. In the outer `serving` block the machine belongs to the rollout engine; outside it belongs to Megatron.
"""

import sys

from tandem.engine.build import build
from tandem.engine.config import RunConfig
from tandem.engine.deal import deal_updates
from tandem.engine.errors import clear_errors
from tandem.engine.evaluate import evaluate
from tandem.engine.recipes.registry import parse_recipe
from tandem.engine.reward_training import train_reward_model
from tandem.engine.run import Run, launched_rank
from tandem.engine.sft import warm_start
from tandem.engine.stats import finish_step


def train(config: RunConfig) -> None:
    """Run the recipe from where its run folder stands to its last iteration."""
    if config.preference:
        train_reward_model(config)
        return
    with Run(config) as run, build(run) as parts:
        weights, judge, trainer = parts.weights, parts.judge, parts.trainer
        sampler, buffer, phase = parts.sampler, parts.buffer, run.log.phase
        if not parts.resume():
            warm_start(run, parts)
        run.log.begin_steps()

        for step in run.steps():
            parts.begin_iteration(step)
            with weights.serving(policy_version=step):
                held_out = evaluate(run, parts, step)
                while run.sum(buffer.num_scored) < config.replay.groups_per_update:
                    with weights.serving(policy_version=step), phase("rollout"):  # moves nothing unless an engine was replaced
                        groups = buffer.pop_partial()  # cut by the token budget last time
                        groups += run.draw(sampler, groups, step=step)
                        for group in parts.generation.generate(groups, step, token_budget=run.share(config.rollout.token_budget)):
                            with phase("grade"):  # in the background, while the engine goes on generating
                                if group.is_finished:
                                    judge.submit(group)
                                else:
                                    buffer.push_partial([group])
                                buffer.push_scored(judge.take_scored())
                    with phase("grade"):
                        buffer.push_scored(parts.finish_grading(step))
            with phase("pack"):
                groups = buffer.pop_scored()
                run.observe(sampler, groups)  # success rates steer the next draw
                batch = deal_updates(run, parts, groups, step)
            with phase("reference"):  # the policy at the iteration's start
                recompute = config.loss.reference == "recompute"
                reference = [trainer.logprobs(microbatches) for microbatches in batch.updates] if recompute else None
            with phase("train"):
                parts.begin_updates(step)
                stats = trainer.update(batch.updates, batch.normalisers, reference, references_are_own=True)
            finish_step(run, parts, step, groups, batch, {**held_out, **stats})

        with weights.serving(policy_version=config.steps):
            run.log.metrics(config.steps, evaluate(run, parts, config.steps))


def main() -> None:
    """Entry point of `python -m tandem.engine.train RECIPE …`."""
    with clear_errors(launched_rank()):
        train(parse_recipe(sys.argv[1:]))


if __name__ == "__main__":
    main()
