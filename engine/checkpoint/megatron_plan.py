"""Megatron's distributed format taken apart: planning, which is a collective, and writing, which is not.

Importable once the trainer has prepared torch for megatron-core.
"""

import os
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.storage import WriteResult


def saved_tensors(sharded_state: dict[str, Any]) -> list[tuple[ShardedTensor, torch.Tensor]]:
    """What this rank writes, each with its values: of the ranks that hold the same, one does. Factories become the tensors they make."""
    apply_factories(sharded_state)
    found = [x for x in nested_values(sharded_state) if isinstance(x, ShardedTensor) and is_main_replica(x.replica_id)]
    return [(place, place.data.detach()) for place in found if place.data is not None]


def signature_of(places: Sequence[ShardedTensor]) -> str:
    """Equal for equal names, places and dtypes: the plan of one is that of the other."""
    found = [(place.key, place.global_shape, place.global_offset, place.local_shape, str(place.dtype)) for place in places]
    return xxhash.xxh3_128_hexdigest(repr(found).encode())


class Planner(TorchDistSaveShardedStrategy):
    """Megatron's strategy, which hands out the writer and the plan instead of a function that writes in a process of its own.

    The second plan and those after it are the first one, without a word between the ranks.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1, cached_metadata=True)
        # Otherwise Megatron starts an interpreter to hold a queue that is never used.
        filesystem_async._results_queue = queue.SimpleQueue()
        self._writer: Any = None
        self._metadata: Any = None

    @property
    def has_plan(self) -> bool:
        return self.validated_cache_reuse

    def plan(self, state: dict[str, Any], folder: Path) -> tuple[Any, Any]:
        """(the writer, which holds this rank's tensors; what rank 0 needs to finish). A collective the first time."""
        self.async_save(state, folder)
        self.validated_cache_reuse = True
        return self._writer, self._metadata

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self._writer = writer
        if save_state_dict_ret[1] is not None:
            self._metadata = save_state_dict_ret[1]
            del self._metadata.all_local_plans  # would be saved too, and nobody reads it
        return AsyncRequest(None, (), [])


def write_tensors(writer: filesystem_async.FileSystemWriterAsync) -> tuple[list[WriteResult], list[Path]]:
    """Write and flush the files that were planned. Returns what was written where, and the files."""
    results, files = [], []
    for path, storage_key, (objects, tensors) in writer.write_buckets or ():
        try:
            with open(path, "wb") as stream:
                for item, data in [*objects, *tensors]:
                    results.append(_write_item(writer.transforms, stream, data, item, storage_key, SerializationFormat.TORCH_SAVE))
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:
            failed: BaseException | None = error  # torch says that it could not write, and not why: that is what it was handling
            while failed is not None and not isinstance(failed, OSError):
                failed = failed.__context__
            if failed is None:
                raise
            raise OSError(failed.errno, failed.strerror, path) from error
        files.append(Path(path))
    return results, files
