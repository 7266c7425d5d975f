"""Scales of block-quantised matrices (engine/quantised.py) whose blocks lie on whatever ranks: who knows which, and what they are.

A block's scale follows from its largest magnitude. Where the cuts between shards go through a block, the ranks that hold parts of it tell
each other the largest of theirs before the first bucket of a swap. With its scale, every element is quantised by itself: so cuts, entries
and buckets may lie anywhere, and no weight is gathered for it.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch

from tandem.engine.checkpoint.agreement import Agreement
from tandem.engine.checkpoint.names import HFView, Region
from tandem.engine.checkpoint.plan import Holdings, intersection, volume
from tandem.engine.quantised import FP8, scale_name
from tandem.engine.types import TensorMeta
from tandem.kernels.block_fp8 import BLOCK, scale_shape, scales_of
from tandem.kernels.packing import Magnitudes

Cells = Mapping[str, Mapping[Region, bool]]
"""Of each matrix, regions of its scales that the same ranks know, each with whether several parts of the matrix are needed for it."""


def blocks_of(region: Region) -> Region:
    """The blocks that a part of a matrix has elements of."""
    return tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in region)


def cells_of(tensors: Sequence[TensorMeta], holdings: Holdings) -> Cells:
    """How the scales of every matrix fall into regions of which each rank knows all or nothing.

    Args:
        tensors: of the model as they are sent (`quantised`).
        holdings: per rank, the regions of the tensors that it holds, equal or disjoint.
    """
    shapes = {meta.name: meta.shape for meta in tensors if meta.dtype == FP8}
    parts: dict[str, set[Region]] = {name: set() for name in shapes}
    for name, region in (held for of_rank in holdings for held in of_rank):
        if name in parts:
            parts[name].add(region)
    cells: dict[str, dict[Region, bool]] = {}
    for name, regions in parts.items():
        if len(regions) == 1:
            cells[name] = {blocks_of(*regions): False}
            continue
        # A bound within a block gives that block a row (or column) of cells of its own.
        cuts = [
            sorted({block for region in regions for bound in region[dim] for block in (_before(bound, extent), -(-bound // BLOCK))})
            for dim, extent in enumerate(shapes[name])
        ]
        of_matrix: dict[Region, bool] = {}
        for cell in itertools.product(*(itertools.pairwise(of_dim) for of_dim in cuts)):
            touched = sum(intersection(cell, blocks_of(region)) is not None for region in regions)
            if touched:
                of_matrix[cell] = touched > 1
        cells[name] = of_matrix
    return cells


def _before(bound: int, extent: int) -> int:
    """The cut in front of the block that a bound goes through; the end of the matrix goes through none."""
    return -(-bound // BLOCK) if bound == extent else bound // BLOCK


def with_scales(holdings: Holdings, cells: Cells) -> list[list[tuple[str, Region]]]:
    """The holdings, with the scales that every rank knows once the largest magnitudes are told."""
    found: list[list[tuple[str, Region]]] = []
    for of_rank in holdings:
        known: dict[tuple[str, Region], None] = {}
        for name, region in of_rank:
            for cell in cells.get(name, ()):
                if intersection(cell, blocks_of(region)) is not None:
                    known[scale_name(name), cell] = None
        found.append([*of_rank, *known])
    return found


class BlockScales:
    """The scales that one rank knows. They are in one memory, which stays: `views` are of it.

    Args:
        cells: of all ranks' holdings; the same on every rank.
        views: what this rank holds of the model's tensors.
    """

    def __init__(self, agreement: Agreement, cells: Cells, views: Sequence[HFView]) -> None:
        self._agreement = agreement
        self._parts = [view for view in views if view.name in cells]
        shapes = {view.name: scale_shape(*view.shape) for view in self._parts}
        sizes = [rows * columns for rows, columns in shapes.values()]
        device = self._parts[0].view.device if self._parts else torch.device("cpu")
        self._memory = torch.ones(sum(sizes), dtype=torch.float32, device=device)
        split = zip(shapes, self._memory.split(sizes), strict=True) if sizes else ()
        self.of = {name: values.view(shapes[name]) for name, values in split}
        self._shared = [(name, cell) for name, of_matrix in cells.items() for cell, is_shared in of_matrix.items() if is_shared]
        self._num_shared = sum(volume(cell) for _, cell in self._shared)
        self.views = [self._view(part) for part in self._parts]
        self._magnitudes = Magnitudes(
            [(part.view.detach(), self.of[part.name], part.region[0][0], part.region[1][0]) for part in self._parts]
        )

    def _view(self, part: HFView) -> HFView:
        region = blocks_of(part.region)
        scales = self.of[part.name]
        return HFView(scale_name(part.name), tuple(scales.shape), region, scales[tuple(slice(*bounds) for bounds in region)])

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the scales of the present weights. A collective where ranks share blocks.

        Raises: ValueError naming a tensor with an element that is infinite or no number; WeightTransferError if a rank is gone.
        """
        failed: Exception | None = None
        try:
            self._memory.zero_()
            self._magnitudes.find()
        except Exception as error:  # others wait for this rank's numbers
            failed = error
        if self._num_shared:
            self._share()
        if failed is not None:
            raise failed
        if not bool(self._memory.isfinite().all()):
            raise ValueError(self._which())
        self._memory.copy_(scales_of(self._memory))

    def _share(self) -> None:
        largest = torch.zeros(self._num_shared, dtype=torch.float32)
        mine = []
        at = 0
        for name, cell in self._shared:
            numbers = largest[at : (at := at + volume(cell))]
            if name in self.of:
                mine.append((self.of[name][tuple(slice(*bounds) for bounds in cell)], numbers))
        for known, numbers in mine:
            numbers.copy_(known.reshape(-1))
        # As integers, positive floats have the same order, infinity and NaN above all.
        self._agreement.largest("tell the largest magnitudes of its blocks", largest.view(torch.int32))
        for known, numbers in mine:
            known.copy_(numbers.view(known.shape))

    def _which(self) -> str:
        """Names the first block that has no scale."""
        name, scales = next((name, scales) for name, scales in self.of.items() if not bool(scales.isfinite().all()))
        row, column = (~scales.isfinite()).nonzero()[0].tolist()
        rows, columns = (f"{index * BLOCK}:{(index + 1) * BLOCK}" for index in (row, column))
        return (
            f"tensor {name} has an element that is infinite or no number, in rows {rows}, columns {columns}: such a block has no scale. "
            "Training has diverged; go back to a checkpoint before it did"
        )
