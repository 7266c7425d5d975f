"""Duplicates and contamination."""

import json
import random
from pathlib import Path

import pytest

from tandem.engine.curate.overlap import DUPLICATE_SIMILARITY, Benchmarks, Deduplicator, NearDuplicates, tokens_of

TOM = "Tom has 4 apples and buys 9 more. How many apples does Tom have?"
TRAIN = "A train leaves at 8 in the morning and travels 60 miles each hour until it stops at noon. How far has it travelled by then?"


def benchmarks(tmp_path: Path, *questions: str) -> Benchmarks:
    file = tmp_path / "benchmark.jsonl"
    file.write_text("".join(json.dumps({"problem": question}) + "\n" for question in questions), encoding="utf-8")
    return Benchmarks([file])


@pytest.mark.parametrize(
    "again",
    [
        TOM,
        f"  {TOM.upper()} ",
        TOM.replace(" ", "\n\t"),
        TOM.replace("?", ""),
        TOM.replace("4", "$4$").replace("9", "{9}"),
        TOM.replace("buys", "he buys"),
        TOM.replace("have?", "have now?"),
    ],
)
def test_the_same_question_in_another_dress_is_a_duplicate(again: str) -> None:
    kept = Deduplicator()
    assert kept.duplicate_of(TOM, "13", "a:1") == ""
    assert "a:1" in kept.duplicate_of(again, "13", "a:2")


def test_another_number_sign_variable_or_answer_makes_another_problem() -> None:
    kept = Deduplicator()
    assert kept.duplicate_of(TOM, "13", "a:1") == ""
    assert kept.duplicate_of(TOM.replace("9", "8"), "13", "a:2") == ""
    assert kept.duplicate_of("If x + y = 12 and x - y = 2, find the value of x in lowest terms.", "7", "b:1") == ""
    assert kept.duplicate_of("If x + y = 12 and x - y = 2, find the value of y in lowest terms.", "5", "b:2") == ""
    assert kept.duplicate_of("If x + y = 12 and x + y = 2, find the value of x in lowest terms.", "7", "b:3") == ""
    assert kept.duplicate_of("The roots of the equation are 2 and 9. Give the larger root of the two.", "9", "c:1") == ""
    assert kept.duplicate_of("The roots of the equation are 2 and 9. Give the lesser root of the two.", "2", "c:2") == ""
    assert kept.duplicate_of("8*4-9*3*2?", "6", "d:1") == ""
    assert kept.duplicate_of("8*4-9*2*3?", "6", "d:2") == ""


def test_the_same_text_with_another_answer_is_a_duplicate_that_says_so() -> None:
    kept = Deduplicator()
    kept.duplicate_of(TOM, "13", "a:1")
    assert "whose answer is '13' instead of '14'" in kept.duplicate_of(TOM, "14", "a:2")


def test_numbers_with_separators_and_full_width_signs_are_the_same() -> None:
    assert tokens_of("１，２３４ apples") == tokens_of("1,234 Apples!") == ["1234", "apples"]
    assert tokens_of("twenty-five") == ["twenty", "five"]
    assert tokens_of("面积是 5-3") == ["面", "积", "是", "5", "-", "3"]
    assert tokens_of("$\\frac{1}{2}$") == tokens_of("\\dfrac 1 2")


def test_hashing_finds_what_an_exact_comparison_of_all_pairs_finds() -> None:
    generator = random.Random(1)
    words = ["train", "apple", "mile", "costs", "sells", "friend", "hours", "river", "twice", "paper", "green", "school"]
    texts = [[generator.choice(words) for _ in range(25)] for _ in range(60)]
    changed = []
    for text in texts:
        other = list(text)
        for _ in range(generator.randint(1, 6)):
            other[generator.randrange(len(other))] = generator.choice(words)
        changed.append(other)
    near = NearDuplicates()
    for text in texts:
        near.add(text)

    def shingles(tokens: list[str]) -> set[str]:
        text = " ".join(tokens)
        return {text[i : i + 5] for i in range(len(text) - 4)}

    num_similar = num_found = 0
    for i, other in enumerate(changed):
        similarity = len(shingles(other) & shingles(texts[i])) / len(shingles(other) | shingles(texts[i]))
        found = dict(near.find(other))
        assert (i in found) <= (similarity >= DUPLICATE_SIMILARITY)  # nothing is called similar that is not
        num_similar += similarity >= DUPLICATE_SIMILARITY
        num_found += i in found
    assert num_similar >= 20
    assert num_found >= 0.95 * num_similar  # hashing is by chance, but the seed is fixed


def test_a_benchmark_question_is_found_whatever_its_dress_and_surroundings(tmp_path: Path) -> None:
    against = benchmarks(tmp_path, TRAIN, "What is 2 + 2?")
    assert "benchmark.jsonl:1" in against.contains(TRAIN)
    assert "benchmark.jsonl:1" in against.contains(TRAIN.upper().replace(" ", "  "))
    assert "benchmark.jsonl:1" in against.contains(TRAIN.replace("60", "55"))  # other numbers do not make it a training prompt
    long = f"Here is a riddle that my uncle told me when we sat in the garden. {TRAIN} And what did the driver eat, who likes soup so much?"
    assert "runs of 13 tokens" in against.contains(long)
    assert "benchmark.jsonl:2" in against.contains("what is 2+2 ?")


def test_common_phrases_are_no_contamination(tmp_path: Path) -> None:
    tail = "The answer can be written as m/n where m and n are relatively prime positive integers. Find m + n."
    against = benchmarks(
        tmp_path, f"A fair coin is tossed until heads has come up twice as often as tails, at most 30 times. {tail}", "What is x?"
    )
    assert (
        against.contains(f"Two circles of radius 3 touch each other inside a square, whose diagonal is asked for in centimetres. {tail}")
        == ""
    )
    assert against.contains("What is x when 2x = 6 and x is no more than the number of days in a week?") == ""


def test_a_benchmark_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        Benchmarks([tmp_path / "missing.jsonl"])
    (tmp_path / "odd.jsonl").write_text('{"text": "?"}\n')
    with pytest.raises(ValueError, match=r"odd\.jsonl:1: found text; it needs a field question"):
        Benchmarks([tmp_path / "odd.jsonl"])
