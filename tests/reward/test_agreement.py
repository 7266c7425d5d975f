"""A file of planted problems at the paper's numbers: 50 inputs, ten programs each, all run. What every stage keeps is known beforehand."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.reward.agreement import Fate
from tandem.engine.reward.chat import Endpoint
from tandem.engine.reward.languages import missing_tools
from tandem.engine.reward.testgen import Settings
from tandem.engine.testgen import generate_tests
from tests.reward.chat_endpoint import Answer, chat_server, completion
from tests.reward.sandboxes import sandbox_or_skip

STATEMENT = "Problem {name}. You are given n (1 <= n <= 200) and n integers between 1 and 1000. Print {what}."
LIMITS = {"wall_s": 60, "cpu_s": 3}

MAXIMUM = "n = int(input())\nprint(max(map(int, input().split())))"
STYLES = [
    MAXIMUM,
    "import sys\nbest = 0\nfor word in sys.stdin.read().split()[1:]:\n    if int(word) > best: best = int(word)\nprint(best)",
    "from functools import reduce\ninput()\nprint(reduce(lambda a, b: a if a > b else b, map(int, input().split())), end='')",
    "import heapq\nn, *numbers = map(int, open(0).read().split())\nprint(' ', heapq.nlargest(1, numbers)[0], '\\n')",
]
IN_CPP = """#include <bits/stdc++.h>
int main() {
    int n, x, best = 0;
    for (std::cin >> n; n-- && std::cin >> x;) best = std::max(best, x);
    std::cout << best;
}"""
IN_OLD_CPP = """#include <cstdio>
int main() {
    int n, x, best = -1;
    scanf("%d", &n);
    while (scanf("%d", &x) == 1) if (x > best) best = x;
    printf("%d\\n", best);
    return 0;
}"""
IN_JAVASCRIPT = """const words = require("fs").readFileSync(0, "utf8").split(/\\s+/).filter(Boolean);
console.log(Math.max(...words.slice(1).map(Number)));"""
IN_JAVA = """import java.util.Scanner;
public class Largest {
    public static void main(String[] arguments) {
        Scanner in = new Scanner(System.in);
        int n = in.nextInt(), best = 0;
        while (n-- > 0) best = Math.max(best, in.nextInt());
        System.out.println(best);
    }
}"""
OTHER_LANGUAGES = [("cpp", IN_CPP), ("cpp", IN_OLD_CPP), ("javascript", IN_JAVASCRIPT), ("java", IN_JAVA)]
LAST = "n = int(input())\nprint(input().split()[-1])"
CRASH = "raise SystemExit(1)"
SLOW = "while True: pass"
HUNGRY = "x = bytearray(2 << 30)"
CHATTY = "while True: print('1' * 1000)"
CHOICES = [f"input()\nnumbers = sorted(map(int, input().split()))\nprint(numbers[{i} % len(numbers)])" for i in range(10)]

HEAD = "from cyaron import *\n\ndef generate(io, number):\n"
BODY = "    n = min(200, 1 + number * number // 10)\n    io.input_writeln(n)\n    io.input_writeln([randint(1, 1000) for _ in range(n)])\n"
GOOD = HEAD + BODY
CRASHES = HEAD + "    io.input_writeln(1 // 0)\n"
SILENT = HEAD + "    pass\n"
RESTLESS = HEAD + "    import os\n    io.input_writeln(1)\n    io.input_writeln(int.from_bytes(os.urandom(8), 'big'))\n"


def empty_lists(num: int) -> str:
    """A generator whose last inputs have no number, which the statement forbids: the programs, all of them, end badly there."""
    return f"{HEAD}    if number > {50 - num}:\n        io.input_writeln(0, number)\n        return\n{BODY}"


@dataclass(frozen=True)
class Planted:
    """What is in the file, what the model replies, and what must become of it."""

    name: str
    programs: list[Any]
    fate: Fate
    num_tests: int = 0
    num_failing: int = 0
    reason: str = ""
    replies: tuple[str, ...] = (GOOD,)
    num_generators: int = 1
    what: str = "the largest of them"

    @property
    def record(self) -> dict[str, Any]:
        question = STATEMENT.format(name=self.name, what=self.what)
        return {"id": self.name, "question": question, "submissions": self.programs, "limits": LIMITS}


def several_languages() -> list[Any]:
    others = [{"language": language, "source": source} for language, source in OTHER_LANGUAGES if not missing_tools(language)]
    return (others + STYLES * 3)[:10]


PLANTED = [
    Planted("several languages", several_languages(), Fate.KEPT, 50),
    Planted("nine right, one wrong", [MAXIMUM] * 9 + [LAST], Fate.KEPT, 50, 1),
    Planted("nine right, one slow", [MAXIMUM] * 9 + [SLOW], Fate.KEPT, 50, 1),
    Planted("eight right", [MAXIMUM] * 8 + [HUNGRY, CRASH], Fate.SUBMISSIONS_FAIL, 0, 2, "8 of 10 submissions pass"),
    Planted("seven right", [MAXIMUM] * 7 + [CHATTY, CRASH, CRASH], Fate.SUBMISSIONS_FAIL, 0, 3, "7 of 10 submissions pass"),
    Planted("six right", [MAXIMUM] * 6 + [CRASH] * 4, Fate.TOO_FEW_TESTS, 0, 0, "0 tests are valid, 11 are not"),
    Planted("forty valid", [MAXIMUM] * 10, Fate.KEPT, 40, replies=(empty_lists(10),)),
    Planted("thirty-nine valid", [MAXIMUM] * 10, Fate.TOO_FEW_TESTS, 0, 0, "39 tests are valid, 11 are not", (empty_lists(11),)),
    Planted("several right outputs", CHOICES, Fate.SPECIAL_JUDGE, reason="the submissions end well but disagree", what="one of them"),
    Planted("any", CHOICES, Fate.SPECIAL_JUDGE, reason="'Print any'", what="any of them", num_generators=0),
    Planted("third generator", [MAXIMUM] * 10, Fate.KEPT, 50, replies=(CRASHES, RESTLESS, GOOD), num_generators=3),
    Planted("no generator", [MAXIMUM] * 10, Fate.NO_GENERATOR, 0, 0, "different inputs", (CRASHES, SILENT, RESTLESS), 3),
    Planted("nine submissions", [MAXIMUM] * 9, Fate.TOO_FEW_SUBMISSIONS, reason="9 submissions can run here", num_generators=0),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The command's folder, and what the model was asked."""
    with sandbox_or_skip():
        pass
    folder = tmp_path_factory.mktemp("testgen")
    (folder / "problems.jsonl").write_text("".join(json.dumps(planted.record) + "\n" for planted in PLANTED))
    replies = {planted.record["question"]: [f"```python\n{code}```" for code in planted.replies] for planted in PLANTED}

    def script(body: dict[str, Any], number: int) -> Answer:
        """The problem's first reply, or that after the one which is complained about."""
        of_problem = replies[body["messages"][1]["content"]]
        earlier = [message["content"] for message in body["messages"] if message["role"] == "assistant"]
        return Answer(body=completion(of_problem[1 + of_problem.index(earlier[0]) if earlier else 0]))

    with chat_server(script) as server:
        generate_tests(folder / "problems.jsonl", folder / "out", Endpoint(url=server.url), Settings(), num_workers=2)
    return folder / "out", server.requests


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_problem_ends_as_it_must(made: tuple[Path, list[dict[str, Any]]], planted: Planted) -> None:
    stored = [json.loads(file.read_text()) for file in (made[0] / "problems").iterdir()]
    [outcome] = [one for one in stored if one["id"] == planted.name]
    assert (outcome["fate"], len(outcome["tests"])) == (planted.fate, planted.num_tests), outcome["reason"]
    assert (len(outcome["failing"]), outcome["num_generators"]) == (planted.num_failing, planted.num_generators), outcome["reason"]
    assert planted.reason in outcome["reason"]
    for test in outcome["tests"]:
        n, *numbers = map(int, test["stdin"].split())
        assert (len(numbers), test["expected"].split()) == (n, [str(max(numbers))])
    assert len({test["stdin"] for test in outcome["tests"]}) == planted.num_tests


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_keeps_what_the_paper_says(made: tuple[Path, list[dict[str, Any]]]) -> None:
    """The paper's funnel: all, those that need no special judge, those with at least 40 valid tests, those that are kept."""
    counts = json.loads((made[0] / "report.json").read_text())["counts"]
    assert counts == {
        **{"problems": 13, "kept": 5, "special judge": 2, "too few submissions": 1, "no generator": 1},
        **{"too few valid tests": 2, "submissions fail valid tests": 2, "undecided": 0, "tests": 4 * 50 + 40},
    }
    prompts = [json.loads(line) for line in (made[0] / "prompts.jsonl").read_text().splitlines()]
    assert [prompt["id"] for prompt in prompts] == [planted.name for planted in PLANTED if planted.fate is Fate.KEPT]
    complaints = [body["messages"][-1]["content"] for body in made[1] if len(body["messages"]) > 2]
    assert len(complaints) == 4  # two of each problem that was asked for three generators
    assert sum("ZeroDivisionError" in complaint for complaint in complaints) == 2
    assert sum("different inputs" in complaint for complaint in complaints) == 1
    assert sum("test 1 is empty" in complaint for complaint in complaints) == 1
