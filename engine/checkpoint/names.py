"""One name map between Megatron parameters and Hugging Face tensors, used in both directions.

A model is a list of `Row`s (families.py). A row says under which Hugging Face names a Megatron parameter is stored and how tensor
parallelism cuts it. For one shard the map gives *views* into the local tensor, each beside the region of the Hugging Face
tensor that it holds: export copies view to region, import copies region to view, so both directions are the same rows
and bitwise inverse.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.checkpoint.families import Row, rows_of, sizes_of
from tandem.engine.types import TensorMeta, WeightShard

Region = tuple[tuple[int, int], ...]  # (start, stop) of every dimension of a Hugging Face tensor


@dataclass(frozen=True, slots=True)
class HFView:
    """Part of a Hugging Face tensor, and the view of the local parameter that holds it.

    `view` has the region's shape, or one dimension more when its rows lie in groups: [groups, rows per group, …].
    """

    name: str
    shape: tuple[int, ...]  # of the whole Hugging Face tensor
    region: Region
    view: torch.Tensor

    @property
    def region_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.region)

    def copy_to(self, out: torch.Tensor) -> None:
        """Export: write the parameter's values to `out`, which has the region's shape."""
        out.view(_split_rows(out, self.view)).copy_(self.view)

    def copy_from(self, values: torch.Tensor) -> None:
        """Import: write `values`, which have the region's shape, into the parameter."""
        self.view.copy_(values.view(_split_rows(values, self.view)))

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (start, stop, view) over rows [start, stop) of the region; a view of whole groups has a dimension more."""
        if self.view.dim() == len(self.region):
            yield start, stop, self.view[start:stop]
            return
        rows_per_group = self.view.shape[1]
        while start < stop:
            group, row = divmod(start, rows_per_group)
            num_groups = (stop - start) // rows_per_group
            if row == 0 and num_groups:
                end, view = start + num_groups * rows_per_group, self.view[group : group + num_groups]
            else:
                end = min(stop, (group + 1) * rows_per_group)
                view = self.view[group, row : row + end - start]
            yield start, end, view
            start = end


def _split_rows(flat: torch.Tensor, view: torch.Tensor) -> tuple[int, ...]:
    """The shape under which `flat` meets `view`: the same, or with its rows split into groups."""
    return tuple(view.shape) if view.dim() > flat.dim() else tuple(flat.shape)


class NameMap:
    """The map of one model.

    Args:
        hf_config: the model's config.json as a dictionary.
    Raises: ValueError for a model that `Architecture.from_hf` refuses.
    """

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        architecture = Architecture.from_hf(hf_config)
        self.model_type = architecture.model_type
        self.sizes = sizes_of(architecture)
        self._sparse_layers = architecture.sparse_layers
        self._rows = rows_of(architecture)
        self._patterns = [(re.compile(_pattern(row.megatron)), row) for row in self._rows]

    def tensors(self, dtype: torch.dtype) -> list[TensorMeta]:
        """Every tensor of the model as it lies on disk, in a fixed order; shapes from the config.

        Args:
            dtype: of all tensors but those that have a type of their own.
        """
        metas: dict[str, TensorMeta] = {}
        for row in self._rows:
            for hf_name, dims in row.hf:
                for index in self._indices(row):
                    name = hf_name.format(**index)
                    metas.setdefault(name, TensorMeta(name=name, shape=self._shape(dims), dtype=row.dtype or dtype))
        return list(metas.values())

    def views(self, shard: WeightShard) -> list[HFView]:
        """What this shard holds of which Hugging Face tensors; together the views cover it, padding excepted.

        Raises: ValueError if the parameter is not in the map or its local shape does not fit the config.
        """
        for pattern, row in self._patterns:
            match = pattern.fullmatch(shard.name)
            if match and {key: int(text) for key, text in match.groupdict().items()} in self._indices(row):
                return self._row_views(row, match.groupdict(), shard)
        raise ValueError(f"{self.model_type} has no parameter {shard.name!r} in its name map")

    def _row_views(self, row: Row, index: dict[str, str], shard: WeightShard) -> list[HFView]:
        names = [name.format(**index) for name, _ in row.hf]
        shapes = [self._shape(dims) for _, dims in row.hf]
        local, rank, size = shard.tensor, shard.tp_rank, shard.tp_size
        whole: Region = tuple((0, extent) for extent in shapes[0])
        inner = whole[1:]

        def require(*needed: int) -> None:
            if tuple(local.shape) != needed:
                raise ValueError(
                    f"{shard.name} on tp rank {rank} of {size} has shape {tuple(local.shape)}; the model's config needs {needed}"
                )

        match row.cut:
            case "whole":
                require(*shapes[0])
                return [HFView(names[0], shapes[0], whole, local)]
            case "vocabulary":
                (num_rows, *rest), num_local = shapes[0], local.shape[0]
                if num_local * size < num_rows:
                    raise ValueError(f"{shard.name} has {num_local} rows on each of {size} tp ranks; the vocabulary has {num_rows}")
                require(num_local, *rest)
                start, stop = (min(num_rows, bound * num_local) for bound in (rank, rank + 1))
                return [HFView(names[0], shapes[0], ((start, stop), *inner), local[: stop - start])] if stop > start else []
            case "rows":
                num_rows, *rest = shapes[0]
                part = num_rows // size
                if part * size != num_rows:
                    raise ValueError(f"{shard.name}: tp={size} does not divide {num_rows} rows")
                require(part, *rest)
                return [HFView(names[0], shapes[0], ((rank * part, (rank + 1) * part), *inner), local)]
            case "columns":
                num_rows, num_columns, *rest = shapes[0]
                width = num_columns // size
                require(num_rows, width, *rest)
                if width * size != num_columns:
                    raise ValueError(f"{shard.name}: tp={size} does not divide {num_columns} columns")
                return [HFView(names[0], shapes[0], (whole[0], (rank * width, (rank + 1) * width), *whole[2:]), local)]
            case "glu":
                num_rows, *rest = shapes[0]
                part = num_rows // size
                if part * size != num_rows:
                    raise ValueError(f"{shard.name}: tp={size} does not divide {num_rows} rows")
                require(2 * part, *rest)
                region = ((rank * part, (rank + 1) * part), *inner)
                return [HFView(name, shapes[0], region, local[i * part : (i + 1) * part]) for i, name in enumerate(names)]
            case "qkv":
                groups, head = self.sizes["groups"], self.sizes["head"]
                rows_per_group = [shapes[0][0] // groups, head, head]
                total = sum(rows_per_group) * groups
                if total % size:
                    raise ValueError(f"{shard.name}: tp={size} does not divide {total} rows")
                require(total // size, *shapes[0][1:])
                if groups % size == 0:
                    return self._qkv_groups(names, shapes, rows_per_group, shard)
                return self._qkv_rows(names, shapes, rows_per_group, shard)

    def _qkv_groups(self, names: list[str], shapes: list[tuple[int, ...]], rows_per_group: list[int], shard: WeightShard) -> list[HFView]:
        """Whole groups on every rank: one grouped view per name."""
        num_groups = shard.tensor.shape[0] // sum(rows_per_group)
        first = shard.tp_rank * num_groups
        parts = shard.tensor.view(num_groups, sum(rows_per_group), *shard.tensor.shape[1:]).split(rows_per_group, 1)
        return [
            HFView(name, shape, ((first * rows, (first + num_groups) * rows), *((0, extent) for extent in shape[1:])), part)
            for name, shape, rows, part in zip(names, shapes, rows_per_group, parts, strict=True)
        ]

    def _qkv_rows(self, names: list[str], shapes: list[tuple[int, ...]], rows_per_group: list[int], shard: WeightShard) -> list[HFView]:
        """Fewer groups than ranks: Megatron cuts the interleaved rows evenly, so a rank may hold parts of a group."""
        num_rows = shard.tensor.shape[0]
        first, last = shard.tp_rank * num_rows, (shard.tp_rank + 1) * num_rows
        views, block = [], 0  # block: interleaved row at which the next run of one kind begins
        for group in range(self.sizes["groups"]):
            for name, shape, rows in zip(names, shapes, rows_per_group, strict=True):
                start, stop = max(first, block), min(last, block + rows)
                if start < stop:
                    offset = group * rows - block
                    region = ((start + offset, stop + offset), *((0, extent) for extent in shape[1:]))
                    views.append(HFView(name, shape, region, shard.tensor[start - first : stop - first]))
                block += rows
        return views

    def _shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.sizes[dim] for dim in dims)

    def _indices(self, row: Row) -> "_Indices":
        layers = range(self.sizes["layers"])
        if row.where in ("moe_layer", "dense_layer"):
            layers = [layer for layer in layers if self._sparse_layers[layer] == (row.where == "moe_layer")]
        elif row.where != "layer":
            layers = None
        return _Indices(layers, range(self.sizes["experts"]) if "{expert}" in row.megatron else None)


@dataclass(frozen=True, slots=True)
class _Indices:
    """The layer and expert indices of a row, as keyword sets for its names."""

    layers: "range | list[int] | None"
    experts: range | None

    def __iter__(self) -> Iterator[dict[str, int]]:
        for layer in (None,) if self.layers is None else self.layers:
            for expert in (None,) if self.experts is None else self.experts:
                yield {key: value for key, value in (("layer", layer), ("expert", expert)) if value is not None}

    def __contains__(self, index: dict[str, int]) -> bool:
        return all(values is None or index[key] in values for key, values in (("layer", self.layers), ("expert", self.experts)))


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
