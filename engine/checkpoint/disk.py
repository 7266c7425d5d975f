"""The checkpoints of a run, found, checked and loaded; `checkpoint/save.py` writes them.

A checkpoint is complete or not there. It has Megatron's distributed format, so any number of ranks can load it:

    step_00000012/
        state/          dist_checkpointing (torch_dist): model and optimizer
        extra_0.pt      what a rank adds, such as the sampler's state and its generators of random numbers
        complete.json   size and checksum of every file; written last

A folder gets its name only when it is complete; a half-written one has another name, and a damaged one is passed over and renamed
damaged_step_…, so that it does not take the place of a whole one among those that are kept.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tandem.engine.checkpoint.durable import fingerprint, num_bytes_in, sync_folder

_LOG = logging.getLogger("tandem.checkpoint")
MARKER = "complete.json"
STATE = "state"


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """What `load_latest` found. `state` has the structure of the sharded state that was given; `extra` is this rank's."""

    step: int
    folder: Path
    state: dict[str, Any]
    extra: Any  # None if this rank saved nothing


def load_latest(
    folder: Path, sharded_state: Callable[[], dict[str, Any]], *, group: dist.ProcessGroup | None = None
) -> LoadedCheckpoint | None:
    """Load what `find_latest` finds. A collective.

    Args:
        sharded_state: makes the trainer's sharded_state_dict(), whose layout may differ from the saved one's; its tensors are overwritten.
    """
    from megatron.core import dist_checkpointing

    found = find_latest(folder, group=group)
    if found is None:
        return None
    step, checkpoint = found
    wanted = sharded_state()
    names = set(wanted)
    loaded = dist_checkpointing.load(wanted, str(checkpoint / STATE))
    assert isinstance(loaded, dict)
    # Megatron adds all that is not a tensor, also of parts that were not asked for.
    state = {name: value for name, value in loaded.items() if name in names}
    file = checkpoint / f"extra_{dist.get_rank(group)}.pt"
    return LoadedCheckpoint(step, checkpoint, state, torch.load(file, weights_only=True) if file.exists() else None)


def find_latest(folder: Path, *, rename_damaged: bool = True, group: dist.ProcessGroup | None = None) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint whose files are all there and unchanged; None if none was ever saved. A collective.

    Args:
        rename_damaged: rename newer, damaged ones to damaged_step_…, so that they are not counted among those that are kept. False for a
            reader beside the run, to which one that the run is just removing looks damaged.
    Raises: ValueError on every rank if there are checkpoints and none is whole; then nothing is renamed.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    listed = [(sorted(saved_steps(folder), reverse=True), sorted(entry.name for entry in folder.glob("damaged_step_*")))]
    dist.broadcast_object_list(listed, group=group, group_src=0)
    steps, damaged_before = listed[0]
    damage: dict[int, str] = {}
    for step in steps:
        checkpoint = folder / checkpoint_name(step)
        faults = [""] * num_ranks
        dist.all_gather_object(faults, find_damage(checkpoint, part=rank, num_parts=num_ranks), group=group)
        if fault := next(filter(None, faults), ""):
            damage[step] = fault
            continue
        if rank == 0:
            _pass_over(folder, damage, rename_damaged)
        return step, checkpoint
    if damage or damaged_before:
        found = [f"{checkpoint_name(step)} ({fault})" for step, fault in damage.items()] + damaged_before
        raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(found)}; repair one, or delete the folder to start anew")
    return None


def _pass_over(folder: Path, damage: Mapping[int, str], rename_damaged: bool) -> None:
    """Say which checkpoints are damaged and what they take."""
    for step, fault in damage.items():
        _LOG.warning("checkpoint %s is damaged and passed over: %s", folder / checkpoint_name(step), fault)
        if rename_damaged:
            _set_aside(folder / checkpoint_name(step))
    if num_bytes := sum(map(num_bytes_in, folder.glob("damaged_step_*"))):
        _LOG.warning("the damaged_step_* folders in %s take %s bytes; delete them when nobody needs them", folder, f"{num_bytes:,}")


def _set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, in place of an earlier one of the same step."""
    target = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)
    sync_folder(checkpoint.parent)


def find_damage(checkpoint: Path, *, part: int = 0, num_parts: int = 1) -> str:
    """Check every `num_parts`-th file from `part` on; "" or what is wrong."""
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads((checkpoint / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MARKER}: {error}"
    for name in sorted(files)[part::num_parts]:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != files[name]["bytes"]:
            return f"{name} has {file.stat().st_size} bytes; {files[name]['bytes']} were written"
        if fingerprint(file) != files[name]:
            return f"{name} has another checksum than when it was written"
    return ""


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    return [int(match[1]) for entry in folder.iterdir() if (match := re.fullmatch(r"step_(\d{8,})", entry.name))] if folder.is_dir() else []
