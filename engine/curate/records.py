"""The raw prompts, line by line, and what becomes of each: still a candidate, or excluded for a reason."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.engine.curate.form import Form
from tandem.engine.curate.tags import discipline_of, domain_of
from tandem.engine.data.jsonl import parse_object, read_lines, text_field
from tandem.engine.data.prompts import parse_prompt
from tandem.engine.reward.domains import DOMAINS
from tandem.engine.types import Prompt

Reason = Literal["malformed", Form, "contaminated", "duplicate", "not_gradable", "too_long", "guessable", "not_graded"]
# In the order in which they are looked for: a prompt is excluded for the first that holds.
REASONS: tuple[Reason, ...] = (
    "malformed",
    "multiple_choice",
    "true_false",
    "proof",
    "contaminated",
    "duplicate",
    "not_gradable",
    "too_long",
    "guessable",
    "not_graded",
)
_QUESTION_FIELDS = ("question", "problem", "prompt")
_SHOWN_CHARS = 2000  # of a question or a malformed line, among the excluded


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A prompt that nothing has excluded so far. Its id is a hash of its text, whatever the file says: those of two files may clash."""

    source: str  # FILE:LINE
    prompt: Prompt
    discipline: str
    record: Mapping[str, Any]

    def to_record(self, **measured: Any) -> dict[str, Any]:
        """A line of the curated file; fields that nobody here knows go along, and a given id and level under other names."""
        known = {*_QUESTION_FIELDS, "answer", "id", "level", "domain", "discipline", "grading"}
        line: dict[str, Any] = {"id": self.prompt.id, "question": self.prompt.text, "answer": self.prompt.answer}
        line |= {"domain": self.prompt.domain, "discipline": self.discipline, **measured, "source": self.source}
        line |= {"grading": self.record["grading"]} if "grading" in self.record else {}
        line |= {f"given_{name}": self.record[name] for name in ("id", "level") if name in self.record}
        return {name: value for name, value in self.record.items() if name not in known} | line


@dataclass(frozen=True, kw_only=True, slots=True)
class Excluded:
    source: str
    reason: Reason
    detail: str
    question: str = ""
    answer: str = ""

    def to_record(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "reason": self.reason,
            "detail": self.detail,
            "question": self.question[:_SHOWN_CHARS],
            "answer": self.answer[:_SHOWN_CHARS],
        }


def excluded(candidate: Candidate, reason: Reason, detail: str) -> Excluded:
    return Excluded(source=candidate.source, reason=reason, detail=detail, question=candidate.prompt.text, answer=candidate.prompt.answer)


def read_raw(files: tuple[Path, ...], default_domain: str) -> Iterator[Candidate | Excluded]:
    """Every line that is not blank, in order; a bad one is excluded as malformed and says why.

    Raises: ValueError for a missing file, and for one without a single usable line: that is a mistake in the file, not in a line.
    """
    for file in files:
        num_usable, first_problem = 0, ""
        for number, line in read_lines(file):
            where = f"{file}:{number}"
            try:
                candidate = _candidate(line, where, default_domain, file.parent)
            except ValueError as error:
                detail = str(error).removeprefix(f"{where}: ")
                first_problem = first_problem or f"line {number}: {detail}"
                yield Excluded(source=where, reason="malformed", detail=detail, question=line[:_SHOWN_CHARS].decode(errors="replace"))
                continue
            num_usable += 1
            yield candidate
        if not num_usable:
            raise ValueError(f"{file} has no usable prompt: {first_problem or 'it is empty'}")


def _candidate(line: bytes, where: str, default_domain: str, folder: Path) -> Candidate:
    record = parse_object(line, where)
    fields = {name: value for name, value in record.items() if name not in ("id", "level")}
    prompt = parse_prompt(fields, where, default_domain=default_domain, domains=DOMAINS, folder=folder)
    if prompt.images:  # written with whole paths, for the curated file stands in another folder
        record = {name: value for name, value in record.items() if name != "image"} | {"images": [image.path for image in prompt.images]}
    if "domain" not in record:
        prompt = dataclasses.replace(prompt, domain=domain_of(record, prompt.answer, default_domain))
    discipline = text_field(record, ("discipline",), where) if "discipline" in record else discipline_of(prompt.text)
    return Candidate(source=where, prompt=prompt, discipline=discipline, record=record)
