"""The weights of a run's checkpoint, one parameter at a time: for an export, which needs neither the model in memory nor an optimizer."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from tandem.engine.architecture import Architecture
from tandem.engine.config import TrainerConfig
from tandem.engine.trainer.layers import transformer_config
from tandem.engine.trainer.mesh import Mesh
from tandem.engine.trainer.model import build_chunks, weight_shards
from tandem.engine.trainer.state import cut
from tandem.engine.types import WeightShard


def stored_weights(hf_config: Mapping[str, Any], mesh: Mesh, config: TrainerConfig, state: Path) -> Iterator[WeightShard]:
    """Every weight that this rank of the mesh would hold, read from a checkpoint when it is asked for.

    Args:
        config: of the run that saved it; the weights have its dtype.
        state: the checkpoint's folder of `dist_checkpointing`.
    """
    architecture = Architecture.from_hf(hf_config)
    model_config = transformer_config(architecture, mesh, config, variable_lengths=False)
    # Memory that is never written to is not taken: the model here only says which part of the checkpoint belongs to which parameter.
    model_config.use_cpu_initialization, model_config.perform_initialization = True, False
    chunks = build_chunks(model_config, architecture, mesh, temperature=1.0)
    sharded = {str(i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    found = [x for x in nested_values(sharded) if isinstance(x, ShardedTensor | ShardedTensorFactory)]
    places = {x.data.data_ptr(): x for x in found if x.data is not None}
    for shard in weight_shards(chunks, mesh):
        values = torch.empty(shard.tensor.shape, dtype=shard.tensor.dtype)
        parts = list(cut(places[shard.tensor.data_ptr()], 0, values.numel(), values))  # which share the memory of `values`
        dist_checkpointing.load({"weight": parts}, str(state), validate_access_integrity=False)
        yield replace(shard, tensor=values)
