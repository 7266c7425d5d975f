"""`tandem curate`: raw prompt files become a curated one (Kimi k1.5, 2.1).

What costs nothing comes first: form, contamination, duplicates; then what the graders cannot grade; then the model, once without
reasoning and once with it. Everything before the model takes seconds and is done again by a command that goes on; what the model did is
in the journal.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from tandem.engine.curate.config import CurateConfig
from tandem.engine.curate.form import excluded_form
from tandem.engine.curate.journal import MeasurementJournal
from tandem.engine.curate.measure import measure
from tandem.engine.curate.models import Answerer, EndpointModel, FolderModel, Task
from tandem.engine.curate.overlap import Benchmarks, Deduplicator
from tandem.engine.curate.records import Candidate, Excluded, Reason, excluded, read_raw
from tandem.engine.curate.report import Outcome, write_report
from tandem.engine.curate.tally import Tally, level_of
from tandem.engine.data.images import refuse_images
from tandem.engine.data.jsonl import write_jsonl
from tandem.engine.errors import RunEnded
from tandem.engine.reward.bubblewrap import UnavailableError
from tandem.engine.reward.chat import ChatError
from tandem.engine.reward.domains import DOMAINS
from tandem.engine.reward.judge import GradingError, Judge
from tandem.engine.types import EngineDiedError

PROMPTS_FILE, EXCLUDED_FILE, JOURNAL_FILE, SETTINGS_FILE = "prompts.jsonl", "excluded.jsonl", "journal.sqlite", "settings.json"

Verdict = tuple[Reason, str]


def curate(config: CurateConfig) -> Outcome:
    """Write prompts.jsonl, excluded.jsonl (each line with its reason), report.json, .md and .png into `config.to`.

    Raises: ValueError for a missing or unusable file, a folder that is no model, an endpoint that does not answer, a prompt with an image,
        and when no prompt is left; RunEnded when engine, endpoint or graders give up: what is measured stays.
    """
    if config.default_domain not in DOMAINS:
        raise ValueError(f"default_domain is {config.default_domain!r}; it must be one of {', '.join(DOMAINS)}")
    sorting = _Sorting(config)  # reads all files, before anything is started or written
    refuse_images((one.prompt for one in sorting.left), "it would be measured by its text alone; curate such prompts elsewhere")
    try:
        with contextlib.ExitStack() as stack:
            model = EndpointModel(config, stack) if config.is_endpoint else FolderModel(Path(config.model), config, stack)
            config.to.mkdir(parents=True, exist_ok=True)
            journal = stack.enter_context(MeasurementJournal(config.to / JOURNAL_FILE))
            reward = dataclasses.replace(config.reward, not_graded="complete")  # the measurement counts them by itself
            judge = stack.enter_context(contextlib.closing(Judge(reward, model.tokenizer, num_workers=config.threads)))
            settings = {name: _plain(value) for name, value in dataclasses.asdict(config).items()} | {"model_settings": model.settings()}
            (config.to / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            outcome = _measured(sorting, config, model, judge, journal)
    except (EngineDiedError, ChatError, GradingError, UnavailableError) as error:
        raise RunEnded(f"{error}\nWhat is measured is in {config.to / JOURNAL_FILE}: the same command goes on after it") from error
    write_jsonl(config.to / PROMPTS_FILE, outcome.prompts)
    write_jsonl(config.to / EXCLUDED_FILE, (one.to_record() for one in outcome.excluded))
    write_report(outcome, config)
    if not outcome.prompts:
        raise ValueError(f"all {outcome.num_read} prompts were excluded; {config.to / EXCLUDED_FILE} says why")
    return outcome


class _Sorting:
    """The prompts that are left, and those that are not, in the order of the files."""

    def __init__(self, config: CurateConfig) -> None:
        self.excluded: list[Excluded] = []
        self.left: list[Candidate] = []
        for one in read_raw(config.files, config.default_domain):
            if isinstance(one, Excluded):
                self.excluded.append(one)
            else:
                self.left.append(one)
        self.num_read = len(self.left) + len(self.excluded)
        self._say("well-formed")
        self.sieve("in a form that can be graded", lambda one: excluded_form(one.prompt.text, one.prompt.answer))
        if config.against:
            benchmarks = Benchmarks(config.against)
            self.sieve("in no benchmark", lambda one: _because("contaminated", benchmarks.contains(one.prompt.text)))
        kept = Deduplicator()
        self.sieve("different", lambda one: _because("duplicate", kept.duplicate_of(one.prompt.text, one.prompt.answer, one.source)))

    def sieve(self, what: str, verdict_on: Callable[[Candidate], Verdict | None]) -> None:
        """Exclude the prompts on which there is a verdict."""
        left: list[Candidate] = []
        for candidate in self.left:
            verdict = verdict_on(candidate)
            if verdict is None:
                left.append(candidate)
            else:
                self.excluded.append(excluded(candidate, *verdict))
        self.left = left
        self._say(what)

    def _say(self, what: str) -> None:
        print(f"{len(self.left)} of {self.num_read} prompts are {what}", flush=True)


def _measured(sorting: _Sorting, config: CurateConfig, model: Answerer, judge: Judge, journal: MeasurementJournal) -> Outcome:
    direct = Task(
        name="direct",
        template=config.direct_template,
        prefix=config.direct_prefix,
        num_samples=config.num_direct,
        max_response_tokens=config.max_direct_tokens,
    )
    reasoned = Task(
        name="reasoned",
        template=config.prompt_template,
        num_samples=config.num_samples,
        max_response_tokens=config.max_response_tokens,
    )
    tasks = (direct, reasoned) if config.num_direct else (reasoned,)

    def tallies_of(task: Task) -> dict[str, Tally]:
        return measure([one.prompt for one in sorting.left], task, model=model, judge=judge, journal=journal, config=config)

    sorting.sieve("gradable", lambda one: _ungradable(one, judge))
    sorting.sieve("short enough", lambda one: _because("too_long", next(filter(None, (model.problem(one.prompt, t) for t in tasks)), "")))
    guessed: dict[str, Tally] = {}
    if config.num_direct:
        guessed = tallies_of(direct)
        sorting.sieve("not guessable", lambda one: _guessable(guessed[one.prompt.id]))
    tallies = tallies_of(reasoned)
    sorting.sieve("measured", lambda one: _unreliable(tallies[one.prompt.id]))
    prompts = [_record(one, tallies[one.prompt.id], config) for one in sorting.left]
    return Outcome(num_read=sorting.num_read, prompts=prompts, excluded=sorting.excluded)


def _record(candidate: Candidate, tally: Tally, config: CurateConfig) -> dict[str, object]:
    rate = round(tally.pass_rate, 6)
    return candidate.to_record(level=level_of(rate, config.level_bounds), pass_rate=rate, num_graded=tally.num_graded)


def _because(reason: Reason, detail: str) -> Verdict | None:
    return (reason, detail) if detail else None


def _ungradable(candidate: Candidate, judge: Judge) -> Verdict | None:
    try:
        judge.check([candidate.prompt])
    except ValueError as error:
        return "not_gradable", str(error)
    return None


def _guessable(tally: Tally) -> Verdict | None:
    if tally.num_correct:
        return "guessable", f"{tally.num_correct} of {tally.num_samples} answers without reasoning are right"
    return _unreliable(tally)  # nobody knows whether it can be guessed


def _unreliable(tally: Tally) -> Verdict | None:
    if tally.is_reliable:
        return None
    return "not_graded", f"only {tally.num_graded} of {tally.num_samples} responses could be graded"


def _plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
