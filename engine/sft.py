"""Supervised warm start: a random model has nothing to reinforce (2.2, 2.5.2)."""

import time

from tandem.engine.algo.pack import supervised_row
from tandem.engine.build import Parts
from tandem.engine.config import SFTStage
from tandem.engine.data.sft import sft_batches
from tandem.engine.deal import deal_examples
from tandem.engine.run import Run
from tandem.engine.trainer.optimizer import learning_rate


def warm_start(run: Run, parts: Parts) -> None:
    """Train every stage of `config.sft` in order, then save, so that a run that dies later starts at reinforcement."""
    if not run.config.sft:
        return
    with run.log.phase("sft"):
        for number, stage in enumerate(run.config.sft):
            _train_stage(run, parts, stage, number)
    parts.trainer.set_optimizer_config(run.config.trainer.optimizer)
    parts.trainer.reset_optimizer()
    parts.save(step=0)


def _train_stage(run: Run, parts: Parts, stage: SFTStage, number: int) -> None:
    trainer = parts.trainer
    trainer.set_optimizer_config(stage.optimizer)
    started_s, num_tokens = time.monotonic(), 0
    rows = [supervised_row(example.prompt_ids, example.response_ids, i) for i, example in enumerate(parts.sft_examples(stage.max_tokens))]
    of_step = sft_batches([row.num_tokens for row in rows], batch_tokens=stage.batch_tokens, seed=run.config.seed + number)
    num_steps = stage.num_steps(sum(row.num_tokens for row in rows))
    for step, indices in zip(range(num_steps), of_step):  # noqa: B905 (the batches never end)
        batch = [rows[i] for i in indices]
        trainer.set_learning_rate(learning_rate(stage.optimizer, step, num_steps))
        stats = trainer.sft_step(deal_examples(run, parts, batch, seed=step), sum(len(row.response_ids) for row in batch))
        num_tokens += sum(row.num_tokens for row in batch)
        run.log.progress("sft", step + 1, num_steps)
        if step % 25 == 24 or step + 1 == num_steps:
            run.log.metrics(
                -1,
                {
                    "sft/stage": number,
                    "sft/step": step + 1,
                    "sft/loss": stats["loss"],
                    "sft/grad_norm": stats["grad_norm"],
                    "sft/tokens_per_s": num_tokens / (time.monotonic() - started_s),
                },
            )
