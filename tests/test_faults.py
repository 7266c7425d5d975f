"""A run that is killed anywhere, starved of disk, damaged or stopped goes on, and ends as if nothing had been."""

import dataclasses
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.engine.config import SwapConfig
from tandem.engine.data.journal import SegmentJournal
from tandem.engine.log import read_metrics
from tandem.engine.trace import read_part
from tests import moments
from tests.faults import STEPS, faulty_run, outcome
from tests.launched import Launched

# Generous where a quiet machine needs seconds: a launch with its run, and the end of ranks whose peer died.
LAUNCH_S, END_S = 240, 120
# Within how many function calls after a moment began a kill comes: about as many as a rank makes in it.
NUM_CALLS = {"rollout": 12_000, "train": 15_000, "swap": 1_500, "checkpoint": 9_000, "save": 6_000}
MOMENTS = tuple(NUM_CALLS)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # seconds each where nothing else runs


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after the warm start."""
    folder = tmp_path_factory.mktemp("faults")
    launched = Launched(faulty_run(folder / "warm", steps=0), folder / "out")
    assert launched.wait(LAUNCH_S) == [0, 0], launched.output()
    return folder / "warm"


@pytest.fixture(scope="module")
def undisturbed(warm: Path) -> dict[str, Any]:
    """What a run that nothing happens to ends with."""
    run = warm.with_name("undisturbed")
    shutil.copytree(warm, run)
    launched = Launched(faulty_run(run), warm.with_name("undisturbed_out"))
    assert launched.wait(LAUNCH_S) == [0, 0], launched.output()
    return outcome(run)


@pytest.fixture
def run_dir(warm: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the warm start. Whatever happens to the run, it leaves nothing in shared memory."""
    before = set(os.listdir("/dev/shm"))
    shutil.copytree(warm, tmp_path / "run")
    yield tmp_path / "run"
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "tandem" in name}


def finish(run_dir: Path, folder: Path, **changes: Any) -> Launched:
    """Launch the run and let it come to its end."""
    launched = Launched(faulty_run(run_dir, **changes), folder)
    assert launched.wait(LAUNCH_S) == [0, 0], launched.output()
    assert not launched.left_behind(END_S)
    return launched


def one_rank(rank: int, moment: Callable[..., None], *arguments: Any, **counts: int) -> Callable[[int], None]:
    """For `Launched`: this moment comes on one rank."""
    return lambda of_rank: moment(*arguments, **counts) if of_rank == rank else None


def at(moment: str, act: Callable[[], None], rank: int, **counts: int) -> Callable[[int], None]:
    """For `Launched`: `rank` does something to itself in a phase, or (`save`) in the thread that writes a checkpoint beside it."""
    return one_rank(rank, moments.in_save, act, **counts) if moment == "save" else one_rank(rank, moments.in_phase, moment, act, **counts)


def killed(run_dir: Path, folder: Path, prepare: Callable[[int], None], **changes: Any) -> Launched:
    """A run that one of its ranks does not survive."""
    launched = Launched(faulty_run(run_dir, **changes), folder, prepare=prepare)
    assert -signal.SIGKILL in launched.wait(LAUNCH_S), launched.output()
    return launched


