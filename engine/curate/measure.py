"""Putting every prompt to a model several times and counting what is right; each finished prompt is durable at once."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.engine.curate.config import CurateConfig
from tandem.engine.curate.journal import MeasurementJournal
from tandem.engine.curate.models import Answerer, Task
from tandem.engine.curate.tally import Tally
from tandem.engine.reward.judge import Judge
from tandem.engine.types import Group, Prompt

# As many as keep any engine busy; their requests are all in memory.
PROMPTS_AT_A_TIME = 1024
_PROGRESS_S = 5.0


def measure(
    prompts: Sequence[Prompt], task: Task, *, model: Answerer, judge: Judge, journal: MeasurementJournal, config: CurateConfig
) -> dict[str, Tally]:
    """By prompt id, how the model did. What the journal has is not generated again.

    Tallies with too few graded responses are returned and not kept: the next run tries again.

    Raises: EngineDiedError, ChatError or GradingError when nothing more can be measured; what was, stays.
    """
    settings = model.settings()
    digests = {prompt.id: _digest(prompt, task, settings, config) for prompt in prompts}
    tallies = {prompt_id: found for prompt_id, digest in digests.items() if (found := journal.find(digest)) is not None}
    progress = _Progress(task, num_prompts=len(prompts), num_known=len(tallies))
    waiting = [prompt for prompt in prompts if prompt.id not in tallies]

    def take(scored: Sequence[Group]) -> None:
        for group in scored:
            tally = Tally(
                num_samples=len(group.verdicts),
                num_graded=sum(verdict.graded for verdict in group.verdicts),
                num_correct=sum(verdict.graded and verdict.correct for verdict in group.verdicts),
            )
            if tally.is_reliable:
                journal.record(digests[group.prompt.id], tally)
            tallies[group.prompt.id] = tally
        progress.show(len(tallies))

    for start in range(0, len(waiting), PROMPTS_AT_A_TIME):
        some = waiting[start : start + PROMPTS_AT_A_TIME]
        for group in model.answer(some, task):
            judge.submit(group)
            take(judge.take_scored())
        take(judge.finish())
        for prompt in some:  # refused by the endpoint; or the judge dropped the group, of which nothing could be graded
            tallies.setdefault(prompt.id, Tally(num_samples=task.num_samples, num_graded=0, num_correct=0))
    progress.show(len(tallies), is_last=True)
    return tallies


def _digest(prompt: Prompt, task: Task, settings: Mapping[str, Any], config: CurateConfig) -> bytes:
    what = {
        "prompt": [prompt.id, prompt.text, prompt.answer, prompt.domain, prompt.grading],
        "task": dataclasses.asdict(task),
        "model": settings,
        "temperature": config.temperature,
        "seed": config.seed,
    }
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).digest()


class _Progress:
    def __init__(self, task: Task, *, num_prompts: int, num_known: int) -> None:
        self._name, self._num_prompts, self._num_known = f"{task.name}: {task.num_samples} responses", num_prompts, num_known
        self._shown_s = time.monotonic()

    def show(self, num_done: int, *, is_last: bool = False) -> None:
        if is_last or time.monotonic() - self._shown_s >= _PROGRESS_S:
            self._shown_s = time.monotonic()
            known = f", {self._num_known} of them from the journal" if self._num_known else ""
            print(f"{self._name} to each of {num_done}/{self._num_prompts} prompts{known}", flush=True)
