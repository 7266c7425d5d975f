"""The judge: every response goes to its domain's grader, thousands at a time, while the engine goes on generating.

All of it but `cut` runs on the caller's thread, which never waits but in `finish`: a grader's future only puts a note into a queue.
Groups come out in the order in which they went in, however long each took, so that a run does not depend on how fast graders are.
"""

import dataclasses
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from tandem.engine.config import RewardConfig
from tandem.engine.reward.domains import DOMAINS, open_grader
from tandem.engine.reward.grading_stats import DomainStats
from tandem.engine.types import Grader, Group, Prompt, Response, StopState, Tokenizer, Verdict

# Text with the graders at a time; what is beyond waits as token ids. Some thousand long responses.
MAX_CHARS_OUT = 64_000_000
# Groups dropped one after the other before the run ends: they cost rollouts and teach nothing.
MAX_DROPPED_IN_A_ROW = 100


class GradingError(RuntimeError):
    """Nothing can be graded any more; says why, in the words of the last grader."""


@dataclasses.dataclass(eq=False, slots=True)
class _Scoring:
    """A group on its way."""

    group: Group
    verdicts: list[Verdict | None]
    submitted_s: float


@dataclasses.dataclass(eq=False, slots=True)
class _Task:
    """One response of it, until it has a verdict."""

    scoring: _Scoring
    index: int
    num_retries: int = 0
    num_chars: int = 0  # with a grader now
    well_formed: bool = True


