"""Raw lines, and the domain and discipline of each."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tandem.engine.curate.records import Candidate, read_raw
from tandem.engine.curate.tags import DISCIPLINES, discipline_of, domain_of


def candidate(tmp_path: Path, **fields: Any) -> Candidate:
    (tmp_path / "raw.jsonl").write_text(json.dumps({"question": "What is 2 + 3?", "answer": "5", **fields}))
    (found,) = read_raw((tmp_path / "raw.jsonl",), "math")
    assert isinstance(found, Candidate), found
    return found


def test_given_fields_win_and_unknown_ones_go_along(tmp_path: Path) -> None:
    given = candidate(
        tmp_path, domain="k12", discipline="reading", id="a-7", level=3, url="https://example.org", grading={"type": "numeric"}
    )
    line = given.to_record(level=1, pass_rate=0.7)
    assert (line["domain"], line["discipline"], line["url"], line["grading"]) == (
        "k12",
        "reading",
        "https://example.org",
        {"type": "numeric"},
    )
    assert (line["level"], line["given_level"], line["given_id"]) == (1, 3, "a-7")
    assert line["id"] != "a-7"  # two files may use one id for two prompts


def test_images_lie_beside_the_prompts_file_and_the_curated_file_names_them_whole(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    line = candidate(tmp_path, image="red.png").to_record()
    assert line["images"] == [str(tmp_path / "red.png")]
    assert "image" not in line


def test_all_three_names_of_a_question_are_read(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text(
        "".join(json.dumps({name: f"{name}?", "answer": 1.0}) + "\n" for name in ("question", "problem", "prompt"))
    )
    found = list(read_raw((tmp_path / "raw.jsonl",), "math"))
    assert [one.to_record()["question"] for one in found if isinstance(one, Candidate)] == ["question?", "problem?", "prompt?"]
    assert {one.to_record()["answer"] for one in found} == {"1"}


@pytest.mark.parametrize(
    ("record", "answer", "domain"),
    [
        ({"grading": {"tests": [{"stdin": "", "expected": "1"}]}}, "", "code"),
        ({"grading": {"type": "set"}}, "1, 2", "k12"),
        ({}, "Paris", "k12"),
        ({}, "the water cycle", "k12"),
        ({}, "北京", "k12"),
        ({}, "12 apples", "math"),
        ({}, "x", "math"),
        ({}, "xy", "math"),
        ({}, "pi", "math"),
        ({}, "\\text{even}", "math"),
        ({}, "a" * 5000 + "1", "math"),
    ],
)
def test_a_domain_follows_from_grading_and_answer(record: dict[str, Any], answer: str, domain: str) -> None:
    assert domain_of(record, answer, "math") == domain


@pytest.mark.parametrize(
    ("question", "discipline"),
    [
        ("Find the remainder when 7^100 is divided by 13.", "number_theory"),
        ("In how many ways can 5 books be arranged on a shelf?", "combinatorics"),
        ("Two dice are rolled. What is the probability of a sum of 7?", "probability"),
        ("A triangle has sides 3, 4 and 5. Find the radius of its incircle.", "geometry"),
        ("Solve for x: x^2 - 5x + 6 = 0.", "algebra"),
        ("Find the derivative of x^3.", "calculus"),
        ("Compute the determinant of the matrix.", "linear_algebra"),
        ("What is the median of 1, 2 and 9?", "statistics"),
        ("Evaluate \\sin 30^\\circ.", "trigonometry"),
        ("A resistor of 5 ohms carries 2 amperes. What is the voltage?", "physics"),
        ("How many moles are in 18 g of water?", "chemistry"),
        ("Which enzymes copy DNA?", "biology"),
        ("Write a function that reverses an array.", "programming"),
        ("Ann buys 3 pens for $2 each. How much does she pay in total?", "arithmetic"),
        ("주사위를 던질 때 3이 나올 확률은?", "probability"),
        ("求三角形的面积。", "geometry"),
        ("A circle of friends buys 4 pizzas for 10 dollars each. How much does each of the 5 friends pay in total?", "arithmetic"),
        ("A plane flies. Where is the answer m/n, where m and n are relatively prime positive integers?", "other"),
        ("Who wrote this?", "other"),
    ],
)
def test_a_discipline_follows_from_the_words(question: str, discipline: str) -> None:
    assert discipline_of(question) == discipline
    assert discipline in DISCIPLINES