def kill_and_resume(run_dir: Path, folder: Path, *, seed: int, kills: dict[str, int]) -> dict[str, int]:
    """Kill a rank so many times in each phase, launching the run again after each, then let it end. Returns the kills of each phase."""
    generator = random.Random(seed)
    left = [phase for phase, count in kills.items() for _ in range(count)]
    generator.shuffle(left)
    done = dict.fromkeys(kills, 0)
    for attempt in range(4 * len(left)):
        if not left:
            break
        moment, rank = left[0], generator.randrange(2)
        counts = {"num_passed": generator.randrange(2), "num_calls": generator.randrange(NUM_CALLS[moment])}
        launched = Launched(faulty_run(run_dir), folder / f"out{attempt}", prepare=at(moment, moments.kill, rank, **counts))
        statuses = launched.wait(LAUNCH_S)
        assert not launched.left_behind(END_S), "what a dead rank started must end by itself"
        if statuses == [0, 0]:
            # The run had no such moment left: it begins once more, from a checkpoint of its own.
            for checkpoint in sorted((run_dir / "checkpoints").glob("step_*"))[1:]:
                shutil.rmtree(checkpoint)
            continue
        done[moment] += 1
        left.pop(0)
        assert statuses[rank] == -signal.SIGKILL, launched.output()
        assert statuses[1 - rank] == 1, launched.output()
        survivor = (launched.folder / f"rank_{1 - rank}.out").read_text()
        assert f"rank {rank} is gone" in survivor or f"the process of rank {rank} ended" in survivor
    finish(run_dir, folder / "last")
    return done


