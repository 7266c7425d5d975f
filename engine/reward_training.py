"""Training a classic reward model on preference pairs: `tandem train` with stages in `RunConfig.preference`.

The same run folder, layouts, checkpoints and resume as a run of reinforcement; no engine, no prompts. Steps count over all stages.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tandem.engine.algo.preference import PairRows, deal_pairs, pair_rows
from tandem.engine.architecture import Architecture
from tandem.engine.checkpoint.disk import load_latest
from tandem.engine.checkpoint.hf_folder import load_hf_weights
from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.config import ArithmeticTask, RunConfig, SFTStage
from tandem.engine.data.arithmetic import preference_pairs
from tandem.engine.data.jsonl import write_jsonl
from tandem.engine.data.preferences import PreferencePair, load_preferences
from tandem.engine.data.sft import sft_batches
from tandem.engine.data.tokenizer import HFTokenizer, load_tokenizer
from tandem.engine.errors import Stopped
from tandem.engine.hf_config import hf_config_of
from tandem.engine.reward.preference import SCORING_FILE, Scoring
from tandem.engine.run import Run
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh, destroy_mesh
from tandem.engine.trainer.optimizer import learning_rate
from tandem.engine.trainer.reward_model import Network, draw_head, preference_step, reward_model_config, scores
from tandem.engine.trainer.state import random_state, set_random_state
from tandem.engine.watchdog import EXIT_SIGTERM

# In the run folder: what the held-out pairs say of the newest checkpoint.
HELD_OUT_FILE = "held_out.json"
STEPS_PER_LINE = 25


def train_reward_model(config: RunConfig) -> None:
    """Train every stage of `config.preference` in order, from where the run folder stands."""
    num_steps = sum(stage.steps for stage in config.preference)  # for the display; epochs are counted once the pairs are read
    with Run(dataclasses.replace(config, steps=num_steps)) as run, contextlib.ExitStack() as stack:
        _Training(run, stack).train()


def score_config(config: RunConfig, tokenizer: HFTokenizer) -> dict[str, Any]:
    """config.json of the reward model that such a run trains: of a random network, or on that of `model.path`."""
    hf_config = hf_config_of(config.model, tokenizer)
    if Architecture.from_hf(hf_config).has_score_head:
        return hf_config
    # A response ends in the end token, which must not pass for padding.
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    return reward_model_config(hf_config, pad_token_id=pad_token_id)


def write_scoring(config: RunConfig, tokenizer: HFTokenizer, run_dir: Path, folder: Path) -> None:
    """How text becomes the model's input and which score is a good one, for `reward/preference.py`. Without held-out pairs that is 0."""
    data, held_out = config.data, run_dir / HELD_OUT_FILE
    template = data.prompt_template
    if data.use_chat_template:
        turns = [{"role": "user", "content": template}]
        template = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    threshold = json.loads(held_out.read_text(encoding="utf-8"))["threshold"] if held_out.is_file() else 0.0
    scoring = Scoring(prompt_template=template, add_special_tokens=not data.use_chat_template, threshold=threshold)
    (folder / SCORING_FILE).write_text(json.dumps(dataclasses.asdict(scoring), indent=1) + "\n", encoding="utf-8")


