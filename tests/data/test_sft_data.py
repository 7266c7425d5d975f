"""Supervised examples and their batches."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tandem.engine.config import DataConfig
from tandem.engine.data.sft import SFTExample, load_sft, sft_batches
from tandem.engine.data.tokenizer import byte_tokenizer


def load(path: Path, *records: object, max_tokens: int = 32) -> list[SFTExample]:
    (path / "sft.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return load_sft(path / "sft.jsonl", byte_tokenizer(), DataConfig(prompt_template="<{question}>"), max_tokens=max_tokens)


def test_a_response_ends_in_the_end_token_and_a_prompt_is_templated(tmp_path: Path) -> None:
    (example,) = load(tmp_path, {"prompt": "1?", "response": "A:1."})
    assert example.prompt_ids.tolist() == [257, *b"<1?>"]
    assert example.response_ids.tolist() == [*b"A:1.", 258]
    assert example.prompt_ids.dtype == example.response_ids.dtype == np.int32
    assert example.num_tokens == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ({"prompt": "q"}, "found prompt; it needs a field response"),
        ({"prompt": "", "response": "r"}, "'prompt' is empty"),
        ({"prompt": "q", "response": 4}, "'response' is 4"),
        ({"prompt": "q", "response": "r" * 40}, r"has 45 tokens; shorten it, or raise max_tokens \(32\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"sft\.jsonl:2: .*{message}"):
        load(tmp_path, {"prompt": "q", "response": "r"}, line)


@pytest.mark.parametrize("seed", range(10))
def test_batches_are_full_and_every_example_comes_once_an_epoch(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 30, size=40)
    batches = list(itertools.islice(sft_batches(lengths.tolist(), batch_tokens=100, seed=seed), 60))
    order = list(itertools.chain.from_iterable(batches))
    for start in range(0, len(order) - 40, 40):
        assert Counter(order[start : start + 40]) == Counter(range(40))
    assert order[:40] != order[40:80]
    for batch, following in itertools.pairwise(batches):
        assert lengths[batch].sum() <= 100 < lengths[batch].sum() + lengths[following[0]]


def test_batches_depend_on_the_seed_only_and_can_be_resumed() -> None:
    lengths = list(range(1, 30))
    whole = list(itertools.islice(sft_batches(lengths, batch_tokens=64, seed=1), 20))
    assert whole[12:] == list(itertools.islice(sft_batches(lengths, batch_tokens=64, seed=1, start_step=12), 8))
    assert whole != list(itertools.islice(sft_batches(lengths, batch_tokens=64, seed=2), 20))


def test_no_examples_and_one_longer_than_a_batch_are_errors() -> None:
    with pytest.raises(ValueError, match="no supervised examples"):
        sft_batches([], batch_tokens=8, seed=0)
    with pytest.raises(ValueError, match="example 1 has 9 tokens"):
        sft_batches([3, 9], batch_tokens=8, seed=0)
