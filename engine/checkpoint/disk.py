"""What is kept on disk: Hugging Face model folders, through the same name map as the swap, and the checkpoints of a run.

A checkpoint is complete or not there. It has Megatron's distributed format, so any number of ranks can load it:

    step_00000012/
        state/          dist_checkpointing (torch_dist): model and optimizer
        extra_0.pt      what a rank adds, such as the sampler's state
        complete.json   size and checksum of every file; written last

A folder gets its name only when it is complete; a half-written one has another name, and a damaged one is passed over and renamed
damaged_step_…, so that it does not take the place of a whole one among those that are kept.
"""

import json
import logging
import os
import queue
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from tandem.engine.checkpoint.names import HFView, NameMap
from tandem.engine.checkpoint.plan import Region, distinct_regions
from tandem.engine.checkpoint.safetensors_folder import SafetensorsWriter, open_safetensors
from tandem.engine.types import TensorMeta, WeightSource

_LOG = logging.getLogger("tandem.checkpoint")
_MARKER = "complete.json"
GENERATION_CONFIG = "generation_config.json"
_CHUNK_BYTES = 16 << 20
MAX_SHARD_BYTES = 5 << 30


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with a known model_type and all sizes.

    Raises: ValueError if the folder is not a model, or one of another family, or a field is missing: it says what was looked for.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; a model folder holds config.json, *.safetensors and a tokenizer")
    if not file.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    config = _read_object(file)
    if "model_type" not in config:
        raise ValueError(f"{file} has no model_type")
    try:
        NameMap(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    missing = [name for name in ("num_key_value_heads", "max_position_embeddings") if config.get(name) is None]
    if missing:
        raise ValueError(f"{file}: the model's config has no {' and no '.join(missing)}")
    return config


def read_stop_token_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens (eos_token_id, one or a list) that config.json and generation_config.json of a model folder name, ascending.

    A chat model's end of turn is often named by the latter only.
    Raises: ValueError if a file is not JSON, or an eos_token_id is neither a token nor a list of tokens.
    """
    found: set[int] = set()
    for file in (folder / "config.json", folder / GENERATION_CONFIG):
        named = _read_object(file).get("eos_token_id") if file.is_file() else None
        tokens = named if isinstance(named, list) else [] if named is None else [named]
        if any(type(token) is not int for token in tokens):
            raise ValueError(f"{file}: eos_token_id is {named!r}; it must be a token id or a list of them")
        found.update(tokens)
    return tuple(sorted(found))


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object")
    return found


def write_hf_config(folder: Path, hf_config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """config.json with the dtype of the weights beside it."""
    config = {key: value for key, value in hf_config.items() if key != "torch_dtype"} | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_hf_weights(folder: Path, source: WeightSource) -> None:
    """Fill this rank's parameters from a Hugging Face folder, reading only what the rank holds. Padding becomes 0.

    Raises: ValueError if the folder has no weights, or tensors are missing, unexpected or of a wrong shape.
    """
    names = NameMap(source.hf_config)
    tied = bool(source.hf_config.get("tie_word_embeddings", False))
    with open_safetensors(folder) as reader, torch.no_grad():
        # some tied models on the hub store the embedding twice
        reader.check(names.tensors(torch.float32), ignored=("lm_head.weight",) if tied else ())
        for shard in source.weight_shards():
            views = names.views(shard)
            if sum(view.view.numel() for view in views) < shard.tensor.numel():
                shard.tensor.zero_()
            for view in views:
                view.copy_from(reader.read(view.name, view.region).to(view.view))
    source.weights_changed()


def export_hf(
    source: WeightSource,
    folder: Path,
    *,
    group: dist.ProcessGroup | None = None,
    extra_files: Sequence[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model as a Hugging Face folder. A collective; no rank holds more than one whole tensor.

    Each file is written by one rank, to which the others send their parts. The folder appears only when it is complete.

    Args:
        folder: must not exist, and be the same place for all ranks.
        group: ranks that hold the model, on a CPU backend; None: all.
        extra_files: copied beside the weights, the tokenizer's for example.
    Raises: ValueError if the folder exists.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    names = NameMap(source.hf_config)
    shards = list(source.weight_shards())
    views = [view for shard in shards for view in names.views(shard)]
    tensors = names.tensors(shards[0].tensor.dtype)
    facts: list[tuple[bool, list[tuple[str, Region]]]] = [(False, [])] * num_ranks
    dist.all_gather_object(facts, (folder.exists(), [(view.name, view.region) for view in views]), group=group)
    if any(exists for exists, _ in facts):
        raise ValueError(f"{folder} exists; give a folder that does not")
    regions = distinct_regions(tensors, [held for _, held in facts])

    partial = folder.with_name(f"{folder.name}.partial")
    writer = SafetensorsWriter(partial, tensors, max_shard_bytes)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_hf_config(partial, source.hf_config, tensors[0].dtype)
        writer.write_index()
        for file in extra_files:
            shutil.copy(file, partial / file.name)
    dist.barrier(group)
    for file in range(rank, writer.num_files, num_ranks):
        writer.create(file)
    held = {(view.name, view.region): view for view in views}
    for meta in tensors:
        owner = writer.file_of[meta.name] % num_ranks
        whole = _collect(meta, regions[meta.name], owner, rank, held, group)
        if whole is not None:
            writer.write(meta.name, whole)
    dist.barrier(group)
    if rank == 0:
        partial.rename(folder)
    dist.barrier(group)


def _collect(
    meta: TensorMeta,
    regions: dict[Region, list[int]],
    owner: int,
    rank: int,
    held: dict[tuple[str, Region], HFView],
    group: dist.ProcessGroup | None,
) -> torch.Tensor | None:
    """Bring a tensor's regions together on `owner`; None on other ranks."""
    whole = torch.empty(meta.shape, dtype=meta.dtype) if rank == owner else None
    operations: list[dist.P2POp] = []
    arriving: list[tuple[Region, torch.Tensor]] = []
    for region, ranks in regions.items():
        source = owner if owner in ranks else ranks[0]
        if rank not in (owner, source):
            continue
        if owner == source:
            assert whole is not None
            held[meta.name, region].copy_to(whole[tuple(slice(*bounds) for bounds in region)])
            continue
        part = torch.empty([stop - start for start, stop in region], dtype=meta.dtype)
        if rank == source:
            held[meta.name, region].copy_to(part)
            operations.append(dist.P2POp(dist.isend, part.view(-1).view(torch.uint8), group=group, group_peer=owner))
        else:
            arriving.append((region, part))
            operations.append(dist.P2POp(dist.irecv, part.view(-1).view(torch.uint8), group=group, group_peer=source))
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    for region, part in arriving:
        assert whole is not None
        whole[tuple(slice(*bounds) for bounds in region)] = part
    return whole


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """What `load_latest` found. `state` has the structure of the sharded state that was given; `extra` is this rank's."""

    step: int
    folder: Path
    state: dict[str, Any]
    extra: Any  # None if this rank saved nothing


def save_checkpoint(
    folder: Path, step: int, sharded_state: dict[str, Any], extra: Any = None, *, keep: int, group: dist.ProcessGroup | None = None
) -> int:
    """Save a checkpoint and remove all but the newest `keep`. A collective.

    Args:
        folder: of all checkpoints of the run, on storage that all ranks share.
        sharded_state: the trainer's sharded_state_dict(), values of Megatron's dist_checkpointing mapping.
        extra: anything of plain containers, numbers, strings and tensors, per rank; None saves nothing for this rank.
        group: all ranks, on a CPU backend; None: the default group.
    Returns: the oldest step that is kept.
    """
    # here, not above: on a CPU megatron can only be imported once the trainer has prepared torch for it
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # Otherwise Megatron starts a process that imports this program again, to hold a queue that a waiting save does not share.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    partial, final = folder / f"partial_{step:08d}", folder / _name(step)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("partial_*"):
            shutil.rmtree(stale)
        (partial / "state").mkdir(parents=True)
    dist.barrier(group)
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(sharded_state, str(partial / "state"), strategy)
    if extra is not None:
        torch.save(extra, partial / f"extra_{rank}.pt")
    dist.barrier(group)
    files = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    mine = {name: _fingerprint(partial / name) for name in files[rank::num_ranks]}
    everyone: list[dict[str, Any]] = [{}] * num_ranks
    dist.all_gather_object(everyone, mine, group=group)
    if rank == 0:
        marker = {"step": step, "num_ranks": num_ranks, "files": {name: entry for part in everyone for name, entry in part.items()}}
        _write_durably(partial / _MARKER, json.dumps(marker, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
        for old in sorted(_steps(folder))[:-keep]:
            shutil.rmtree(folder / _name(old))
    dist.barrier(group)
    return min(_steps(folder))


def load_latest(
    folder: Path,
    sharded_state: Callable[[], dict[str, Any]],
    *,
    rename_damaged: bool = True,
    group: dist.ProcessGroup | None = None,
) -> LoadedCheckpoint | None:
    """Load the newest checkpoint whose files are all there and unchanged; None if none was ever saved. A collective.

    Args:
        sharded_state: makes the trainer's sharded_state_dict(), whose layout may differ from the saved one's. Called only
            when there is something to load: making it overwrites the optimizer's state.
        rename_damaged: rename newer, damaged ones to damaged_step_…, so that `save_checkpoint` does not count them. False for a reader
            beside the run, to which one that the run is just removing looks damaged.
    Raises: ValueError on every rank if there are checkpoints and none is whole; then nothing is renamed.
    """
    from megatron.core import dist_checkpointing

    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    listed = [(sorted(_steps(folder), reverse=True), sorted(entry.name for entry in folder.glob("damaged_step_*")))]
    dist.broadcast_object_list(listed, group=group, group_src=0)
    steps, damaged_before = listed[0]
    damage: dict[int, str] = {}
    for step in steps:
        checkpoint = folder / _name(step)
        faults = [""] * num_ranks
        dist.all_gather_object(faults, find_damage(checkpoint, part=rank, num_parts=num_ranks), group=group)
        found = [fault for fault in faults if fault]
        if found:
            damage[step] = found[0]
            continue
        if rank == 0:
            for passed, fault in damage.items():
                _LOG.warning("checkpoint %s is damaged and passed over: %s", folder / _name(passed), fault)
                if rename_damaged:
                    _set_aside(folder / _name(passed))
        wanted = sharded_state()
        names = set(wanted)
        loaded = dist_checkpointing.load(wanted, str(checkpoint / "state"))
        assert isinstance(loaded, dict)
        # Megatron adds all that is not a tensor, also of parts that were not asked for.
        state = {name: value for name, value in loaded.items() if name in names}
        file = checkpoint / f"extra_{rank}.pt"
        return LoadedCheckpoint(step, checkpoint, state, torch.load(file, weights_only=True) if file.exists() else None)
    if damage or damaged_before:
        faults = [f"{_name(step)} ({fault})" for step, fault in damage.items()] + damaged_before
        raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}; repair one, or delete the folder to start anew")
    return None


def _set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, in place of an earlier one of the same step."""
    target = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)
    _sync(checkpoint.parent)


def find_damage(checkpoint: Path, *, part: int = 0, num_parts: int = 1) -> str:
    """Check every `num_parts`-th file from `part` on; "" or what is wrong."""
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads((checkpoint / _MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{_MARKER}: {error}"
    for name in sorted(files)[part::num_parts]:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != files[name]["bytes"]:
            return f"{name} has {file.stat().st_size} bytes; {files[name]['bytes']} were written"
        if _fingerprint(file) != files[name]:
            return f"{name} has another checksum than when it was written"
    return ""


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _steps(folder: Path) -> list[int]:
    return [int(match[1]) for entry in folder.iterdir() if (match := re.fullmatch(r"step_(\d{8,})", entry.name))] if folder.is_dir() else []


def _fingerprint(file: Path) -> dict[str, Any]:
    """Size and xxh3-64 of a file, which is flushed to the disk first."""
    digest, size = xxhash.xxh3_64(), 0
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def _write_durably(file: Path, text: str) -> None:
    with file.open("w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