def test_kill_9_in_every_phase_changes_nothing(run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    kills = dict.fromkeys(MOMENTS, 1)
    assert kill_and_resume(run_dir, tmp_path / "out", seed=1, kills=kills) == kills
    assert outcome(run_dir) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_kill_9_at_ten_more_moments_changes_nothing(seed: int, run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    kills = {"rollout": 3, "train": 2, "swap": 2, "checkpoint": 1, "save": 2}
    assert kill_and_resume(run_dir, tmp_path / "out", seed=seed, kills=kills) == kills
    assert outcome(run_dir) == undisturbed


def rollouts_of(run_dir: Path, rank: int, iteration: int) -> list[dict[str, int]]:
    """What the trace says of a leader's generation in an iteration, oldest first."""
    events = read_part(run_dir / "trace" / f"rank_{rank}.json")
    return [event["args"] for event in events if event["name"] == "rollout" and event["ph"] == "i" and event["args"]["step"] == iteration]


@pytest.mark.slow
def test_what_had_been_generated_is_not_generated_again(run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    journals = [run_dir / "replay" / f"journal_{rank}.sqlite" for rank in (0, 1)]

    def recorded(iteration: int) -> list[int]:
        return [SegmentJournal(file).num_tokens(iteration) if file.exists() else 0 for file in journals]

    # Iteration 1 is done, but not in a checkpoint: its segments are all there; those of iteration 2 in part.
    killed(run_dir, tmp_path / "killed", at("train", moments.kill, 0, num_passed=1))
    before = [recorded(0), recorded(1)]
    assert min(before[0] + before[1]) > 0

    resumed = Launched(faulty_run(run_dir), tmp_path / "resumed")
    assert resumed.wait(LAUNCH_S) == [0, 0], resumed.output()
    assert outcome(run_dir) == undisturbed
    for iteration in (0, 1):
        for rank in (0, 1):
            (newest,) = rollouts_of(run_dir, rank, iteration)[-1:]
            assert newest["reused_tokens"] == before[iteration][rank]
            assert newest["tokens"] == newest["reused_tokens"]


def test_of_an_interrupted_phase_only_what_was_in_flight_is_generated(run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    journal = run_dir / "replay" / "journal_1.sqlite"
    killed(run_dir, tmp_path / "killed", one_rank(1, moments.after_segment, moments.kill, num_segments=8))
    before = SegmentJournal(journal).num_tokens(0)
    finish(run_dir, tmp_path / "resumed")
    assert outcome(run_dir) == undisturbed
    newest = rollouts_of(run_dir, 1, 0)[-1]
    assert newest["reused_tokens"] == before > 0
    assert newest["tokens"] > newest["reused_tokens"]


@pytest.mark.slow
def test_other_sampling_settings_find_nothing_in_the_journal(run_dir: Path, tmp_path: Path) -> None:
    killed(run_dir, tmp_path / "killed", at("train", moments.kill, 0))
    assert SegmentJournal(run_dir / "replay" / "journal_0.sqlite").num_tokens(0) > 0
    config = faulty_run(run_dir)
    rollout = dataclasses.replace(config.rollout, top_p=0.9)
    finish(run_dir, tmp_path / "resumed", rollout=rollout, steps=1)
    assert rollouts_of(run_dir, 0, 0)[-1]["reused_tokens"] == 0


def test_a_killed_engine_changes_nothing(run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Killed while it generates, once on each rank, and while it takes over weights: it is replaced within the run."""

    def kill_engine() -> None:
        (engine,) = [child for child in psutil.Process().children() if "tandem.engine.rollout.embedded_worker" in child.cmdline()]
        engine.kill()

    def prepare(rank: int) -> None:
        moments.after_segment(kill_engine, num_segments=3, iteration=rank)
        if rank == 1:
            moments.in_phase("swap", kill_engine, num_passed=2, num_calls=300)

    launched = Launched(faulty_run(run_dir), tmp_path / "out", prepare=prepare)
    assert launched.wait(LAUNCH_S) == [0, 0], launched.output()
    assert launched.output().count("It is replaced, and what it was generating is generated again.") == 3
    assert outcome(run_dir) == undisturbed


def test_a_full_disk_ends_the_run_clearly_and_it_goes_on_once_there_is_room(
    run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """A disk of a few MB, filled so that the first checkpoint does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        shutil.copytree(run_dir, disk / "run")
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"x" * (free - (1800 << 10)))
        launched = Launched(faulty_run(disk / "run"), tmp_path / "full")
        statuses = launched.wait(LAUNCH_S)
        assert 0 not in statuses, launched.output()
        assert "no room to write" in launched.output() or "are free there" in launched.output()
        (disk / "filler").unlink()
        finish(disk / "run", tmp_path / "resumed")
        assert outcome(disk / "run") == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_journal_that_may_grow_no_more_ends_the_run_and_loses_nothing(run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """As with a quota: no file may be larger than 200 kB, which the journal is soon."""
    small = SwapConfig(bucket_bytes=65536)  # which are files in memory

    def limit(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    launched = Launched(faulty_run(run_dir, swap=small), tmp_path / "limited", prepare=limit)
    statuses = launched.wait(LAUNCH_S)
    assert 0 not in statuses, launched.output()
    assert "no room to write in the phase 'rollout' of iteration 0" in launched.output()
    before = SegmentJournal(run_dir / "replay" / "journal_0.sqlite").num_tokens(0)
    assert before > 0
    finish(run_dir, tmp_path / "resumed", swap=small)
    assert rollouts_of(run_dir, 0, 0)[-1]["reused_tokens"] == before
    assert outcome(run_dir) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a bit is flipped", "cut off"])
def test_a_damaged_newest_checkpoint_goes_back_to_the_one_before(
    damage: str, run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    newest = run_dir / "checkpoints" / "step_00000002"
    killed(run_dir, tmp_path / "killed", at("save", moments.kill, 0, num_calls=moments.AT_ITS_END))
    file = max((newest / "state").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "cut off":
        del content[-100:]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
    finish(run_dir, tmp_path / "resumed")
    shutil.rmtree(newest.with_name("damaged_step_00000002"))
    assert outcome(run_dir) == undisturbed


def test_sigterm_saves_and_leaves_and_the_run_goes_on_as_if_nothing_had_been(
    run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    for attempt, (phase, num_passed) in enumerate((("rollout", 0), ("train", 1))):
        moment = at(phase, moments.stop, 0, num_passed=num_passed, num_calls=2000)
        launched = Launched(faulty_run(run_dir), tmp_path / f"stopped{attempt}", prepare=moment)
        assert launched.wait_until_stopped(0, LAUNCH_S), launched.output()
        for rank in (0, 1):
            launched.signal(rank, signal.SIGTERM)
        launched.signal(0, signal.SIGCONT)
        assert launched.wait(END_S) == [143, 143], launched.output()
        assert "Stopped by SIGTERM; started again" in launched.output()
        assert not launched.left_behind(END_S)
    last = finish(run_dir, tmp_path / "resumed")
    assert last.poll() == {0: 0, 1: 0}
    ended, wanted = outcome(run_dir), dict(undisturbed)
    # More checkpoints were made, so more of what was consumed is pruned.
    for result in (ended, wanted):
        del result["checkpoints"]
        result["buffers"] = [[row for row in rows if row[2] is None or row[2] == STEPS - 1] for rows in result["buffers"]]
    assert ended == wanted


def test_a_trainer_that_sleeps_while_engines_serve_changes_nothing_and_sigterm_finds_it_whole(
    run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Optimizer state, gradients and parameters leave in every iteration, and the checkpoint is written while they are away."""
    sleeps = dataclasses.replace(faulty_run(run_dir).trainer, sleep="on")
    changes: dict[str, Any] = {"trainer": sleeps, "swap": SwapConfig(sleep_budget_bytes=0)}
    moment = at("rollout", moments.stop, 0, num_passed=2, num_calls=2000)
    launched = Launched(faulty_run(run_dir, **changes), tmp_path / "stopped", prepare=moment)
    assert launched.wait_until_stopped(0, LAUNCH_S), launched.output()
    for rank in (0, 1):
        launched.signal(rank, signal.SIGTERM)
    launched.signal(0, signal.SIGCONT)
    assert launched.wait(END_S) == [143, 143], launched.output()
    finish(run_dir, tmp_path / "resumed", **changes)
    for line in (line for line in read_metrics(run_dir) if "train/loss" in line):
        assert line["memory/train/trainer_bytes"] > 0
        assert line["memory/serve/trainer_bytes"] == 0
        assert line["memory/serve/arena_bytes"] > 0
    ended, wanted = outcome(run_dir), dict(undisturbed)
    for result in (ended, wanted):  # a checkpoint more was made, so more of what was consumed is pruned
        del result["checkpoints"]
        result["buffers"] = [[row for row in rows if row[2] is None or row[2] == STEPS - 1] for rows in result["buffers"]]
    assert ended == wanted


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_with_its_name_and_the_run_goes_on(
    run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    stopped = at("rollout", moments.stop, 1, num_calls=2000)
    launched = Launched(faulty_run(run_dir, watchdog_s=30.0), tmp_path / "hanging", prepare=stopped)
    statuses = launched.wait(LAUNCH_S)
    assert statuses == [1, -signal.SIGKILL], launched.output()
    assert not launched.left_behind(END_S)
    assert "rank 1 hangs: its process is stopped or holds the interpreter" in launched.output()
    assert "in the phase 'rollout' of iteration 0" in launched.output()
    for rank in (0, 1):
        assert "engine/train.py" in (launched.logs / f"rank_{rank}.stack").read_text()
    finish(run_dir, tmp_path / "resumed")
    assert outcome(run_dir) == undisturbed


@pytest.mark.slow
def test_a_corrupt_buffer_row_names_the_iteration_to_go_back_to(run_dir: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """A group that waits across a checkpoint is damaged: the run says so, and from an earlier checkpoint it makes the group again."""
    killed(run_dir, tmp_path / "killed", at("save", moments.kill, 0, num_calls=moments.AT_ITS_END))
    database = sqlite3.connect(run_dir / "replay" / "rank_0.sqlite")
    query = "SELECT row_id, payload FROM groups WHERE created = 1 AND ifnull(consumed, 2) >= 2"
    row_id, payload = database.execute(query).fetchone()
    database.execute("UPDATE groups SET payload = ? WHERE row_id = ?", (payload[:-1] + bytes([payload[-1] ^ 1]), row_id))
    database.commit()
    database.close()
    launched = Launched(faulty_run(run_dir), tmp_path / "damaged")
    assert 0 not in launched.wait(LAUNCH_S)
    assert f"row {row_id}, made in iteration 1, is damaged" in launched.output()
    assert "remove the checkpoints of iterations after 1 first" in launched.output()
    shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
    finish(run_dir, tmp_path / "resumed")
    assert outcome(run_dir) == undisturbed
