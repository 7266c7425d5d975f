"""The command as a whole, with a real model that was taught what to say."""

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.engine import cli
from tandem.engine.config import DataConfig
from tandem.engine.curate.config import CurateConfig
from tandem.engine.curate.curate import JOURNAL_FILE, PROMPTS_FILE, curate
from tandem.engine.curate.journal import MeasurementJournal
from tandem.engine.curate.tally import Tally, level_of
from tandem.engine.data.prompts import load_prompts
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.reward.domains import DOMAINS
from tests.curate.planted_model import (
    BENCHMARK,
    CONTEXT,
    PLANTED,
    curate_config,
    expectations,
)
from tests.model_servers import running_server


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def what_became(to: Path) -> dict[int, str]:
    """By line of the planted file."""
    became = {int(one["source"].rsplit(":", 1)[1]): "kept" for one in lines_of(to / PROMPTS_FILE)}
    excluded = {int(one["source"].rsplit(":", 1)[1]): one["reason"] for one in lines_of(to / "excluded.jsonl")}
    assert not became.keys() & excluded.keys()
    return became | excluded


@pytest.fixture(scope="module")
def curated(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("curated") / "out"
    curate(curate_config(planted_model, to))
    return to


def test_each_planted_prompt_is_excluded_for_its_own_reason_and_the_good_ones_stay(curated: Path) -> None:
    assert what_became(curated) == expectations()
    assert set(expectations().values()) > {"kept", "guessable", "contaminated", "duplicate", "malformed"}
    details = {one["reason"]: one["detail"] for one in lines_of(curated / "excluded.jsonl")}
    assert all(details.values())
    assert "answers without reasoning are right" in details["guessable"]


def test_what_the_model_reasons_out_is_easy_and_what_it_cannot_is_hard(curated: Path) -> None:
    kept = lines_of(curated / PROMPTS_FILE)
    solved = {one["question"]: one["pass_rate"] for one in kept if one["solved"]}
    unsolved = {one["question"]: one["pass_rate"] for one in kept if not one["solved"]}
    assert len(solved) == 3
    assert len(unsolved) == 6
    assert min(solved.values()) >= 0.6
    assert max(unsolved.values()) <= 0.2
    assert {one["level"] for one in kept if one["solved"]} <= {0, 1}
    assert {one["level"] for one in kept if not one["solved"]} <= {3, 4}
    assert all(one["num_graded"] == 10 for one in kept)


def test_a_run_takes_the_curated_file_as_it_is(curated: Path, planted_model: Path) -> None:
    tokenizer = load_tokenizer(planted_model)
    loaded = load_prompts(curated / PROMPTS_FILE, tokenizer, DataConfig(), context_length=CONTEXT, domains=DOMAINS)
    lines = lines_of(curated / PROMPTS_FILE)
    assert [(one.id, one.level, one.domain) for one in loaded] == [(one["id"], one["level"], one["domain"]) for one in lines]
    assert {one.answer for one in loaded} >= {"13", "18", "9\\pi"}  # of a worked solution the answer alone


def test_the_report_counts_every_prompt_once(curated: Path) -> None:
    report = json.loads((curated / "report.json").read_text())
    expected = list(expectations().values())
    assert report["num_read"] == len(expected)
    assert {step["reason"]: step["excluded"] for step in report["steps"]} == {
        reason: expected.count(reason) for reason in {step["reason"] for step in report["steps"]}
    }
    assert report["steps"][-1]["left"] == report["num_kept"] == expected.count("kept")
    for histogram in ("pass_rate", "level", "discipline", "domain"):
        assert sum(report[histogram].values()) == report["num_kept"]
    assert (curated / "report.png").read_bytes().startswith(b"\x89PNG")
    markdown = (curated / "report.md").read_text()
    assert "| proof | 5 |" in markdown
    assert "Prove that the square root of 2" in markdown


def test_the_same_command_asks_only_again_what_could_not_be_graded(
    curated: Path,
    planted_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (curated / PROMPTS_FILE).read_bytes()
    curate(curate_config(planted_model, curated))
    said = capsys.readouterr().out
    assert "direct: 8 responses to each of 12/12 prompts, 11 of them from the journal" in said
    assert "reasoned: 10 responses to each of 9/9 prompts, 9 of them from the journal" in said
    assert (curated / PROMPTS_FILE).read_bytes() == before


def test_what_depends_on_a_changed_option_is_measured_again(
    curated: Path,
    planted_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    curate(curate_config(planted_model, curated, num_samples=2, max_batch=16))
    said = capsys.readouterr().out
    assert "direct: 8 responses to each of 12/12 prompts, 11 of them from the journal" in said
    assert "reasoned: 2 responses to each of 9/9 prompts\n" in said


def test_a_prefix_begins_the_response_and_the_grader_reads_it(planted_model: Path, tmp_path: Path) -> None:
    """The taught direct form is QUESTION= : the sign may stand in the template, or begin the response."""
    config = curate_config(planted_model, tmp_path / "out", direct_template="{question}", direct_prefix="=", num_samples=1)
    curate(config)
    assert what_became(tmp_path / "out") == expectations()


def raw_file(file: Path, num: int) -> Path:
    file.write_text("".join(json.dumps({"question": f"Give {i} more than {3 * i} apples.", "answer": 4 * i}) + "\n" for i in range(num)))
    return file


def num_measured(journal: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as database, contextlib.suppress(sqlite3.Error):
        return database.execute("SELECT count(*) FROM measured").fetchone()[0]
    return 0


KILLED_AT_THE_FIFTH = """
import os, signal, sys
from tandem.engine import cli
from tandem.engine.curate.journal import MeasurementJournal

record, recorded = MeasurementJournal.record, []

def record_and_die(self, *measured):
    record(self, *measured)
    recorded.append(measured)
    if len(recorded) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

MeasurementJournal.record = record_and_die
cli.main(sys.argv[1:])
"""


def test_after_kill_9_the_same_command_goes_on_and_ends_with_the_same_bytes(
    planted_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = raw_file(tmp_path / "raw.jsonl", 30)
    options = {"against": (), "num_direct": 0, "max_batch": 10, "max_response_tokens": 24}
    config = curate_config(planted_model, tmp_path / "killed", raw, **options)
    words = ["curate", str(raw), "--to", str(config.to), "--model", str(planted_model), "--num_direct", "0", "--max_batch", "10"]
    words += ["--max_response_tokens", "24", "--max_direct_tokens", "20", "--direct_template", "{question}="]
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_THE_FIFTH, *words], capture_output=True, text=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    num_kept = num_measured(config.to / JOURNAL_FILE)
    assert num_kept == 5
    assert not (config.to / PROMPTS_FILE).exists()
    capsys.readouterr()
    curate(config)
    assert f"of 30/30 prompts, {num_kept} of them from the journal" in " ".join(capsys.readouterr().out.split("\n"))
    curate(curate_config(planted_model, tmp_path / "whole", raw, **options))
    assert (tmp_path / "killed" / PROMPTS_FILE).read_bytes() == (tmp_path / "whole" / PROMPTS_FILE).read_bytes()


def test_an_endpoint_is_asked_like_a_folder(planted_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_server(planted_model) as (url, _):
        curate(curate_config(url, tmp_path / "out", max_batch=32, num_samples=4))
    became, expected = what_became(tmp_path / "out"), expectations()
    too_long = next(line for line, what in expected.items() if what == "too_long")
    assert became == expected | {too_long: "not_graded"}  # only the endpoint knows how long is too long
    assert "refuses the request with status 400" in capsys.readouterr().out
    assert {one["pass_rate"] >= 0.5 for one in lines_of(tmp_path / "out" / PROMPTS_FILE) if one["solved"]} == {True}


def test_an_endpoint_that_is_not_there_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/v1/models does not answer"):
        curate(curate_config("http://127.0.0.1:9/v1", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_files_and_models_are_named_before_anything_is_written(planted_model: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        curate(curate_config(planted_model, to, tmp_path / "missing.jsonl"))
    (tmp_path / "answerless.jsonl").write_text('{"question": "What?"}\n{"question": "Who?"}\n')
    with pytest.raises(ValueError, match=r"answerless\.jsonl has no usable prompt: line 1: found question; it needs a field answer"):
        curate(curate_config(planted_model, to, PLANTED, tmp_path / "answerless.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl has no usable prompt: it is empty"):
        curate(curate_config(planted_model, to, tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="is not a folder; a model folder holds"):
        curate(curate_config(tmp_path / "nowhere", to))
    with pytest.raises(ValueError, match=r"benchmark\.json does not exist"):
        curate(curate_config(planted_model, to, against=(BENCHMARK.with_suffix(".json"),)))
    with pytest.raises(ValueError, match="default_domain is 'maths'; it must be one of arithmetic"):
        curate(curate_config(planted_model, to, default_domain="maths"))
    with pytest.raises(ValueError, match=f"max_response_tokens is {CONTEXT};.*context of {CONTEXT} tokens"):
        curate(curate_config(planted_model, to, max_response_tokens=CONTEXT))
    with pytest.raises(ValueError, match="max_direct_tokens is 20; direct_prefix alone has 30 tokens"):
        curate(curate_config(planted_model, to, direct_prefix="=" * 30))
    assert not to.exists()


def test_no_prompt_left_is_an_error_and_the_reasons_stay(planted_model: Path, tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text('{"question": "Prove that 1 = 1.", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"all 1 prompts were excluded; .*excluded\.jsonl says why"):
        curate(curate_config(planted_model, tmp_path / "out", tmp_path / "raw.jsonl"))
    assert [one["reason"] for one in lines_of(tmp_path / "out" / "excluded.jsonl")] == ["proof"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "files is .*; name at least one"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"direct_template": "Answer!"}, "direct_template is 'Answer!'; it must contain {question}"),
        ({"level_bounds": (0.2, 0.5)}, "level_bounds is .*; they must lie in"),
        ({"model": "http://host/v1", "direct_prefix": "A:"}, "direct_prefix is 'A:'; an endpoint cannot be given one"),
    ],
)
def test_an_option_out_of_its_range_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurateConfig(**{"files": (Path("a"),), "to": Path("b"), "model": "c", **changes})


def test_the_command_ends_with_one_line_for_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["curate", str(tmp_path / "none.jsonl"), "--to", str(tmp_path / "out"), "--model", "nowhere"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {tmp_path / 'none.jsonl'} does not exist or is no file; give a JSONL file"]


def test_a_damaged_journal_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match=r"journal\.sqlite is damaged .*; remove it"):
        MeasurementJournal(tmp_path / "journal.sqlite")


def test_levels_follow_from_the_pass_rate() -> None:
    bounds = (0.9, 0.6, 0.3, 0.1)
    assert [level_of(rate, bounds) for rate in (1.0, 0.9, 0.8, 0.6, 0.5, 0.3, 0.2, 0.1, 0.0)] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert level_of(0.0, ()) == 0
    assert Tally(num_samples=10, num_graded=5, num_correct=1).is_reliable
    assert Tally(num_samples=10, num_graded=5, num_correct=1).pass_rate == 0.2
    assert not Tally(num_samples=10, num_graded=4, num_correct=1).is_reliable