class _Training:
    """What the stages share."""

    def __init__(self, run: Run, stack: contextlib.ExitStack) -> None:
        self.run, config = run, run.config
        self.tokenizer = load_tokenizer(config.model.path)
        hf_config = score_config(config, self.tokenizer)
        self.crossover_tokens = 12 * hf_config["hidden_size"]
        self._pairs_file, held_out_file = self._data_files()
        longest = max(stage.max_tokens for stage in config.preference)
        if longest > config.model.context_length:
            context = config.model.context_length
            raise ValueError(f"preference.max_tokens is {longest}, more than model.context_length ({context}); lower it, or raise that")
        self._stages = [self._rows(self._pairs_file, stage.max_tokens) for stage in config.preference]
        self._held_out = self._rows(held_out_file, longest) if held_out_file is not None else []
        run.save_config()
        self.mesh = build_mesh(config.mesh, hf_config)
        stack.callback(destroy_mesh)
        seed = config.seed if config.model.path is None else None
        self.trainer = MegatronTrainer(hf_config, self.mesh, config.trainer, loss=config.loss, temperature=1.0, seed=seed)
        if config.model.path is not None:
            self._load(Path(config.model.path))
        saving = config.checkpoint
        folder, keep = run.dir / "checkpoints", saving.keep
        self.checkpoints = stack.enter_context(
            CheckpointSaver(folder, keep=keep, asynchronous=saving.asynchronous, timeout_s=saving.timeout_s, group=run.control)
        )

    def train(self) -> None:
        run, stages = self.run, self.run.config.preference
        lengths = [stage.num_steps(sum(pair.num_tokens for pair in rows)) for stage, rows in zip(stages, self._stages, strict=True)]
        begun = self._resume()
        run.log.begin_steps()
        first = 0
        for number, (stage, num_steps) in enumerate(zip(stages, lengths, strict=True)):
            for step in self._train_stage(stage, number, first, num_steps, max(0, begun - first)):
                self._save_if_due(step + 1, is_last=step + 1 == sum(lengths))
            first += num_steps

    def _train_stage(self, stage: SFTStage, number: int, first: int, num_steps: int, start: int) -> Iterator[int]:
        """The rest of a stage from its step `start` on; yields each step's number in the run."""
        run, trainer, pairs = self.run, self.trainer, self._stages[number]
        trainer.set_optimizer_config(stage.optimizer)
        lengths, seed = [pair.num_tokens for pair in pairs], run.config.seed + number
        batches = sft_batches(lengths, batch_tokens=stage.batch_tokens, seed=seed, start_step=start)
        sums: dict[str, list[float]] = {}
        for local, indices in zip(range(start, num_steps), batches):  # noqa: B905 (the batches never end)
            trainer.set_learning_rate(learning_rate(stage.optimizer, local, num_steps))
            with run.log.phase("train"):
                stats = self._update([pairs[i] for i in indices], seed=local)
            run.log.progress("reward model", local + 1, num_steps)
            for name, value in stats.items():
                sums.setdefault(name, []).append(value)
            is_last, every = local + 1 == num_steps, run.config.evaluation.every
            is_evaluated = is_last or bool(every and (first + local + 1) % every == 0)
            if is_evaluated or (local + 1) % STEPS_PER_LINE == 0:
                means = {f"reward_model/{name}": sum(values) / len(values) for name, values in sums.items()}
                held_out = self._evaluate(first + local + 1) if is_evaluated else {}
                run.log.metrics(first + local, {"reward_model/stage": number, **means, **held_out})
                sums.clear()
            yield first + local

    def _update(self, batch: Sequence[PairRows], seed: int) -> dict[str, float]:
        dealt = self._deal(batch, seed)
        margins = [torch.tensor([batch[i].margin for i in held], dtype=torch.float32) for _, held in dealt]
        return preference_step(self.trainer, [microbatch for microbatch, _ in dealt], margins, len(batch))

    def _deal(self, pairs: Sequence[PairRows], seed: int) -> list[Any]:
        mesh, microbatch_tokens = self.mesh, self.run.config.trainer.microbatch_tokens
        return deal_pairs(
            pairs,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            microbatch_tokens=microbatch_tokens,
            crossover_tokens=self.crossover_tokens,
            seed=seed,
        )

    def _evaluate(self, step: int) -> dict[str, float]:
        """Accuracy on the held-out pairs, and the score that lies midway between chosen and rejected ones. A collective."""
        if not self._held_out:
            return {}
        with self.run.log.phase("evaluate"):
            found = scores(self.trainer, [microbatch for microbatch, _ in self._deal(self._held_out, seed=0)])
            mine = torch.cat([scores_R.view(-1, 2) for scores_R in found]).tolist() if found else []
            of_dp_ranks = dict(self.run.gather((self.mesh.dp_rank, mine)))  # ranks that share their rows found the same
        chosen, rejected = zip(*[pair for of_rank in of_dp_ranks.values() for pair in of_rank], strict=True)
        accuracy = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(chosen)
        threshold = (sum(chosen) + sum(rejected)) / (2 * len(chosen))
        if self.run.rank == 0:
            unfinished = self.run.dir / f"{HELD_OUT_FILE}.tmp"
            told = {"step": step, "num_pairs": len(chosen), "accuracy": accuracy, "threshold": threshold}
            unfinished.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self.run.dir / HELD_OUT_FILE)
        return {"reward_model/held_out_accuracy": accuracy, "reward_model/threshold": threshold}

    def _save_if_due(self, step: int, *, is_last: bool) -> None:
        """Every `checkpoint.every` steps and after the last; after SIGTERM also, and leave."""
        every = self.run.config.checkpoint.every
        (is_stopping,) = self.run.any(self.run.watchdog.stop_requested)
        self._told(self.checkpoints.poll())
        if is_last or is_stopping or (every and step % every == 0):
            with self.run.log.phase("checkpoint"):
                self.checkpoints.save(step, self.trainer.sharded_state_dict(), {"random": random_state()})
        if is_stopping and not is_last:
            self._told(self.checkpoints.wait())
            self.run.log.say(f"Stopped by SIGTERM; started again, the run goes on with step {step}.")
            raise Stopped(EXIT_SIGTERM)

    def _told(self, oldest: int | None) -> None:
        if oldest is not None and self.checkpoints.last is not None:
            self.run.log.event("checkpoint is whole", **dataclasses.asdict(self.checkpoints.last))

    def _resume(self) -> int:
        """Go back to the newest checkpoint; the steps that it has done."""
        found = load_latest(self.run.dir / "checkpoints", self.trainer.sharded_state_dict)
        if found is not None:
            self.trainer.load_sharded(found.state)
            extra: Mapping[str, Any] = found.extra or {}  # a rank that was not there then has none
            if extra:
                set_random_state(extra["random"])
        self.run.log.rewind(found.step if found is not None else -1)
        return found.step if found is not None else 0

    def _load(self, folder: Path) -> None:
        """A reward model whole; of a language model the network, under a random head."""
        hf_config = hf_config_of(self.run.config.model, self.tokenizer)
        if Architecture.from_hf(hf_config).has_score_head:
            load_hf_weights(folder, self.trainer)
            return
        load_hf_weights(folder, Network(self.trainer, hf_config))
        draw_head(self.trainer, self.run.config.seed)

    def _data_files(self) -> tuple[Path, Path | None]:
        """Pairs and held-out pairs: the user's files, or those of the task, written into the run folder."""
        data, folder, task = self.run.config.data, self.run.dir / "data", self.run.config.data.task
        if data.preferences is None and not isinstance(task, ArithmeticTask):
            raise ValueError(
                "data.preferences is None; only arithmetic has pairs of its own, give a JSONL file of prompt, chosen and rejected"
            )
        if self.run.rank == 0 and data.preferences is None and isinstance(task, ArithmeticTask):
            folder.mkdir(exist_ok=True)
            write_jsonl(folder / "preferences.jsonl", preference_pairs(task, task.num_sft_examples, self.run.config.seed))
            write_jsonl(folder / "eval_preferences.jsonl", preference_pairs(task, task.num_test, 0, "test"))
        self.run.barrier()
        pairs = Path(data.preferences) if data.preferences is not None else folder / "preferences.jsonl"
        # The task's test set says nothing about a user's own pairs.
        held_out = folder / "eval_preferences.jsonl" if data.preferences is None else None
        return pairs, Path(data.eval_preferences) if data.eval_preferences is not None else held_out

    def _rows(self, file: Path, max_tokens: int) -> list[PairRows]:
        pairs = load_preferences(file, self.tokenizer, self.run.config.data, max_tokens=max_tokens)
        return [_pair_rows(pair, number) for number, pair in enumerate(pairs)]


def _pair_rows(pair: PreferencePair, number: int) -> PairRows:
    return pair_rows(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, margin=pair.margin, number=number)
