"""Hugging Face model folders in and out, through the same name map as the swap."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tandem.engine.checkpoint.names import HFView, NameMap
from tandem.engine.checkpoint.plan import Region, distinct_regions
from tandem.engine.checkpoint.safetensors_folder import SafetensorsWriter, open_safetensors
from tandem.engine.types import TensorMeta, WeightSource

GENERATION_CONFIG = "generation_config.json"
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
