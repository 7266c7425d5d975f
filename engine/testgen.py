"""`tandem testgen`: a file of programming problems with accepted solutions becomes prompts of the domain code, with hidden tests.

The folder holds `problems/` with what became of each problem, `tests/` with the tests of those that are kept, `prompts.jsonl` and
`report.json`. Started again, it goes on: a problem that was decided is not looked at again, unless it or the settings changed. One that
could not be decided, because the endpoint or the sandbox failed, is tried again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem.engine.data.jsonl import read_jsonl, text_field
from tandem.engine.reward.agreement import Fate, Submission
from tandem.engine.reward.chat import ChatClient, ChatError, Endpoint, Message, Reply
from tandem.engine.reward.code_tests import Runner
from tandem.engine.reward.execution import Limits
from tandem.engine.reward.generator import SandboxFailedError, cyaron_files
from tandem.engine.reward.languages import missing_tools
from tandem.engine.reward.sandbox import Sandbox
from tandem.engine.reward.testgen import Outcome, Problem, Settings, make_tests

UNDECIDED = "undecided"


def generate_tests(problems: Path, to: Path, endpoint: Endpoint, settings: Settings, *, num_workers: int) -> dict[str, int]:
    """Everything; the counts of `report.json`.

    Args:
        num_workers: programs that run at a time; twice as many problems are looked at, for some wait for the model.
    Raises: ValueError for a bad line and an endpoint that is not there; UnavailableError without a sandbox.
    """
    wanted = read_problems(problems)
    cyaron_files()
    undecided = dict[str, str]()
    with ChatClient(endpoint) as client, Sandbox(num_workers=num_workers) as sandbox, ThreadPoolExecutor(2 * num_workers) as threads:
        futures = {threads.submit(_decide, problem, to, client, sandbox, settings): problem for problem in wanted}
        try:
            for future in as_completed(futures):
                problem = futures[future]
                try:
                    outcome = future.result()
                    said = f"{outcome.fate}{': ' if outcome.reason else ''}{outcome.reason}"
                except (ChatError, SandboxFailedError) as error:
                    undecided[problem.id] = said = f"{UNDECIDED}: {error}"
                print(f"{problem.id}: {said}", flush=True)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            client.close()
            raise
    return write_result(wanted, to, settings, undecided)


def read_problems(path: Path) -> list[Problem]:
    """`question` (or problem, prompt), `submissions`: a list of programs, each text (Python) or {"source", "language"}; optionally `id` and
    `limits`, fields of `Limits`. Programs whose language lacks its tools here are left out.

    Raises: ValueError naming file, line and field.
    """
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    for line, record in read_jsonl(path):
        where = f"{path}:{line}"
        statement = text_field(record, ("question", "problem", "prompt"), where)
        name = str(record.get("id", hashlib.sha256(statement.encode(errors="surrogatepass")).hexdigest()[:16]))
        if name in lines:
            raise ValueError(f"{where}: id {name!r} is already used in line {lines[name]}; ids (or texts) must differ")
        lines[name] = line
        submissions = record.get("submissions")
        if not isinstance(submissions, list):
            raise ValueError(f"{where}: field 'submissions' is {submissions!r:.80}; it must be a list of accepted programs")
        try:
            read = [Submission(source=one) if isinstance(one, str) else Submission(**one) for one in submissions]
            runnable = tuple(one for one in read if not missing_tools(one.language))
            limits = Limits(**record["limits"]) if "limits" in record else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: submissions or limits cannot be read: {error}") from error
        problems.append(Problem(id=name, statement=statement, submissions=runnable, limits=limits))
    return problems


def write_result(problems: Sequence[Problem], to: Path, settings: Settings, undecided: dict[str, str]) -> dict[str, int]:
    """`prompts.jsonl` with the problems that are kept, in their order, and `report.json`. Returns the counts."""
    counts = Counter({fate.value: 0 for fate in Fate} | {UNDECIDED: 0, "problems": len(problems), "tests": 0})
    prompts, reasons = [], dict(undecided)
    for problem in problems:
        stored = _stored(problem, to, settings)
        counts[UNDECIDED if stored is None else stored["fate"]] += 1
        if stored is None:
            continue
        if stored["fate"] != Fate.KEPT:
            reasons[problem.id] = f"{stored['fate']}: {stored['reason']}"
            continue
        counts["tests"] += len(stored["tests"])
        file = to / "tests" / _file_name(problem)
        _write(file, stored["tests"])
        grading: dict[str, Any] = {"tests": str(file.absolute())}
        if problem.limits is not None:
            grading["limits"] = asdict(problem.limits)
        prompts.append({"id": problem.id, "question": problem.statement, "domain": "code", "grading": grading})
    _replace(to / "prompts.jsonl", "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts))
    _write(to / "report.json", {"counts": dict(counts), "settings": asdict(settings), "reasons": reasons})
    return dict(counts)


def _decide(problem: Problem, to: Path, client: ChatClient, sandbox: Runner, settings: Settings) -> Outcome:
    stored = _stored(problem, to, settings)
    if stored is not None:
        fields = {name: value for name, value in stored.items() if name in Outcome.__dataclass_fields__}
        return Outcome(**{**fields, "fate": Fate(fields["fate"])})

    def ask(messages: Sequence[Message]) -> Reply:
        return client.submit(client.ask(messages, lambda reply: reply)).result()

    outcome = make_tests(problem, ask, sandbox, settings)
    _write(to / "problems" / _file_name(problem), {"id": problem.id, "digest": _digest(problem, settings), **asdict(outcome)})
    return outcome


def _stored(problem: Problem, to: Path, settings: Settings) -> dict[str, Any] | None:
    file = to / "problems" / _file_name(problem)
    if not file.is_file():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    return stored if stored["digest"] == _digest(problem, settings) else None


def _digest(problem: Problem, settings: Settings) -> str:
    """Of everything but the model that an outcome depends on."""
    return hashlib.sha256(json.dumps([asdict(problem), asdict(settings)], sort_keys=True).encode()).hexdigest()


def _file_name(problem: Problem) -> str:
    return hashlib.sha256(problem.id.encode(errors="surrogatepass")).hexdigest()[:16] + ".json"


def _write(file: Path, value: Any) -> None:
    _replace(file, json.dumps(value, indent=1))


def _replace(file: Path, text: str) -> None:
    """Whole or not at all, whenever the process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
