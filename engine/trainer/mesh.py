"""How the ranks divide the model, and Megatron's process groups for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from tandem.engine.architecture import Architecture
from tandem.engine.config import MeshConfig


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
    check_mesh(config, hf_config, world_size)
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


def expert_tensor_parallel(config: MeshConfig) -> int:
    """mesh.etp, resolved: 1 when experts are spread over ranks, else tp (see `check_mesh`)."""
    if config.etp is not None:
        return config.etp
    return 1 if config.ep > 1 else config.tp


def destroy_mesh() -> None:
    """Forget Megatron's process groups."""
    parallel_state.destroy_model_parallel()


def check_mesh(config: MeshConfig, hf_config: Mapping[str, Any], world_size: int) -> None:
    """Raise ValueError, naming the fields, unless `world_size` ranks can train the model on this mesh."""
    product = config.tp * config.pp * config.cp
    if world_size % product:
        fits = [n for n in range(config.pp, 0, -1) if world_size % (config.tp * config.cp * n) == 0]
        advice = f"set mesh.pp={fits[0]} (dp={world_size // (config.tp * config.cp * fits[0])}), or " if fits else ""
        raise ValueError(
            f"{world_size} ranks do not hold tp={config.tp} x pp={config.pp} x cp={config.cp} ({product}); "
            f"{advice}launch a multiple of {product}"
        )
    architecture = Architecture.from_hf(hf_config)
    heads, kv_heads, layers, vocab = architecture.num_heads, architecture.num_kv_heads, architecture.num_layers, architecture.vocab_size
    for name, value in (("num_attention_heads", heads), ("vocab_size", vocab), ("intermediate_size", architecture.intermediate_size)):
        if value % config.tp:
            raise ValueError(f"mesh.tp={config.tp} does not divide the model's {name}={value}; set mesh.tp to a divisor of it")
    if kv_heads % config.tp and config.tp % kv_heads:
        raise ValueError(
            f"mesh.tp={config.tp} and the model's num_key_value_heads={kv_heads} do not divide each other; set mesh.tp so that one does"
        )
    if layers % (config.pp * config.vpp):
        raise ValueError(
            f"mesh.pp={config.pp} x mesh.vpp={config.vpp} does not divide the model's num_hidden_layers={layers}; "
            f"set them so that their product divides {layers}"
        )
    num_experts = architecture.num_experts
    etp = expert_tensor_parallel(config)
    if not num_experts:
        if config.ep > 1 or config.etp not in (None, 1):
            raise ValueError(f"mesh.ep={config.ep}, mesh.etp={config.etp}, but {hf_config['model_type']} has no experts; set both to 1")
        return
    if num_experts % config.ep:
        raise ValueError(f"mesh.ep={config.ep} does not divide the model's num_experts={num_experts}; set mesh.ep to a divisor of it")
    if world_size % (config.ep * etp * config.pp):
        raise ValueError(
            f"{world_size} ranks do not hold ep={config.ep} x etp={etp} x pp={config.pp} ({config.ep * etp * config.pp}); "
            f"set mesh.ep to a divisor of {world_size // config.pp // etp}"
        )
    if config.ep == 1 and etp != config.tp:
        raise ValueError(
            f"mesh.etp={etp} with mesh.ep=1 and mesh.tp={config.tp}: Megatron reduces the gradients of experts that are not spread over "
            f"ranks like dense ones, which is wrong unless etp is tp; set mesh.etp={config.tp}, or mesh.ep above 1"
        )
    if config.tp > 1 and not config.sequence_parallel:
        raise ValueError(
            f"mesh.tp={config.tp} with num_experts={num_experts} needs mesh.sequence_parallel=True: "
            "without it every tp rank would send the same tokens to the experts"
        )
