"""The segment journal gives back what it was given, under the digest it was given with, and never anything else."""

import dataclasses
import os
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from tandem.engine.data.journal import SegmentJournal, SegmentKey, segment_digest, settings_digest
from tandem.engine.types import Completion, Group, Prompt, Response, Segment, StopState

DIGEST = b"0123456789abcdef"


def completion_of(number: int, *, experts: bool = False) -> Completion:
    """Ragged, with none at 0, and float32 log-probs."""
    generator = np.random.default_rng(number)
    logprobs = (-generator.random(number)).astype(np.float32)
    return Completion(
        request_id="",
        token_ids=tuple(generator.integers(0, 2**31, number).tolist()),
        logprobs=tuple(logprobs.tolist()),
        stop=StopState.FINISHED if number % 2 else StopState.BUDGET,
        policy_version=number,
        routed_experts=generator.integers(0, 300, (number, 3, 2)).astype(np.int16) if experts else None,
    )


def group_of(prompt: tuple[int, ...], generated: tuple[int, ...] = ()) -> Group:
    segment = Segment(token_ids=generated, logprobs=(0.0,) * len(generated), policy_version=0)
    responses = (Response(sample=0), Response(sample=1, segments=(segment,) if generated else ()))
    return Group(prompt=Prompt(id="p", text="", token_ids=prompt, answer=""), responses=responses)


@pytest.fixture
def journal(tmp_path: Path) -> SegmentJournal:
    return SegmentJournal(tmp_path / "journal.sqlite")


def test_segments_come_back_equal_after_reopening(journal: SegmentJournal) -> None:
    for number in range(6):
        journal.record(SegmentKey(3, number, 1, 2), DIGEST, completion_of(number, experts=number > 3))
    journal.close()
    journal = SegmentJournal(journal.path)
    for number in range(6):
        found, wanted = journal.find(SegmentKey(3, number, 1, 2), DIGEST), completion_of(number, experts=number > 3)
        assert found == wanted
        assert found is not None
        if wanted.routed_experts is None:
            assert found.routed_experts is None
        else:
            assert found.routed_experts is not None
            assert np.array_equal(found.routed_experts, wanted.routed_experts)
            assert found.routed_experts.dtype == np.int16
    assert journal.num_tokens(3) == sum(range(6))


def test_another_iteration_group_sample_segment_or_digest_is_a_miss(journal: SegmentJournal) -> None:
    key = SegmentKey(3, 4, 5, 6)
    journal.record(key, DIGEST, completion_of(2))
    assert journal.find(key, DIGEST) is not None
    for place in range(4):
        other = list(key)
        other[place] += 1
        assert journal.find(SegmentKey(*other), DIGEST) is None
    assert journal.find(key, DIGEST[::-1]) is None


def test_the_newest_of_a_key_counts(journal: SegmentJournal) -> None:
    key = SegmentKey(0, 0, 0, 0)
    journal.record(key, DIGEST, completion_of(2))
    journal.record(key, DIGEST[::-1], completion_of(3))
    assert journal.find(key, DIGEST) is None
    assert journal.find(key, DIGEST[::-1]) == completion_of(3)


def test_prune_keeps_what_a_checkpoint_leads_back_to(journal: SegmentJournal) -> None:
    for iteration in range(4):
        journal.record(SegmentKey(iteration, 0, 0, 0), DIGEST, completion_of(1))
    assert journal.prune(before_iteration=2) == 2
    assert [journal.num_tokens(iteration) for iteration in range(4)] == [0, 0, 1, 1]


def test_the_digest_covers_settings_weights_prompt_and_prefix() -> None:
    settings = settings_digest({"temperature": 1.0})
    digests = {
        segment_digest(settings, "w", group_of((1, 2)), 0),
        segment_digest(settings_digest({"temperature": 0.9}), "w", group_of((1, 2)), 0),
        segment_digest(settings, "v", group_of((1, 2)), 0),
        segment_digest(settings, "w", group_of((1, 3)), 0),
        segment_digest(settings, "w", group_of((1, 2), (7,)), 1),
        segment_digest(settings, "w", group_of((1,), (2, 7)), 1),  # the border between prompt and response counts
    }
    assert len(digests) == 6
    # What another sample of the group has does not matter.
    assert segment_digest(settings, "w", group_of((1, 2), (7,)), 0) in digests


@pytest.mark.parametrize("column", ["token_ids", "logprobs", "header", "digest", "checksum"])
def test_a_damaged_row_is_a_miss_and_the_others_stay(journal: SegmentJournal, column: str) -> None:
    for sample in range(2):
        journal.record(SegmentKey(0, 0, sample, 0), DIGEST, completion_of(5))
    database = sqlite3.connect(journal.path)
    (value,) = database.execute(f"SELECT {column} FROM segments WHERE sample = 0").fetchone()
    flipped = value[:3] + bytes([value[3] ^ 16]) + value[4:]
    database.execute(f"UPDATE segments SET {column} = ? WHERE sample = 0", (flipped,))
    database.commit()
    database.close()
    digest = flipped if column == "digest" else DIGEST
    assert journal.find(SegmentKey(0, 0, 0, 0), digest) is None
    assert journal.find(SegmentKey(0, 0, 1, 0), DIGEST) == completion_of(5)


def test_a_damaged_file_is_set_aside_and_begun_anew(journal: SegmentJournal) -> None:
    journal.close()
    journal.path.write_bytes(b"this is no database" * 300)
    journal = SegmentJournal(journal.path)
    assert journal.find(SegmentKey(0, 0, 0, 0), DIGEST) is None
    journal.record(SegmentKey(0, 0, 0, 0), DIGEST, completion_of(4))
    assert journal.find(SegmentKey(0, 0, 0, 0), DIGEST) == completion_of(4)
    assert journal.path.with_name("damaged_journal.sqlite").exists()


def test_a_file_whose_pages_are_damaged_is_begun_anew_when_it_is_noticed(journal: SegmentJournal) -> None:
    for serial in range(300):
        journal.record(SegmentKey(0, serial, 0, 0), DIGEST, completion_of(50))
    journal.close()
    content = bytearray(journal.path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    journal.path.write_bytes(content)
    journal = SegmentJournal(journal.path)
    found = [journal.find(SegmentKey(0, serial, 0, 0), DIGEST) for serial in range(300)]
    assert found == [None] * 300
    journal.record(SegmentKey(0, 7, 0, 0), DIGEST, completion_of(4))
    assert journal.find(SegmentKey(0, 7, 0, 0), DIGEST) == completion_of(4)


def test_every_segment_recorded_before_kill_9_is_there(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            journal = SegmentJournal(tmp_path / "journal")
            for serial in range(100_000):
                journal.record(SegmentKey(0, serial, 0, 0), DIGEST, dataclasses.replace(completion_of(serial % 9), policy_version=serial))
                os.write(writer, serial.to_bytes(4, "little"))
        finally:
            os._exit(1)
    os.close(writer)
    reported = b""
    while len(reported) < 4 * 200:
        reported += os.read(reader, 4)
    os.kill(pid, signal.SIGKILL)
    while chunk := os.read(reader, 65536):
        reported += chunk
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    last = int.from_bytes(reported[-4:], "little")
    journal = SegmentJournal(tmp_path / "journal")
    for serial in range(last + 1):
        wanted = dataclasses.replace(completion_of(serial % 9), policy_version=serial)
        assert journal.find(SegmentKey(0, serial, 0, 0), DIGEST) == wanted
