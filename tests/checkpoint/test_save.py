"""Checkpoints that are written in the background: what is whole, what is not, and what the ranks hear of it."""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tandem.engine.trainer  # before megatron  # noqa: F401  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from tandem.engine.checkpoint import save as save_module
from tandem.engine.checkpoint.disk import load_latest
from tandem.engine.checkpoint.durable import fingerprint
from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.types import CheckpointError
from tests.ranks import run_ranks

NUM_ELEMENTS = 1 << 20  # of each rank


def state_of(values: torch.Tensor) -> dict[str, Any]:
    """Each rank has its own part of one tensor; a second one is the same on all."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    same = torch.full((3,), float(values[0]), dtype=torch.bfloat16)
    return {
        "own": ShardedTensor.from_rank_offsets("own", values, (0, rank, num_ranks)),
        "same": ShardedTensor.from_rank_offsets("same", same, replica_id=rank),
        "step": int(values[0]),
    }


def loaded_step(folder: Path) -> int:
    """The step whose values every element of the newest checkpoint has; -1 if there is none."""
    found = load_latest(folder, lambda: state_of(torch.zeros(NUM_ELEMENTS)))
    if found is None:
        return -1
    assert (found.state["own"] == found.step).all()
    assert (found.state["same"] == found.step).all()
    assert found.state["step"] == found.step
    assert found.extra == {"rank": dist.get_rank(), "step": found.step}
    return found.step


def begin(saver: CheckpointSaver, step: int) -> None:
    saver.save(step, state_of(torch.full((NUM_ELEMENTS,), float(step))), {"rank": dist.get_rank(), "step": step})


def overwrite_at_once(folder: Path) -> list[int | None]:
    """Save two steps from the same tensor, which is changed as soon as `save` returns."""
    oldest = []
    with CheckpointSaver(folder, keep=1) as saver:
        values = torch.empty(NUM_ELEMENTS)
        for step in (1, 2):
            values.fill_(step)
            saver.save(step, state_of(values), {"rank": dist.get_rank(), "step": step})
            values.fill_(-1)
            oldest.append(saver.wait())
            assert saver.poll() is None
    assert saver.last is not None
    assert saver.last.total_s > saver.last.blocked_s > 0
    assert saver.last.num_bytes == 4 * NUM_ELEMENTS + (6 if dist.get_rank() == 0 else 0)
    return oldest


@pytest.mark.distributed
def test_a_checkpoint_holds_what_was_there_when_it_was_saved(tmp_path: Path) -> None:
    assert run_ranks(overwrite_at_once, 2, tmp_path) == [[1, 2]] * 2
    assert run_ranks(loaded_step, 2, tmp_path) == [2, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]


def hold_the_last_rank(folder: Path) -> list[Any]:
    """Step 2 is begun, but the last rank gets on with its part only after a while."""
    with CheckpointSaver(folder, keep=1) as saver:
        begin(saver, 1)
        seen: list[Any] = [saver.wait()]
        go_on = threading.Event()
        if dist.get_rank() == 1:
            save_module.fingerprint = lambda file: fingerprint(file) if go_on.wait(240) else {}
        begin(saver, 2)
        for _ in range(3):
            time.sleep(0.05)
            seen.append(saver.poll())
        dist.barrier()
        seen.append(sorted(entry.name for entry in folder.iterdir()))
        dist.barrier()
        go_on.set()
        seen.append(saver.wait())
    return seen


@pytest.mark.distributed
def test_the_older_checkpoint_stays_until_every_rank_has_written_its_part_of_the_newer(tmp_path: Path) -> None:
    names = ["partial_00000002", "step_00000001"]
    assert run_ranks(hold_the_last_rank, 2, tmp_path) == [[1, None, None, None, names, 2]] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]


# What is there when the rank is killed, in the order in which it appears.
STAGES: dict[str, str] = {
    "folder": "partial_00000002/state",
    "tensors": "partial_00000002/state/__{rank}_0.distcp",
    "note": "partial_00000002/written_{rank}",
    "metadata": "partial_00000002/state/.metadata",
    "marker": "partial_00000002/complete.json",
    "name": "step_00000002",
}


def kill_once_there(path: Path) -> None:
    """This process, as soon as the call that makes the file or folder returns, on whichever thread."""

    def look(frame: Any, event: str, argument: Any) -> None:
        if event in ("return", "c_return") and path.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(look)
    sys.setprofile(look)


def killed_in(folder: Path, victim: int, stage: str) -> None:
    with CheckpointSaver(folder, keep=2) as saver:
        begin(saver, 1)
        saver.wait()
        if dist.get_rank() == victim:
            kill_once_there(folder / STAGES[stage].format(rank=victim))
        begin(saver, 2)
        saver.wait()
        time.sleep(240)


def load_and_go_on(folder: Path) -> tuple[int, int]:
    step = loaded_step(folder)
    with CheckpointSaver(folder, keep=2) as saver:
        begin(saver, 3)
    return step, loaded_step(folder)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("victim", "stage"), [(0, "folder"), (0, "tensors"), (0, "metadata"), (0, "marker"), (0, "name"), (1, "tensors"), (1, "note")]
)
def test_a_rank_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path, victim: int, stage: str) -> None:
    with pytest.raises(RuntimeError, match="failed"):
        run_ranks(killed_in, 2, tmp_path, victim, stage)
    found = run_ranks(load_and_go_on, 2, tmp_path)
    assert found in ([(1, 3)] * 2, [(2, 3)] * 2)
    if stage == "name":
        assert found == [(2, 3)] * 2
    if stage == "folder" or victim == 1:
        assert not list(tmp_path.glob("damaged_*"))
    assert not list(tmp_path.glob("partial_*"))


def run_into(folder: Path, limit: Callable[[], Any], options: dict[str, Any]) -> str:
    with CheckpointSaver(folder, keep=2) as saver:
        begin(saver, 1)
    saver = CheckpointSaver(folder, keep=2, **options)
    if dist.get_rank() == 1:
        limit()
    begin(saver, 2)
    with pytest.raises(CheckpointError) as error:
        saver.wait()
    saver.wait()  # forgotten: training may save again, or end
    return str(error.value)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def hang() -> None:
    save_module.fingerprint = lambda file: time.sleep(240)  # pyright: ignore[reportAttributeAccessIssue]


def fail_oddly() -> None:
    save_module.fingerprint = lambda file: {}["missing"]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("limit", "options", "message"),
    [
        (
            limit_file_size,
            {},
            "rank 1 could not write {folder}/partial_00000002/state/__1_0.distcp: File too large (its part has 4,194,304 bytes, and ",
        ),
        (hang, {"timeout_s": 4.0}, "rank 1 has not written its part within 4 s (checkpoint.timeout_s)"),
        (fail_oddly, {}, "rank 1: KeyError: 'missing'"),
    ],
    ids=["disk", "hang", "mistake"],
)
def test_what_fails_in_the_background_is_an_error_of_all_ranks(
    tmp_path: Path, limit: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    first, second = run_ranks(run_into, 2, tmp_path, limit, options)
    assert first == second
    assert first.startswith("the checkpoint of step 2 was not saved: ")
    assert message.format(folder=tmp_path) in first
    assert first.endswith("; the newest whole checkpoint is that of step 1")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
    assert run_ranks(loaded_step, 2, tmp_path) == [1, 1]


def save_too_much(folder: Path) -> str:
    saver = CheckpointSaver(folder, keep=2)
    (folder / "damaged_step_00000007").mkdir(exist_ok=True)
    (folder / "damaged_step_00000007" / "state").write_bytes(b"x" * 1234)
    dist.barrier()
    with pytest.raises(CheckpointError) as error:
        saver.save(1, state_of(torch.zeros(1).expand(1 << 45)))
    return str(error.value)


@pytest.mark.distributed
def test_a_checkpoint_that_would_not_fit_is_not_begun(tmp_path: Path) -> None:
    first, second = run_ranks(save_too_much, 2, tmp_path)
    assert first == second
    assert f"the checkpoint of step 1 was not saved: {tmp_path} needs {2 * 4 * 2**45 + 6:,} bytes, and " in first
    assert "(the damaged_step_* folders in it take 1,234)" in first
    assert "make room there, or move the run folder to a larger disk (run_dir)" in first
    assert not list(tmp_path.glob("partial_*"))


def save_nowhere(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        begin(CheckpointSaver(folder / "file" / "checkpoints", keep=2), 1)
    return str(error.value)


@pytest.mark.distributed
def test_a_folder_that_cannot_be_made_is_named_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run_ranks(save_nowhere, 2, tmp_path)
    assert first == second
    assert f"rank 0 cannot make {tmp_path}/file/checkpoints/partial_00000001: Not a directory" in first
