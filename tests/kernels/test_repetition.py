"""Repetition is found where its definition says: token by token in a batch, and afterwards in whole responses."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.kernels import backend
from tandem.kernels.repetition import Detector, Rule, first_repetition

BACKENDS: list[Any] = ["reference", "triton"]


def brute_force(tokens: Sequence[int], rule: Rule) -> bool:
    """Whether the rule fires at the end of `tokens`, from its definition."""
    for period in range(1, rule.max_period + 1):
        run = 0
        while run < len(tokens) - period and tokens[-1 - run] == tokens[-1 - run - period]:
            run += 1
        if run >= period * (rule.min_repeats - 1) and run + period >= rule.min_tokens:
            return True
    seen, cusum = set(), 0
    for end in range(rule.ngram, len(tokens) + 1) if rule.ngram else ():
        ngram = tuple(tokens[end - rule.ngram : end])
        cusum = max(0, cusum + (1 if ngram in seen else -1))
        seen.add(ngram)
    return cusum > rule.ngram_threshold


def firing(tokens: Sequence[int], rule: Rule) -> list[bool]:
    return [brute_force(tokens[:end], rule) for end in range(1, len(tokens) + 1)]


def loopy_text(rng: random.Random, num_tokens: int) -> list[int]:
    """Random tokens of a small vocabulary mixed with loops that are now and then broken."""
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        cycle = [rng.randrange(4) for _ in range(rng.randrange(1, 8))]
        for _ in range(rng.randrange(1, 6)):
            tokens += cycle
            if rng.random() < 0.2:
                tokens.append(rng.randrange(4))
    return tokens[:num_tokens]


def rule_of(max_period: int, min_repeats: int = 3, min_tokens: int = 0, ngram: int = 0, ngram_threshold: float = 0.0) -> Rule:
    return Rule(max_period=max_period, min_repeats=min_repeats, min_tokens=min_tokens, ngram=ngram, ngram_threshold=ngram_threshold)


RULES = {
    "both": rule_of(6, min_tokens=8, ngram=3, ngram_threshold=6),
    "cycles": rule_of(6),
    "one period": rule_of(1, min_repeats=2, ngram=1, ngram_threshold=9.5),
    "n-grams": rule_of(0, ngram=4, ngram_threshold=5),
    "long n-grams": rule_of(2, min_repeats=9, ngram=7, ngram_threshold=4),
    "nothing": rule_of(0),
}


def on_device(tokens: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(tokens, dtype=dtype, device=DEVICE)


def ragged(texts: Sequence[Sequence[int]], dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = np.cumsum([0, *map(len, texts)]).tolist()
    return on_device([token for text in texts for token in text], dtype), on_device(offsets, torch.int32)


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("name", RULES)
def test_every_push_agrees_with_the_definition(name: str, choice: Any) -> None:
    rule, rng = RULES[name], random.Random(1)
    num_rows, num_tokens = (12, 60) if choice == "reference" or DEVICE == "cuda" else (3, 36)
    texts = [loopy_text(rng, num_tokens) for _ in range(num_rows)]
    wanted = [firing(text, rule) for text in texts]
    with backend.chosen(choice):
        detector = Detector(rule, num_rows, max_tokens=num_tokens, device=DEVICE)
    dtypes = (torch.int32, torch.int64)
    found = [detector.push(on_device([text[t] for text in texts], dtypes[t % 2])).tolist() for t in range(num_tokens)]
    assert [list(row) for row in zip(*found, strict=True)] == wanted
    assert name == "nothing" or {True, False} <= {fires for row in wanted for fires in row}


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("name", RULES)
def test_rows_go_on_from_any_tokens_and_keep_their_history_when_they_are_moved(name: str, choice: Any) -> None:
    """As resumed responses do, beside others, in a batch whose rows change places."""
    rule, rng = RULES[name], random.Random(2)
    texts = [loopy_text(rng, length + 12) for length in (0, 1, 2, 7, 30)]
    earlier = [len(text) - 12 for text in texts]
    with backend.chosen(choice):
        detector = Detector(rule, 6, max_tokens=60, device=DEVICE)
        detector.push(on_device([1, 1, 1, 1, 1, 1]))  # of other responses, forgotten below
        detector.reset([4, 0, 1, 3, 2], *ragged([texts[i][: earlier[i]] for i in (4, 0, 1, 3, 2)]))
    rows = [0, 1, 2, 3, 4]
    for t in range(12):
        if t == 4:
            detector.permute(np.array([2, 0, 4, 1, 3]))
            rows = [2, 0, 4, 1, 3]
        if t == 8:  # row 1 is done; the last one takes its place
            detector.move(4, 1)
            rows = [2, 3, 4, 1]
        fires = detector.push(on_device([texts[i][earlier[i] + t] for i in rows])).tolist()
        assert fires == [brute_force(texts[i][: earlier[i] + t + 1], rule) for i in rows]


@pytest.mark.parametrize(("choice", "dtype"), [("reference", torch.int32), ("triton", torch.int32), ("reference", torch.int64)])
def test_a_planted_cycle_of_every_period_is_found_where_it_is_complete(choice: Any, dtype: torch.dtype) -> None:
    rng = random.Random(3)
    rule = rule_of(9, min_repeats=3, min_tokens=12)
    texts = []
    for period in range(1, 12):  # two longer than any that is watched
        start = rng.randrange(25)
        noise = [1000 + i for i in range(start)]
        texts.append([*noise, *(i % period for i in range(40)), 5000])
    wanted = [next((t for t in range(len(text)) if brute_force(text[: t + 1], rule)), -1) for text in texts]
    assert [t - len([x for x in text if 1000 <= x < 5000]) for t, text in zip(wanted[:9], texts[:9], strict=True)] == [
        max(3 * period, 12) - 1 for period in range(1, 10)
    ]
    assert wanted[9:] == [-1, -1]
    with backend.chosen(choice):
        assert first_repetition(*ragged(texts, dtype), rule).tolist() == wanted


@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("name", RULES)
def test_the_first_repetition_of_whole_responses(name: str, choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.kernels.repetition import triton

    monkeypatch.setattr(triton, "TILE", 16)  # so that runs and sums go on from tile to tile
    rule, rng = RULES[name], random.Random(4)
    texts = [[], *(loopy_text(rng, length) for length in (1, 2, 3, 17, 16, 60)), [], [rng.randrange(9**9) for _ in range(50)], [7] * 20, []]
    wanted = [next((t for t, fires in enumerate(firing(text, rule)) if fires), -1) for text in texts]
    with backend.chosen(choice):
        found = first_repetition(*ragged(texts), rule)
        assert (found.tolist(), found.dtype) == (wanted, torch.int64)
        assert first_repetition(*ragged([[], []]), rule).tolist() == [-1, -1]
        assert first_repetition(*ragged([]), rule).tolist() == []


def test_ngrams_of_one_response_are_not_those_of_another() -> None:
    text = list(range(30))
    with backend.chosen("triton"):
        assert first_repetition(*ragged([text, text, text]), RULES["n-grams"]).tolist() == [-1, -1, -1]
        assert first_repetition(*ragged([text * 2, text]), RULES["n-grams"]).tolist() == [30 + 3 + 5, -1]


@pytest.mark.parametrize("choice", BACKENDS)
def test_an_ngram_whose_hash_marks_a_free_cell_counts(choice: Any) -> None:
    """Token 0 alone has hash 0."""
    rule = rule_of(0, ngram=3, ngram_threshold=2)
    with backend.chosen(choice):
        detector = Detector(rule, 1, max_tokens=8, device=DEVICE)
        assert [detector.push(on_device([0])).item() for _ in range(8)] == firing([0] * 8, rule)
        assert first_repetition(*ragged([[0] * 8]), rule).item() == 5


def test_cells_that_are_taken_are_passed() -> None:
    """All n-grams of these responses begin their search in one of a few cells, and all are told apart."""
    rule = rule_of(0, ngram=1, ngram_threshold=3)
    multiplier = int(rule.coefficients()[0])
    inverse = pow(multiplier, -1, 1 << 64)
    # Tokens (as 64-bit numbers) whose hashes are 1, 2, 3 and the highest: the first cell and the last, from which the search goes on at 0.
    hashes = [1, 2, 3, 2**64 - 1, 2**64 - 2, 2**64 - 3]
    text = [(value * inverse + 2**63) % 2**64 - 2**63 for value in hashes]
    text += text[::-1]
    with backend.chosen("triton"):
        detector = Detector(rule, 1, max_tokens=len(text), device=DEVICE)
    assert [detector.push(on_device([token])).item() for token in text] == firing(text, rule)
    assert firing(text, rule)[-1]


def test_beyond_max_tokens_ngrams_are_looked_up_but_no_more_remembered() -> None:
    rule = rule_of(0, ngram=1, ngram_threshold=2)
    text = [1, 2, 3, 4, 5, 6, 5, 6, 5, 6, 1, 2, 3, 4]
    with backend.chosen("triton"):
        detector = Detector(rule, 1, max_tokens=4, device=DEVICE)
    assert [detector.push(on_device([token])).item() for token in text] == [False] * 12 + [True] * 2
    assert firing(text, rule).index(True) == 8


@pytest.mark.parametrize("choice", BACKENDS)
def test_loops_under_a_rule_as_runs_have_it(choice: Any) -> None:
    rule = rule_of(16, min_repeats=8, min_tokens=32, ngram=8, ngram_threshold=20)
    rng = random.Random(5)
    texts = [
        [rng.randrange(100) for _ in range(90)],
        [rng.randrange(50) for _ in range(4)] * 30,
        [token for turn in range(7) for token in (*range(24), 100 + turn)],  # turns that differ in one token
    ]
    wanted = [next((t for t in range(len(text)) if brute_force(text[: t + 1], rule)), -1) for text in texts]
    with backend.chosen(choice):
        assert first_repetition(*ragged(texts), rule).tolist() == wanted
    assert wanted[:2] == [-1, 4 * 8 - 1]
    assert wanted[2] > 2 * 25


def test_what_does_not_fit_is_named() -> None:
    rule = RULES["both"]
    with pytest.raises(ValueError, match="min_repeats is 1; it must be at least 2"):
        rule_of(3, min_repeats=1)
    with pytest.raises(ValueError, match="ngram_threshold is nan; it must be at least 0"):
        rule_of(3, ngram_threshold=float("nan"))
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 1"):
        Detector(rule, 2, max_tokens=0, device="cpu")
    detector = Detector(rule, 2, max_tokens=5, device="cpu")
    with pytest.raises(ValueError, match="tokens_B has 3 tokens; the detector has 2 rows"):
        detector.push(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"tokens_B is \(2,\) torch.float32; it must have one contiguous dimension of int32 or int64"):
        detector.push(torch.zeros(2))
    with pytest.raises(ValueError, match="tokens_B is on meta; the detector is on cpu"):
        detector.push(torch.zeros(2, dtype=torch.int32, device="meta"))
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"rows is \[2\] and cu_seqlens has 2 offsets; rows must be different ones from 0 to 1"):
        detector.reset([2], torch.zeros(2, dtype=torch.int32), offsets)
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 2\], ending at 2; it must rise from 0 to 3, the tokens"):
        first_repetition(torch.zeros(3, dtype=torch.int32), offsets, rule)
    with pytest.raises(ValueError, match=r"cu_seqlens is \(2,\) torch.int64 on cpu; it must be \[R\+1\] torch.int32"):
        first_repetition(torch.zeros(2, dtype=torch.int32), offsets.long(), rule)
