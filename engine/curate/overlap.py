"""Near-duplicates within the prompts, and prompts that a benchmark contains: MinHash with locality-sensitive hashing (datasketch).

Hashing only finds candidates; each is then compared exactly, so that what is dropped follows from a rule and not from luck:

- duplicate: the same text but for case, spaces, punctuation and LaTeX's dressing; or 5-character shingles with a Jaccard similarity of
  DUPLICATE_SIMILARITY, and the same numbers and symbols in the same order, and the same answer. A problem with another number is another
  problem.
- contaminated: shingles that similar to a benchmark question's, whatever the numbers; or, for a question within a longer text, runs of
  RUN_TOKENS tokens in common that cover half of the benchmark question (all of it where it is shorter).
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import xxhash
from datasketch import MinHash, MinHashLSH

from tandem.engine.data.jsonl import read_jsonl, text_field

DUPLICATE_SIMILARITY = 0.7
SHINGLE_CHARS = 5
RUN_TOKENS = 13  # the usual length of n-gram decontamination since GPT-3 (arXiv:2005.14165, appendix C)
MIN_RUN_TOKENS = 8  # a shorter benchmark question is looked for by similarity only: its words stand in many others
COVERED_SHARE = 0.5

_NUM_HASHES = 128
_CANDIDATE_SIMILARITY = 0.5  # well below what counts, so that hashing misses next to nothing that does
_DRESSING = re.compile(r"\\(?:left|right|displaystyle|textbf|text|mathrm|mathbf|quad|qquad|[dt](?=frac)|[,;:! ()\[\]])|[${}\\~]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A number, a word of one script, one character of a script without spaces, or a sign; a hyphen or slash between letters is none.
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[぀-ヿ㐀-鿿]|[^\W\d_぀-ヿ㐀-鿿]+|(?<![^\W\d_])[-/]|[-/](?![^\W\d_])|[+*=<>^%|×÷·√π]|(?<=\d)!")


def tokens_of(text: str) -> list[str]:
    """Words, numbers and signs in their order, without case, punctuation and LaTeX's dressing."""
    plain = _DRESSING.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return _TOKEN.findall(_THOUSANDS.sub("", plain))


class NearDuplicates:
    """Texts, and which of them another one repeats."""

    def __init__(self) -> None:
        self._index = MinHashLSH(threshold=_CANDIDATE_SIMILARITY, num_perm=_NUM_HASHES)
        self._texts: list[str] = []  # normal forms, by key
        self._whole: dict[str, int] = {}  # the first key of each normal form

    def find(self, tokens: list[str]) -> list[tuple[int, float]]:
        """(number of the text in the order of `add`, similarity) of all that are as similar as a duplicate; the most similar first."""
        text = " ".join(tokens)
        if text in self._whole:
            return [(self._whole[text], 1.0)]
        shingles = _shingles(text)
        candidates = cast(list[int], self._index.query(_minhash(shingles)))
        similar = ((key, _jaccard(shingles, _shingles(self._texts[key]))) for key in candidates)
        return sorted((found for found in similar if found[1] >= DUPLICATE_SIMILARITY), key=lambda found: (-found[1], found[0]))

    def add(self, tokens: list[str]) -> None:
        text = " ".join(tokens)
        if text not in self._whole:
            self._whole[text] = len(self._texts)
            self._index.insert(len(self._texts), _minhash(_shingles(text)))
        self._texts.append(text)


class Deduplicator:
    """Keeps the first of several prompts that say the same."""

    def __init__(self) -> None:
        self._near = NearDuplicates()
        self._kept: list[tuple[str, tuple[str, ...], str]] = []  # name, numbers and signs, answer

    def duplicate_of(self, text: str, answer: str, name: str) -> str:
        """What the text repeats, in words, "" if nothing; it is then kept under `name`."""
        tokens, same_answer = tokens_of(text), " ".join(answer.split())
        signature = _signature(tokens)
        for key, similarity in self._near.find(tokens):
            first, its_signature, its_answer = self._kept[key]
            if similarity == 1.0:
                differs = "" if its_answer == same_answer else f", whose answer is {its_answer!r:.40} instead of {same_answer!r:.40}"
                return f"the same text as {first}{differs}"
            if its_signature == signature and its_answer == same_answer:
                return f"{similarity:.0%} similar to {first}, with the same numbers and answer"
        self._near.add(tokens)
        self._kept.append((name, signature, same_answer))
        return ""


class Benchmarks:
    """Questions that no prompt may contain."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises: ValueError for a file that is missing, or has a line without question, problem or prompt."""
        self._near = NearDuplicates()
        self._names: list[str] = []
        self._num_runs: list[int] = []
        self._by_run: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._run_lengths = set[int]()
        for file in files:
            for line, record in read_jsonl(file):
                name = f"{file.name}:{line}"
                self._add(name, tokens_of(text_field(record, ("question", "problem", "prompt"), f"{file}:{line}")))

    def __len__(self) -> int:
        return len(self._names)

    def contains(self, text: str) -> str:
        """Which benchmark question the text repeats, in words; "" if none."""
        tokens = tokens_of(text)
        for key, similarity in self._near.find(tokens)[:1]:
            return f"{similarity:.0%} similar to {self._names[key]}"
        hits = dict[int, set[tuple[str, ...]]]()
        for length in self._run_lengths:
            for run in _runs(tokens, length):
                for key in self._by_run.get(run, ()):
                    hits.setdefault(key, set()).add(run)
        for key, runs in hits.items():
            if len(runs) >= COVERED_SHARE * self._num_runs[key]:
                return f"{len(runs)} of {self._num_runs[key]} runs of {len(next(iter(runs)))} tokens of {self._names[key]}"
        return ""

    def _add(self, name: str, tokens: list[str]) -> None:
        key = len(self._names)
        self._names.append(name)
        self._near.add(tokens)
        runs = set(_runs(tokens, min(RUN_TOKENS, len(tokens)))) if len(tokens) >= MIN_RUN_TOKENS else set[tuple[str, ...]]()
        self._num_runs.append(len(runs))
        self._run_lengths.update(map(len, runs))
        for run in runs:
            self._by_run[run].append(key)


def _runs(tokens: list[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))


def _signature(tokens: list[str]) -> tuple[str, ...]:
    """Numbers, signs and single letters: what makes one problem of a kind another."""
    return tuple(token for token in tokens if not token[0].isalpha() or (len(token) == 1 and token.isascii() and token not in "ai"))


def _shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE_CHARS] for i in range(max(1, len(text) - SHINGLE_CHARS + 1))}


def _minhash(shingles: set[str]) -> MinHash:
    hashed = MinHash(num_perm=_NUM_HASHES, hashfunc=xxhash.xxh32_intdigest)
    hashed.update_batch(shingle.encode("utf-8", "surrogatepass") for shingle in shingles)
    return hashed


def _jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)
