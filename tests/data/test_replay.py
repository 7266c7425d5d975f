"""The replay buffer keeps what was committed, in order, and goes back to any iteration."""

import dataclasses
import os
import random
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from tandem.engine.data.replay import ReplayBuffer
from tandem.engine.types import Group, Prompt, Response, Segment, StopState, Verdict


def group_of(number: int, *, scored: bool = True) -> Group:
    """A group that differs from all others: ragged, with an empty response, an empty segment and float32 log-probs."""
    generator = random.Random(number)

    def segment(version: int) -> Segment:
        n = generator.randrange(6)
        logprobs = tuple(float(np.float32(-generator.random())) for _ in range(n))
        return Segment(token_ids=tuple(generator.randrange(2**31) for _ in range(n)), logprobs=logprobs, policy_version=version)

    stop = StopState.FINISHED if scored else StopState.BUDGET
    responses = tuple(Response(sample=i, segments=tuple(segment(v) for v in range(i)), stop=stop) for i in range(3))
    verdicts = (
        Verdict(correct=True, answer="é", reason=""),
        Verdict(correct=False),
        Verdict(correct=False, graded=False, reason="?", well_formed=False),
    )
    prompt = Prompt(
        id=f"p{number}", text='what "is" \n 1?', token_ids=(1, 2, number), answer="1", domain="arithmetic", level=number, grading='{"a": 1}'
    )
    return Group(prompt=prompt, responses=responses, verdicts=verdicts if scored else (), first_iteration=number)


def opened(path: Path, iteration: int = 0) -> ReplayBuffer:
    buffer = ReplayBuffer(path)
    buffer.begin_iteration(iteration)
    return buffer


def numbers(groups: list[Group]) -> list[int]:
    return [group.prompt.level for group in groups]


def test_groups_come_back_equal_and_in_order_after_reopening(tmp_path: Path) -> None:
    buffer = opened(tmp_path / "replay")
    scored, partial = [group_of(i) for i in range(5)], [group_of(i, scored=False) for i in range(5, 8)]
    buffer.push_scored(scored[:2])
    buffer.push_partial(partial)
    buffer.push_scored(scored[2:])
    buffer.close()
    buffer = opened(tmp_path / "replay")
    assert (buffer.num_scored, buffer.num_partial) == (5, 3)
    assert buffer.pop_partial() == partial
    assert buffer.pop_scored(limit=2) == scored[:2]
    assert buffer.pop_scored() == scored[2:]
    assert buffer.pop_scored() == buffer.pop_partial() == []
    assert (buffer.num_scored, buffer.num_partial) == (0, 0)


def test_a_group_without_responses_and_pushing_nothing_are_fine(tmp_path: Path) -> None:
    buffer = opened(tmp_path / "replay")
    buffer.push_partial([])
    empty = dataclasses.replace(group_of(1), responses=(), verdicts=())
    buffer.push_scored([empty])
    assert buffer.pop_scored() == [empty]


def test_rewind_restores_every_earlier_start_of_iteration(tmp_path: Path) -> None:
    """A random history; then, newest first, every iteration's start is restored exactly."""
    for seed in range(5):
        generator = random.Random(seed)
        buffer = ReplayBuffer(tmp_path / f"replay{seed}")
        starts: list[tuple[list[int], list[int]]] = []
        waiting: dict[bool, list[int]] = {True: [], False: []}
        number = 0
        for iteration in range(8):
            buffer.begin_iteration(iteration)
            starts.append((list(waiting[True]), list(waiting[False])))
            for _ in range(generator.randrange(6)):
                scored = generator.random() < 0.5
                if generator.random() < 0.6:
                    (buffer.push_scored if scored else buffer.push_partial)([group_of(number, scored=scored)])
                    waiting[scored].append(number)
                    number += 1
                elif scored:
                    limit = generator.randrange(4)
                    assert numbers(buffer.pop_scored(limit)) == waiting[True][:limit]
                    del waiting[True][:limit]
                else:
                    assert numbers(buffer.pop_partial()) == waiting[False]
                    waiting[False].clear()
        for iteration in reversed(range(8)):
            buffer.rewind(iteration)
            assert (numbers(buffer.pop_scored()), numbers(buffer.pop_partial())) == starts[iteration]
        buffer.close()


def test_prune_deletes_only_what_no_later_rewind_needs(tmp_path: Path) -> None:
    buffer = opened(tmp_path / "replay", 0)
    buffer.push_scored([group_of(0), group_of(1), group_of(2)])
    buffer.pop_scored(limit=1)
    buffer.begin_iteration(1)
    buffer.pop_scored(limit=1)
    buffer.begin_iteration(2)
    assert buffer.prune(before_iteration=1) == 1
    buffer.rewind(1)
    assert numbers(buffer.pop_scored()) == [1, 2]


def test_an_iteration_must_be_named_and_never_lie_before_what_is_there(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path / "replay")
    with pytest.raises(ValueError, match="begin_iteration or rewind first"):
        buffer.push_scored([group_of(0)])
    buffer.begin_iteration(3)
    buffer.push_scored([group_of(0)])
    with pytest.raises(ValueError, match=r"already holds iteration 3; rewind\(2\)"):
        buffer.begin_iteration(2)


def test_ungraded_groups_are_refused(tmp_path: Path) -> None:
    buffer = opened(tmp_path / "replay")
    with pytest.raises(ValueError, match="'p1' has 0 verdicts for 3 responses"):
        buffer.push_scored([group_of(0), group_of(1, scored=False)])
    assert buffer.num_scored == 0


def test_a_damaged_row_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    buffer = opened(tmp_path / "replay")
    buffer.push_scored([group_of(0), group_of(1)])
    database = sqlite3.connect(tmp_path / "replay")
    (payload,) = database.execute("SELECT payload FROM groups WHERE row_id = 2").fetchone()
    database.execute("UPDATE groups SET payload = ? WHERE row_id = 2", (payload[:-1] + bytes([payload[-1] ^ 1]),))
    database.commit()
    database.close()
    with pytest.raises(RuntimeError, match="row 2, made in iteration 0, is damaged"):
        buffer.pop_scored()
    assert buffer.num_scored == 2
    assert numbers(buffer.pop_scored(limit=1)) == [0]


def test_a_file_that_is_no_replay_buffer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "replay").write_text("this is not a database, and long enough to be taken for a page of one" * 20)
    with pytest.raises(ValueError, match="is no replay buffer"):
        ReplayBuffer(tmp_path / "replay")


def test_every_group_committed_before_kill_9_is_there(tmp_path: Path) -> None:
    """A forked writer reports each push after it returned, and is killed in the middle of its loop."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            buffer = opened(tmp_path / "replay", 4)
            for number in range(100_000):
                (buffer.push_scored if number % 2 else buffer.push_partial)([group_of(number, scored=bool(number % 2))])
                os.write(writer, number.to_bytes(4, "little"))
        finally:
            os._exit(1)
    os.close(writer)
    reported = b""
    while len(reported) < 4 * 60:
        chunk = os.read(reader, 4)
        assert chunk, "the writer ended by itself"
        reported += chunk
    os.kill(pid, signal.SIGKILL)
    while chunk := os.read(reader, 65536):
        reported += chunk
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    last = int.from_bytes(reported[-4:], "little")
    buffer = opened(tmp_path / "replay", 4)
    kept = sorted(buffer.pop_scored() + buffer.pop_partial(), key=lambda group: group.prompt.level)
    # The writer may have died between a commit and its report.
    assert numbers(kept) in (list(range(last + 1)), list(range(last + 2)))
    assert kept[last] == group_of(last, scored=bool(last % 2))
