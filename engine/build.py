"""From a configuration to the parts of a run. Every choice between implementations is one `if` here."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tandem.engine.architecture import Architecture
from tandem.engine.checkpoint.disk import load_latest
from tandem.engine.checkpoint.engine_side import EngineSide
from tandem.engine.checkpoint.hf_folder import load_hf_weights, read_stop_token_ids
from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.checkpoint.turns import Turns
from tandem.engine.data.images import refuse_images
from tandem.engine.data.journal import SegmentJournal
from tandem.engine.data.prompts import encode_prompt, load_prompts
from tandem.engine.data.replay import ReplayBuffer
from tandem.engine.data.sampler import PromptSampler
from tandem.engine.data.sft import SFTExample, load_sft
from tandem.engine.data.tasks import prompts as task_prompts
from tandem.engine.data.tasks import write_task
from tandem.engine.data.tokenizer import HFTokenizer, load_tokenizer
from tandem.engine.elastic import Roster
from tandem.engine.errors import RunEnded, Stopped
from tandem.engine.feasibility import check_run
from tandem.engine.generation import Generation
from tandem.engine.hf_config import hf_config_of
from tandem.engine.log import METRICS_FILE, read_metrics
from tandem.engine.mesh_rules import kv_heads_in_attention, splits_heads
from tandem.engine.resident import MemoryMeter
from tandem.engine.reward.bubblewrap import UnavailableError
from tandem.engine.reward.domains import DOMAINS
from tandem.engine.reward.grading_stats import RewardAlarm
from tandem.engine.reward.judge import Judge
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.rollout.fleet import FleetEngine
from tandem.engine.rollout.nodes import model_digest
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_server import ServerSetup, SGLangServer
from tandem.engine.run import Run
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh, destroy_mesh
from tandem.engine.trainer.optimizer import learning_rate
from tandem.engine.trainer.state import random_state, set_random_state
from tandem.engine.types import Group, Prompt
from tandem.engine.watchdog import EXIT_SIGTERM

# A context that holds any prompt.
UNBOUNDED = 1 << 40


def stop_token_ids(tokenizer: HFTokenizer, model_path: str | Path | None) -> tuple[int, ...]:
    """The tokenizer's end token and those that the model's folder names."""
    of_tokenizer = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set[int]()
    of_model = read_stop_token_ids(Path(model_path)) if model_path is not None else ()
    return tuple(sorted({*of_tokenizer, *of_model}))


@contextlib.contextmanager
def build(run: Run) -> Iterator["Parts"]:
    """Build the parts, and close what owns processes and files at the end, whatever happened."""
    with contextlib.ExitStack() as stack:
        yield Parts(run, stack)


class Parts:
    """The parts of a run, and what involves several of them at once: resuming, saving, generating."""

    def __init__(self, run: Run, stack: contextlib.ExitStack) -> None:
        self.run, config = run, run.config
        self.tokenizer = load_tokenizer(config.model.path)
        self._resolve()
        config = run.config
        longest = self._longest_prompt()  # before anything is written, or a folder would hold a run that cannot be
        check_run(config, num_ranks=run.num_ranks, ranks_per_node=run.ranks_per_node, longest_prompt=longest)
        prompts_file, held_out_file, self._sft_file = self._data_files()
        run.save_config()
        hf_config = hf_config_of(config.model, self.tokenizer)
        self.hidden_size: int = hf_config["hidden_size"]
        prompts = self._read(prompts_file, config.model.context_length)
        held_out = self._read(held_out_file, config.model.context_length) if held_out_file is not None else []
        self.eval_prompts: Sequence[Prompt] = held_out[: config.evaluation.max_prompts]
        grading = functools.partial(run.log.progress, "grade")
        self.judge = Judge(config.reward, self.tokenizer, num_workers=run.num_threads, on_progress=grading)
        stack.callback(self.judge.close)
        self.alarm = RewardAlarm(config.reward)
        if run.is_leader:  # the others grade nothing
            try:
                self.judge.check([*prompts, *self.eval_prompts])
            except UnavailableError as error:
                raise RunEnded(f"the prompts need a sandbox: {error}; or name one elsewhere by reward.sandbox_url") from error

        meter, budget_bytes = MemoryMeter(on_gpu=bool(run.hardware.gpus)), config.swap.sleep_budget_bytes
        self.engine = self._start_engine(hf_config, stack) if run.is_leader else None
        side = None
        local = self.engine.local if isinstance(self.engine, FleetEngine) else self.engine
        if isinstance(local, SGLangEngine):
            side = EngineSide(local, budget_bytes=budget_bytes, measure=meter.read, log=run.log)
        if run.hardware.gpus and config.trainer.sleep == "on":
            if side is not None:
                side.release()  # once it has started: it sizes its cache by what it finds free, so before there is a trainer
            run.barrier()
        self.mesh = build_mesh(config.mesh, hf_config)
        stack.callback(destroy_mesh)
        self.trainer = MegatronTrainer(
            hf_config,
            self.mesh,
            config.trainer,
            loss=config.loss,
            temperature=config.rollout.temperature,
            seed=config.seed if config.model.path is None else None,
        )
        if config.model.path is not None:
            load_hf_weights(Path(config.model.path), self.trainer)

        swap = WeightSwap(
            self.trainer,
            self.engine,
            config.swap,
            control_group=run.control,
            quantization=config.rollout.quantization,
            log=run.log,
            revive=lambda: self.generation.replace_dead_engine("in a swap"),
        )
        stack.callback(swap.close)
        meter.trainer = self.trainer.memory
        self.weights = Turns(
            swap,
            self.trainer.memory,
            side,
            sleeps=config.trainer.sleep == "on",
            budget_bytes=budget_bytes,
            measure=meter.read,
            gather=run.gather,
            log=run.log,
        )
        self.sampler = PromptSampler(config.sampling, prompts, seed=config.seed) if run.rank == 0 else None
        (run.dir / "replay").mkdir(exist_ok=True)
        self.buffer = ReplayBuffer(run.dir / "replay" / f"rank_{run.rank}.sqlite")
        stack.callback(self.buffer.close)
        self.journal = SegmentJournal(run.dir / "replay" / f"journal_{run.rank}.sqlite")
        stack.callback(self.journal.close)
        stop_ids = stop_token_ids(self.tokenizer, config.model.path)
        roster = None
        if config.rollout.elastic.enabled:
            digest = model_digest(hf_config, dtype=config.trainer.dtype, context_length=config.model.context_length)
            roster = Roster(run, self.engine if isinstance(self.engine, FleetEngine) else None, digest)
        self.generation = Generation(
            run, self.engine, self.journal, self.weights, stop_token_ids=stop_ids, leave=self._leave, roster=roster
        )
        keep, asynchronous, timeout_s = config.checkpoint.keep, config.checkpoint.asynchronous, config.checkpoint.timeout_s
        self.checkpoints = stack.enter_context(
            CheckpointSaver(run.dir / "checkpoints", keep=keep, asynchronous=asynchronous, timeout_s=timeout_s, group=run.control)
        )
        self._saved_step = -1  # the newest checkpoint's, which may still be on its way to the disk
        self._save_s = math.nan  # seconds that the newest whole one took
        self._sampler_state: dict[str, Any] | None = None  # what the present iteration started from

    def _read(self, file: Path, context_length: int) -> list[Prompt]:
        prompts = load_prompts(file, self.tokenizer, self.run.config.data, context_length=context_length, domains=DOMAINS)
        refuse_images(prompts, "the models that are trained here have no vision tower and would see the text alone; leave such prompts out")
        return prompts

    def _longest_prompt(self) -> int:
        """Tokens of the longest prompt to train on."""
        config, data = self.run.config, self.run.config.data
        if data.prompts is not None:
            return max(len(prompt.token_ids) for prompt in self._read(Path(data.prompts), config.model.context_length))
        records = task_prompts(data.task, data.task.num_prompts, config.seed)
        return max(len(encode_prompt(str(record["question"]), self.tokenizer, data)) for record in records)

    def _resolve(self) -> None:
        """Settle what the user's own files leave open, and say so."""
        run, config = self.run, self.run.config
        model, data, say = config.model, config.data, run.log.say
        if model.path is not None and config.sft and data.sft is None:
            run.resolve(sft=())  # the task's examples would unteach a trained model
            say("No supervised warm start: model.path names a trained model, and data.sft no examples.")
        if model.path is None and data.prompts is not None and data.long_prompts == "error":
            longest = max(len(prompt.token_ids) for prompt in self._read(Path(data.prompts), UNBOUNDED))
            needed = longest + config.rollout.max_response_tokens
            if needed > model.context_length:
                run.resolve(model=dataclasses.replace(model, context_length=needed))
                say(f"model.context_length is {needed}: the longest of your prompts ({longest} tokens) and a response.")
        if model.path is None and data.prompts is not None and run.config.sft and data.sft is None:
            say("The warm start is on the recipe's own task: data.sft names no examples.")
        if config.rollout.quantization is not None:
            corrected = config.loss.reference == "rollout"
            advice = "the loss weighs tokens by their ratio" if corrected else "loss.reference=rollout would weigh tokens by their ratio"
            say(
                f"rollout.quantization is {config.rollout.quantization}: responses are drawn from quantised weights, and others trained. "
                f"train/logprob_diff shows the difference; {advice}, up to loss.importance_cap."
            )
        if config.mesh.cp > 1 and config.trainer.cp_attention == "auto":
            architecture = Architecture.from_hf(hf_config_of(run.config.model, self.tokenizer))
            attention = "ulysses" if splits_heads("auto", config.mesh, architecture) else "all_gather"
            run.resolve(trainer=dataclasses.replace(run.config.trainer, cp_attention=attention))
            num_heads, num_ranks = kv_heads_in_attention(architecture), config.mesh.tp * config.mesh.cp
            say(f"trainer.cp_attention is {attention}: {num_heads} key/value heads on tp * cp = {num_ranks} ranks.")
        if config.trainer.sleep == "auto":
            shares_gpus = bool(run.hardware.gpus) and config.rollout.engine == "sglang"
            run.resolve(trainer=dataclasses.replace(run.config.trainer, sleep="on" if shares_gpus else "off"))
            if shares_gpus:
                say("trainer.sleep is on: trainer and SGLang share GPUs, and leave them to each other in turns.")

    def _data_files(self) -> tuple[Path, Path | None, Path]:
        """Prompts, held-out prompts and supervised examples: the user's files, or those of the task, written into the run folder."""
        data, folder = self.run.config.data, self.run.dir / "data"
        if self.run.rank == 0 and None in (data.prompts, data.sft):
            write_task(data.task, folder, seed=self.run.config.seed)
        self.run.barrier()
        prompts = Path(data.prompts) if data.prompts is not None else folder / "prompts.jsonl"
        # The task's test set says nothing about a user's own prompts.
        held_out = folder / "eval.jsonl" if data.prompts is None else None
        held_out = Path(data.eval_prompts) if data.eval_prompts is not None else held_out
        return prompts, held_out, Path(data.sft) if data.sft is not None else folder / "sft.jsonl"

    def _start_engine(self, hf_config: Mapping[str, Any], stack: contextlib.ExitStack) -> EmbeddedEngine | SGLangEngine | FleetEngine:
        run, config = self.run, self.run.config
        (run.dir / "logs").mkdir(exist_ok=True)
        log_path = run.dir / "logs" / f"engine_{run.rank}.log"
        stop_ids, timeout_s = stop_token_ids(self.tokenizer, config.model.path), config.swap.timeout_s
        if config.rollout.engine == "sglang":
            setup = ServerSetup(
                hf_config=hf_config,
                config=config.rollout.sglang,
                dtype=config.trainer.dtype,
                quantization=config.rollout.quantization,
                context_length=config.model.context_length,
                max_running=config.rollout.max_batch,
                record_routing=config.rollout.record_routing,
                tp=config.rollout.tp,
                num_threads=run.num_threads,
                node_rank=run.local_rank,
                on_gpu=bool(run.hardware.gpus),
                log_path=log_path,
            )
            engine = SGLangEngine(SGLangServer(setup), config.rollout, stop_token_ids=stop_ids, timeout_s=timeout_s)
            if config.rollout.elastic.enabled:
                context_length = config.model.context_length
                engine = FleetEngine(
                    engine, hf_config, config.rollout, context_length=context_length, stop_token_ids=stop_ids, say=self._say_of_engines
                )
        else:
            engine = EmbeddedEngine(
                hf_config,
                config.rollout,
                dtype=config.trainer.dtype,
                context_length=config.model.context_length,
                stop_token_ids=stop_ids,
                num_threads=run.num_threads,
                log_path=log_path,
                timeout_s=timeout_s,
            )
        stack.callback(engine.close)
        return engine

    def _say_of_engines(self, text: str) -> None:
        """From any thread."""
        print(f"rank {self.run.rank}: {text}", flush=True)

    def sft_examples(self, max_tokens: int) -> list[SFTExample]:
        """The examples of the supervised warm start, none longer than `max_tokens`."""
        return load_sft(self._sft_file, self.tokenizer, self.run.config.data, max_tokens=max_tokens)

    def begin_iteration(self, step: int) -> None:
        """Stamp what the buffer gets with this iteration, and replace an engine that died while it was idle."""
        self.buffer.begin_iteration(step)
        self._sampler_state = self.sampler.state_dict() if self.sampler is not None else None
        self.generation.begin_iteration(self._save_s)

    def finish_grading(self, step: int) -> list[Group]:
        """Wait for the verdicts of this leader's groups. A collective; after SIGTERM it lasts while there is time, then all ranks leave."""
        self.run.watchdog.call_when_stopping(self.judge.cut, self.generation.reserve_s)
        scored = self.judge.finish()
        (was_cut,) = self.run.any(self.judge.was_cut)
        if was_cut:
            self._leave(step)
        return scored

    def begin_updates(self, step: int) -> None:
        """The iteration's learning rate, and the fresh optimizer that the paper asks for. After SIGTERM, only if there is time."""
        watchdog = self.run.watchdog
        (has_no_time,) = self.run.any(watchdog.stop_requested and watchdog.left_s < self.generation.reserve_s)
        if has_no_time:
            self._leave(step)
        config = self.run.config.trainer
        if config.reset_optimizer:
            self.trainer.reset_optimizer()
        self.trainer.set_learning_rate(learning_rate(config.optimizer, step, self.run.config.steps))

    def checkpoint_if_due(self, step: int) -> None:
        """Save every `checkpoint.every` iterations and after the last; after SIGTERM also, and leave."""
        every = self.run.config.checkpoint.every
        self._sampler_state = self.sampler.state_dict() if self.sampler is not None else None
        (is_stopping,) = self.run.any(self.run.watchdog.stop_requested)
        self._prune(self.checkpoints.poll())
        if step == self.run.config.steps or (every and step % every == 0):
            self.save(step)
        if is_stopping and step < self.run.config.steps:
            self._leave(step)

    def _leave(self, step: int) -> NoReturn:
        """After SIGTERM, on all ranks: save what iteration `step` starts from, unless that is done, and end the run.

        Until the updates begin, trainer and buffer can still go back there; segments that have ended are in the journal.
        """
        if self._saved_step != step:
            self.save(step)
        self._prune(self.checkpoints.wait())
        if self.run.rank == 0:
            print(f"Stopped by SIGTERM; started again, the run goes on with iteration {step}.", flush=True)
        raise Stopped(EXIT_SIGTERM)

    def save(self, step: int) -> None:
        """Save everything that iteration `step` starts from: copied now, written while training goes on. A collective."""
        with self.run.log.phase("checkpoint"):
            extra = {"random": random_state()} | ({"sampler": self._sampler_state} if self._sampler_state is not None else {})
            self.checkpoints.save(step, self.trainer.sharded_state_dict(), extra)
        self._saved_step = step

    def _prune(self, oldest: int | None) -> None:
        """A checkpoint has become whole, and `oldest` is now the oldest that the run can go back to: forget what only older ones need."""
        if oldest is None:
            return
        assert self.checkpoints.last is not None
        self._save_s = self.checkpoints.last.total_s
        self.run.log.event("checkpoint is whole", **dataclasses.asdict(self.checkpoints.last))
        self.buffer.prune(oldest)
        self.journal.prune(oldest)

    def resume(self) -> bool:
        """Go back to the newest checkpoint, if there is one. A collective. Returns whether there was."""
        found = load_latest(self.run.dir / "checkpoints", self.trainer.sharded_state_dict)
        if found is None:
            step = 0
        else:
            step = found.step
            self.trainer.load_sharded(found.state)
            extra: dict[str, Any] = found.extra or {}  # a rank that was not there then has none
            if extra:
                set_random_state(extra["random"])
            if self.sampler is not None:
                self.sampler.load_state_dict(extra["sampler"])
            self._saved_step = step
        self._sampler_state = self.sampler.state_dict() if self.sampler is not None else None
        self.buffer.rewind(step)
        self.run.log.rewind(step if found is not None else -1)
        if self.run.rank == 0 and (self.run.dir / METRICS_FILE).exists():
            for line in read_metrics(self.run.dir):
                self.alarm.observe(line)
        self.run.first_step = step
        return found is not None
