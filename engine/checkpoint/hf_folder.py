"""Hugging Face model folders in and out, through the same name map as the swap."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tandem.engine.checkpoint.names import HFView, NameMap
from tandem.engine.checkpoint.plan import Region, distinct_regions
from tandem.engine.checkpoint.safetensors_folder import SafetensorsReader, SafetensorsWriter, open_safetensors
from tandem.engine.types import TensorMeta, WeightShard, WeightSource

GENERATION_CONFIG = "generation_config.json"
MAX_SHARD_BYTES = 5 << 30
BAND_BYTES = 8 << 20


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
                for first, last in _bands(view.region[0], view.region_shape, shard.tensor.dtype):
                    _load_rows(reader, view, first, last)
    source.weights_changed()


def _bands(rows: tuple[int, int], shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) into bands of some MiB: the unit in which tensors are read, sent and written."""
    num_rows = max(1, BAND_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(*rows, num_rows):
        yield start, min(rows[1], start + num_rows)


def _load_rows(reader: SafetensorsReader, view: HFView, first: int, last: int) -> None:
    """Read rows [first, last) of the whole tensor into the view that holds them."""
    origin = view.region[0][0]
    values = reader.read(view.name, ((first, last), *view.region[1:]))
    for start, stop, part in view.rows(first - origin, last - origin):
        part.copy_(values[start + origin - first : stop + origin - first].view(part.shape))


def _copy_rows(out: torch.Tensor, view: HFView, first: int, last: int) -> None:
    """Copy rows [first, last) of the whole tensor from the view that holds them to `out`, converted."""
    origin = view.region[0][0]
    for start, stop, part in view.rows(first - origin, last - origin):
        rows = out[start + origin - first : stop + origin - first]
        rows.view(*part.shape[: part.dim() - rows.dim() + 1], *rows.shape[1:]).copy_(part)


def write_model(
    hf_config: Mapping[str, Any],
    dtype: torch.dtype,
    weights: Iterable[WeightShard],
    folder: Path,
    *,
    extra_files: Sequence[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder in one process, which holds one parameter at a time. The folder appears only when it is complete.

    Args:
        dtype: of the tensors in the files.
        weights: every parameter of the model, whole; each is forgotten before the next is asked for.
        folder: must not exist.
        extra_files: copied beside the weights, the tokenizer's for example.
    Raises: ValueError if the folder exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; give a folder that does not")
    names = NameMap(hf_config)
    tensors = names.tensors(dtype)
    writer, partial = SafetensorsWriter(_partial(folder), tensors, max_shard_bytes), _partial(folder)
    _begin(partial, hf_config, dtype, writer, extra_files)
    for file in range(writer.num_files):
        writer.create(file)
    missing = {meta.name: meta.dtype for meta in tensors}
    for shard in weights:
        for view in names.views(shard):
            kept = missing.pop(view.name)
            for first, last in _bands(view.region[0], view.shape, kept):
                _copy_rows(rows := torch.empty((last - first, *view.shape[1:]), dtype=kept), view, first, last)
                writer.write(view.name, rows, first)
    assert not missing, f"no parameter holds {', '.join(missing)}"
    partial.rename(folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _begin(partial: Path, hf_config: Mapping[str, Any], dtype: torch.dtype, writer: SafetensorsWriter, extra_files: Sequence[Path]) -> None:
    """Everything but the weights."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_hf_config(partial, hf_config, dtype)
    writer.write_index()
    for file in extra_files:
        shutil.copy(file, partial / file.name)


def export_hf(
    source: WeightSource,
    folder: Path,
    *,
    group: dist.ProcessGroup | None = None,
    extra_files: Sequence[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model as a Hugging Face folder. A collective; a rank needs memory for some MiB beside its own part.

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

    partial = _partial(folder)
    writer = SafetensorsWriter(partial, tensors, max_shard_bytes)
    if rank == 0:
        _begin(partial, source.hf_config, tensors[0].dtype, writer, extra_files)
    dist.barrier(group)
    for file in range(rank, writer.num_files, num_ranks):
        writer.create(file)
    held = {(view.name, view.region): view for view in views}
    for meta in tensors:
        owner = writer.file_of[meta.name] % num_ranks
        for band in _bands((0, meta.shape[0]), meta.shape, meta.dtype):
            rows = _collect(meta, band, regions[meta.name], owner, rank, held, group)
            if rows is not None:
                writer.write(meta.name, rows, band[0])
    dist.barrier(group)
    if rank == 0:
        partial.rename(folder)
    dist.barrier(group)


def _collect(
    meta: TensorMeta,
    band: tuple[int, int],
    regions: dict[Region, tuple[int, ...]],
    owner: int,
    rank: int,
    held: dict[tuple[str, Region], HFView],
    group: dist.ProcessGroup | None,
) -> torch.Tensor | None:
    """Bring rows [band[0], band[1]) of a tensor together on `owner`; None on other ranks."""
    begin, end = band
    whole = torch.empty((end - begin, *meta.shape[1:]), dtype=meta.dtype) if rank == owner else None
    operations: list[dist.P2POp] = []
    arriving: list[tuple[tuple[slice, ...], torch.Tensor]] = []
    for region, ranks in regions.items():
        first, last = max(begin, region[0][0]), min(end, region[0][1])
        source = owner if owner in ranks else ranks[0]
        if first >= last or rank not in (owner, source):
            continue
        where = (slice(first - begin, last - begin), *(slice(*bounds) for bounds in region[1:]))
        if owner == source:
            assert whole is not None
            _copy_rows(whole[where], held[meta.name, region], first, last)
            continue
        part = torch.empty([last - first, *(stop - start for start, stop in region[1:])], dtype=meta.dtype)
        if rank == source:
            _copy_rows(part, held[meta.name, region], first, last)
            operations.append(dist.P2POp(dist.isend, part.view(-1).view(torch.uint8), group=group, group_peer=owner))
        else:
            arriving.append((where, part))
            operations.append(dist.P2POp(dist.irecv, part.view(-1).view(torch.uint8), group=group, group_peer=source))
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    for where, part in arriving:
        assert whole is not None
        whole[where] = part
    return whole