class Judge:
    """Grades responses by their decoded text, special tokens left out. Owns the graders; for one thread.

    A grader that fails leaves its response ungraded, with the reason: it counts neither as right nor as wrong. It is graded again up to
    `reward.max_retries` times, after everything that waits. A group with a response that is still not graded is then either completed
    from the others (they alone make the baseline; it has no gradient) or dropped, as `reward.not_graded` says: neither sampler nor
    update sees it. A group without any graded response is always dropped.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: Tokenizer,
        *,
        num_workers: int = 1,
        on_progress: Callable[[int, int], object] = lambda completed, total: None,
    ) -> None:
        """Starts nothing; a domain's grader starts with its first prompt.

        Args:
            num_workers: programs that run at a time, of each grader that runs any.
            on_progress: called by `finish`, whenever verdicts come, with the groups scored and those it waits for in all.
        """
        self.config = config
        self._tokenizer, self._num_workers, self._on_progress = tokenizer, num_workers, on_progress
        self._graders: dict[str, Grader] = {}
        self._scorings: deque[_Scoring] = deque()
        self._waiting: deque[_Task] = deque()
        self._out: set[_Task] = set()  # with graders
        self._num_chars_out = 0
        self._answers: queue.SimpleQueue[tuple[_Task, Future[Verdict], float] | None] = queue.SimpleQueue()  # None wakes `finish`
        self.was_cut = False
        self._num_dropped_in_a_row = 0
        self._stats: dict[str, DomainStats] = {}

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Start what these prompts need, and refuse what cannot be graded. Raises: ValueError naming the prompt, and as graders start."""
        for prompt in prompts:
            try:
                self._grader(prompt).check(prompt)
            except ValueError as error:
                raise ValueError(f"prompt {prompt.id!r} of domain {prompt.domain} cannot be graded: {error}") from error

    def submit(self, group: Group) -> None:
        """Have a finished group graded. Returns at once.

        Raises: ValueError for an unknown domain, a group without responses, or one with an unfinished response.
        """
        self._grader(group.prompt)
        if not group.responses:
            raise ValueError(f"the group of prompt {group.prompt.id!r} has no responses; it needs at least one")
        for response in group.responses:
            if not response.stop.is_final:
                raise ValueError(
                    f"sample {response.sample} of prompt {group.prompt.id!r} stopped by {response.stop.value}; grade finished ones only"
                )
        scoring = _Scoring(group, [None] * len(group.responses), time.monotonic())
        self._scorings.append(scoring)
        self._waiting.extend(_Task(scoring, i) for i in range(len(group.responses)))
        self._hand_out()

    def take_scored(self) -> list[Group]:
        """The groups that are scored and before which none is awaited, in the order of `submit`. Does not wait.

        Raises: GradingError when nothing can be graded any more.
        """
        while not self._answers.empty():
            self._receive(self._answers.get())
        self._hand_out()
        scored = []
        while self._scorings and None not in self._scorings[0].verdicts:
            scoring = self._scorings.popleft()
            verdicts = tuple(verdict for verdict in scoring.verdicts if verdict is not None)
            if self._keeps(scoring.group.prompt, verdicts):
                scored.append(dataclasses.replace(scoring.group, verdicts=verdicts))
        return scored

    def finish(self) -> list[Group]:
        """Wait for everything submitted; the groups that `take_scored` has not given yet.

        What is awaited when no verdict came for `reward.timeout_s` is not graded, without another try. After `cut`, nothing is awaited.
        """
        scored = self.take_scored()
        total = len(scored) + len(self._scorings)
        while self._scorings and not self.was_cut:
            try:
                self._receive(self._answers.get(timeout=self.config.timeout_s))
            except queue.Empty:
                self._give_up()
            scored += self.take_scored()
            self._on_progress(len(scored), total)
        return scored

    def cut(self) -> None:
        """Have `finish` return what is scored by now, at once and for ever: the run is leaving. From any thread, as often as it likes."""
        self.was_cut = True
        self._answers.put(None)

    def take_stats(self) -> dict[str, DomainStats]:
        """By domain, what was graded since the last call."""
        stats, self._stats = self._stats, {}
        return stats

    def close(self) -> None:
        """End the graders, and with them what they are doing."""
        for grader in self._graders.values():
            grader.close()

    def _grader(self, prompt: Prompt) -> Grader:
        if prompt.domain not in DOMAINS:
            raise ValueError(f"prompt {prompt.id!r} has domain {prompt.domain!r}; there are graders for {', '.join(DOMAINS)}")
        if prompt.domain not in self._graders:
            self._graders[prompt.domain] = open_grader(prompt.domain, self.config, num_workers=self._num_workers)
        return self._graders[prompt.domain]

    def _hand_out(self) -> None:
        while self._waiting and self._num_chars_out < MAX_CHARS_OUT:
            task = self._waiting.popleft()
            group = task.scoring.group
            response = group.responses[task.index]
            try:
                text = self._text(response, task)
                task.num_chars = len(text)
                is_complete = response.stop is StopState.FINISHED
                answer = self._grader(group.prompt).grade(text, group.prompt, is_complete=is_complete)
            # Whatever goes wrong in a parser of model output must not end the run, and must not pass for a wrong answer.
            except Exception as error:
                answer = _failed(error)
            if isinstance(answer, Verdict):
                self._settle(task, answer, time.monotonic())
                continue
            self._num_chars_out += task.num_chars
            self._out.add(task)
            answer.add_done_callback(lambda done, task=task: self._answers.put((task, done, time.monotonic())))

    def _text(self, response: Response, task: _Task) -> str:
        text = self._tokenizer.decode(list(response.token_ids), skip_special_tokens=True)
        task.well_formed = _holds_in_order(text, self.config.format_markers)
        return text[-self.config.max_response_chars :]

    def _receive(self, answer: tuple[_Task, Future[Verdict], float] | None) -> None:
        if answer is None:
            return
        task, done, done_s = answer
        if task not in self._out:  # given up
            return
        self._out.remove(task)
        self._num_chars_out -= task.num_chars
        try:
            verdict = done.result()
        except Exception as error:
            verdict = _failed(error)
        self._settle(task, verdict, done_s)

    def _settle(self, task: _Task, verdict: Verdict, done_s: float) -> None:
        stats = self._stats.setdefault(task.scoring.group.prompt.domain, DomainStats())
        if not verdict.graded and task.num_retries < self.config.max_retries:
            task.num_retries += 1
            stats.num_retries += 1
            self._waiting.append(task)
            return
        task.scoring.verdicts[task.index] = verdict if task.well_formed else dataclasses.replace(verdict, well_formed=False)
        stats.add(verdict, done_s - task.scoring.submitted_s)

    def _give_up(self) -> None:
        reason = f"no verdict came for {self.config.timeout_s:g} s (reward.timeout_s)"
        for task in (*self._out, *self._waiting):
            task.num_retries = self.config.max_retries
            self._settle(task, Verdict(correct=False, reason=reason, graded=False), time.monotonic())
        self._out.clear()
        self._waiting.clear()
        self._num_chars_out = 0

    def _keeps(self, prompt: Prompt, verdicts: tuple[Verdict, ...]) -> bool:
        num_graded = sum(verdict.graded for verdict in verdicts)
        keeps = num_graded == len(verdicts) or (self.config.not_graded == "complete" and num_graded > 0)
        self._num_dropped_in_a_row = 0 if keeps else self._num_dropped_in_a_row + 1
        self._stats.setdefault(prompt.domain, DomainStats()).num_dropped_groups += not keeps
        if self._num_dropped_in_a_row == MAX_DROPPED_IN_A_ROW:
            reason = next(verdict.reason for verdict in verdicts if not verdict.graded)
            raise GradingError(
                f"the last {MAX_DROPPED_IN_A_ROW} groups were dropped because responses could not be graded, so the run learns nothing; "
                f"the newest, of prompt {prompt.id!r} (domain {prompt.domain}): {reason}"
            )
        return keeps


def _failed(error: Exception) -> Verdict:
    return Verdict(correct=False, reason=f"{type(error).__name__}: {error}", graded=False)


def _holds_in_order(text: str, markers: tuple[str, ...]) -> bool:
    end = 0
    for marker in markers:
        start = text.find(marker, end)
        if start < 0:
            return False
        end = start + len(marker)
    return True
