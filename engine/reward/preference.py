"""Domain `preference`: a classic reward model scores the response, and a score of at least the threshold counts as correct.

The model is a folder that `tandem export` made of a reward model's run, or any …ForSequenceClassification with one label beside the same
scoring.json. It runs on the CPU, in worker processes that can be killed; one sequence at a time, so that a score does not depend on what
else is graded. Bradley-Terry fixes differences of scores only, so the threshold comes with the model: midway between chosen and rejected
held-out responses, unless the configuration names another.
"""

import functools
import json
import os
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tandem.engine.reward.workers import WorkerError, WorkerPool
from tandem.engine.types import Prompt, Verdict

SCORING_FILE = "scoring.json"
# Address space beside the weights: torch reserves far more than it uses.
WORKER_BYTES = 24 << 30
# Reading the weights, outside the deadline of a response.
LOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How text is made into the model's input, as it was in training, and which score counts as correct. `SCORING_FILE` in the folder."""

    prompt_template: str  # {question} stands for the prompt; a chat template is written out
    add_special_tokens: bool  # the tokenizer's own, around the prompt
    threshold: float

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises: ValueError if the folder has no such file, or one with other fields."""
        file = folder / SCORING_FILE
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"reward.preference_model is {folder}, whose {SCORING_FILE} cannot be read ({error}); give a folder that `tandem export` "
                "made of a reward model's run"
            ) from error


class PreferenceGrader:
    """Scores responses in the background. What passes the deadline, or crashes its worker, is not graded."""

    def __init__(self, folder: Path, scoring: Scoring, *, num_workers: int, timeout_s: float) -> None:
        self._folder, self._scoring = str(folder), scoring
        weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        self._pool = WorkerPool(num_workers, deadline_s=timeout_s, max_bytes=WORKER_BYTES + 4 * weights_bytes)

    @classmethod
    def open(cls, folder: str | None, *, threshold: float | None, num_workers: int, timeout_s: float) -> Self:
        """Start a worker and read the model.

        Args:
            threshold: None: that of the folder.
            timeout_s: deadline of one response from when a worker takes it, the model's loading in a worker that is new included.
        Raises: ValueError for a folder that is no reward model.
        """
        if folder is None:
            raise ValueError("reward.preference_model is None; domain preference needs the folder of a reward model")
        path = Path(folder).absolute()
        scoring = Scoring.read(path)
        if threshold is not None:
            scoring = Scoring(prompt_template=scoring.prompt_template, add_special_tokens=scoring.add_special_tokens, threshold=threshold)
        grader = cls(path, scoring, num_workers=num_workers, timeout_s=timeout_s)
        try:
            grader._pool.run(warm_up, grader._folder, deadline_s=LOAD_TIMEOUT_S)
        except WorkerError as error:
            grader.close()
            raise ValueError(f"reward.preference_model is {folder}, which cannot be loaded as a reward model: {error}") from error
        return grader

    def check(self, prompt: Prompt) -> None:
        """Any prompt can be scored."""

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Verdict | Future[Verdict]:
        if not is_complete:
            return Verdict(correct=False, reason="the response was cut")
        future: Future[Verdict] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled, so the pool's thread can always settle it
        scored = self._pool.submit(score, self._folder, self._scoring, prompt.text, text)
        scored.add_done_callback(lambda done: future.set_result(self._verdict_of(done)))
        return future

    def _verdict_of(self, scored: "Future[float]") -> Verdict:
        error = scored.exception()
        if error is not None:
            return Verdict(correct=False, reason=str(error), graded=False)
        found, threshold = scored.result(), self._scoring.threshold
        return Verdict(correct=found >= threshold, reason=f"score {found:.4f}, threshold {threshold:.4f}")

    def close(self) -> None:
        self._pool.close()


def warm_up(folder: str) -> None:
    """Read the model into a worker."""
    _load(folder)


def score(folder: str, scoring: Scoring, prompt: str, response: str) -> float:
    """The model's score of a whole response. Runs in a worker.

    Raises: ValueError for a text that is longer than the model's context, and a score that is no number.
    """
    import torch

    tokenizer, model = _load(folder)
    text = scoring.prompt_template.replace("{question}", prompt)
    ids = [
        *tokenizer.encode(text, add_special_tokens=scoring.add_special_tokens),
        *tokenizer.encode(response, add_special_tokens=False),
        tokenizer.eos_token_id,
    ]
    longest = model.config.max_position_embeddings
    if len(ids) > longest:
        raise ValueError(f"prompt and response have {len(ids)} tokens; the reward model's context is {longest}")
    with torch.inference_mode():
        found = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
    if found != found:
        raise ValueError("the score is NaN")
    return found


@functools.lru_cache(maxsize=1)
def _load(folder: str) -> tuple[Any, Any]:
    """Tokenizer and model, in float32 on the CPU; kept by the worker."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    if model.config.num_labels != 1:
        raise ValueError(f"the model has {model.config.num_labels} labels; a reward model has one")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), model.eval()
