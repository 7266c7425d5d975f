"""`tandem testgen`: a whole file of problems, stopped and resumed, and a real model server that answers garbage."""

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.config import DataConfig, RewardConfig
from tandem.engine.data.prompts import load_prompts
from tandem.engine.data.tokenizer import byte_tokenizer
from tandem.engine.reward.chat import Endpoint
from tandem.engine.reward.code_grader import read_code_tests
from tandem.engine.reward.reward_model import ModelJudge
from tandem.engine.reward.testgen import Settings
from tandem.engine.testgen import generate_tests, read_problems
from tandem.engine.types import Prompt
from tests.model_servers import model_server
from tests.reward.chat_endpoint import Answer, chat_server, completion
from tests.reward.sandboxes import sandbox_or_skip

SUM = "print(sum(map(int, input().split())))"
GENERATOR = "```python\ndef generate(io, number):\n    io.input_writeln(number, number * number)\n```"
SETTINGS = Settings(num_tests=3, min_valid=3)
ADD = {"id": "add", "question": "Print the sum of the numbers.", "submissions": [SUM] * 10, "limits": {"wall_s": 5, "cpu_s": 2}}
ANY = {"id": "any", "question": "Print any of the numbers.", "submissions": [SUM] * 10}
FEW = {"id": "few", "question": "Print the sum of the numbers, please.", "submissions": [SUM] * 3}
BAD = {"id": "bad", "question": "Print the product of the numbers.", "submissions": [SUM] * 5 + ["print(5)"] * 5}


@pytest.fixture(autouse=True)
def _need_a_sandbox() -> None:
    with sandbox_or_skip():
        pass


def write_problems(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_problems_become_prompts_of_the_domain_code_with_a_report(tmp_path: Path) -> None:
    problems, to = write_problems(tmp_path / "problems.jsonl", BAD, ADD, ANY, FEW), tmp_path / "out"
    with chat_server(lambda body, number: Answer(body=completion(GENERATOR))) as server:
        counts = generate_tests(problems, to, Endpoint(url=server.url), SETTINGS, num_workers=1)
        assert len(server.requests) == 2
        before = {path: path.read_bytes() for path in to.rglob("*.json*")}
        assert generate_tests(problems, to, Endpoint(url=server.url), SETTINGS, num_workers=1) == counts
        assert len(server.requests) == 2, "what is decided is not asked again"
        assert {path: path.read_bytes() for path in to.rglob("*.json*")} == before
    expected = {"problems": 4, "kept": 1, "special judge": 2, "too few submissions": 1, "tests": 3, "undecided": 0}
    assert {name: count for name, count in counts.items() if count or name == "undecided"} == expected
    report = json.loads((to / "report.json").read_text())
    assert report["counts"] == counts
    assert report["reasons"]["any"] == "special judge: the statement says 'Print any'"
    assert "disagree" in report["reasons"]["bad"]
    (prompt,) = load_prompts(to / "prompts.jsonl", byte_tokenizer(), DataConfig(), context_length=512)
    assert (prompt.id, prompt.text, prompt.domain) == ("add", ADD["question"], "code")
    spec = read_code_tests(prompt.grading)
    assert [test.stdin for test in spec.tests] == ["1 1\n", "2 4\n", "3 9\n"]  # pyright: ignore[reportAttributeAccessIssue]
    assert [test.expected.strip() for test in spec.tests] == ["2", "6", "12"]  # pyright: ignore[reportAttributeAccessIssue]
    assert spec.limits is not None
    assert spec.limits.wall_s == 5


def test_what_the_endpoint_left_undecided_is_tried_again_and_a_changed_problem_too(tmp_path: Path) -> None:
    other = {**ADD, "id": "other", "question": "Add the numbers."}
    problems, to = write_problems(tmp_path / "problems.jsonl", ADD, other), tmp_path / "out"

    def script(body: dict[str, Any], number: int) -> Answer:
        is_down = "Add the" in body["messages"][1]["content"] and number < 2
        return Answer(body="no key", status=401) if is_down else Answer(body=completion(GENERATOR))

    with chat_server(script) as server:
        endpoint = Endpoint(url=server.url)
        first = generate_tests(problems, to, endpoint, SETTINGS, num_workers=1)
        assert (first["kept"], first["undecided"]) == (1, 1)
        assert "status 401" in json.loads((to / "report.json").read_text())["reasons"]["other"]
        second = generate_tests(problems, to, endpoint, SETTINGS, num_workers=1)
        assert (second["kept"], second["undecided"], len(server.requests)) == (2, 0, 3)
        write_problems(problems, {**ADD, "question": "Print the sum of all numbers."}, other)
        assert generate_tests(problems, to, endpoint, SETTINGS, num_workers=1)["kept"] == 2
        assert len(server.requests) == 4


def test_a_real_model_that_writes_garbage_leaves_problems_out_and_responses_ungraded(tmp_path: Path) -> None:
    problems = write_problems(tmp_path / "problems.jsonl", ADD, {**ADD, "id": "two", "question": "Print their sum."})
    with model_server(tmp_path / "tiny", max_position_embeddings=8192) as server:
        words = [sys.executable, "-m", "tandem.engine.cli", "testgen", str(problems), "--to", str(tmp_path / "out"), "--url", server.url]
        words += ["--max-tokens", "32", "--tests", "3", "--min-valid", "3"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
        grader = ModelJudge.open(RewardConfig(judge_url=server.url, judge_max_tokens=16))
        prompt = Prompt(id="p", text="How much is 1 + 1?", token_ids=(1,), answer="two", domain="judge")
        verdict = grader.grade("It is two.", prompt, is_complete=True)
        assert isinstance(verdict, Future)
        assert not verdict.result(240).graded
        assert "reply 3 of 3" in verdict.result().reason
        grader.close()
    assert done.returncode == 0, done.stderr
    assert "kept: 0\n" in done.stdout
    assert "no generator: 2\n" in done.stdout
    reasons = json.loads((tmp_path / "out/report.json").read_text())["reasons"]
    assert set(reasons) == {"add", "two"}
    for reason in reasons.values():
        assert "no generator: the generator ended with runtime error" in reason
    assert (tmp_path / "out/prompts.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "x"}, "field 'submissions' is None; it must be a list"),
        ({"question": "x", "submissions": [{"code": "x"}]}, "submissions or limits cannot be read: .*'code'"),
        ({"question": "x", "submissions": [{"source": "x", "language": "cobol"}]}, "language is 'cobol'"),
        ({"question": "x", "submissions": [], "limits": {"wall_s": -1}}, r"limits\.wall_s is -1"),
        ({"submissions": []}, "it needs a field question"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_asked(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write_problems(tmp_path / "problems.jsonl", {"question": "y", "submissions": []}, record)
    with pytest.raises(ValueError, match=message) as error:
        read_problems(path)
    assert f"{path}:2" in str(error.value)
