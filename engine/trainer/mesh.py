"""How the ranks divide the model, and Megatron's process groups for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel

from tandem.engine.architecture import Architecture
from tandem.engine.config import MeshConfig
from tandem.engine.mesh_rules import check_mesh, expert_tensor_parallel


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place on every axis. `dp` leaves context parallelism out: the cp ranks of a dp index share its rows."""

    config: MeshConfig
    rank: int
    size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    dp_rank_of: tuple[int, ...]
    """The data-parallel index of every global rank: which rows it trains on."""

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def token_multiple(self) -> int:
        """The tokens of a microbatch on one cp rank are padded at the end to a multiple of this."""
        return self.tp_size if self.config.sequence_parallel else 1


def build_mesh(config: MeshConfig, hf_config: Mapping[str, Any]) -> Mesh:
    """Initialise Megatron's process groups; a collective of all ranks of an initialised torch.distributed.

    Raises: ValueError naming the fields if the ranks or the model cannot be divided that way.
    """
    world_size = dist.get_world_size()
    check_mesh(config, Architecture.from_hf(hf_config), world_size)
    etp = expert_tensor_parallel(config)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        context_parallel_size=config.cp,
        expert_model_parallel_size=config.ep,
        expert_tensor_parallel_size=etp,
    )
    # Training draws no random numbers (no dropout, and weights are drawn by name), but Megatron's modules ask for its generators.
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    dp_rank = parallel_state.get_data_parallel_rank()
    etp_rank = parallel_state.get_expert_tensor_parallel_rank()
    assert etp_rank is not None
    dp_ranks = [torch.zeros(1, dtype=torch.int64, device=torch.cuda.current_device()) for _ in range(world_size)]
    dist.all_gather(dp_ranks, torch.tensor([dp_rank], device=torch.cuda.current_device()))
    return Mesh(
        config=config,
        rank=dist.get_rank(),
        size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=config.pp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=config.cp,
        dp_rank=dp_rank,
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=config.ep,
        etp_rank=etp_rank,
        etp_size=etp,
        dp_rank_of=tuple(int(rank) for rank in dp_ranks),
    )


def check_schedule(config: ModelParallelConfig) -> None:
    """Raise ValueError for a pipeline that megatron-core 0.16.1 computes wrongly without a word.

    With two stages the interleaved schedule confuses what a rank sends with what it gets, unless it sends and receives apart.
    """
    if config.virtual_pipeline_model_parallel_size is None or config.pipeline_model_parallel_size > 2:
        return
    if not config.overlap_p2p_comm:
        raise ValueError(
            f"overlap_p2p_comm is False with pp={config.pipeline_model_parallel_size} and "
            f"vpp={config.virtual_pipeline_model_parallel_size}: gradients would be wrong; set it to True, and batch_p2p_comm to False"
        )


def destroy_mesh() -> None:
    """Forget Megatron's process groups."""
    parallel_state.destroy_model_parallel()
