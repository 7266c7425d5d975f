"""The layouts that are proven: by the tests, and by benchmarks/layout_table.py."""

from dataclasses import dataclass, field
from typing import Literal

from tandem.engine.config import MeshConfig, OptimizerConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to divide the ranks. What is not in the name is Megatron's plainest: torch's AdamW on every rank, nothing overlapped."""

    name: str
    num_ranks: int
    num_layers: int = 4  # of the model
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"

    @property
    def needs_experts(self) -> bool:
        return self.mesh.ep > 1 or self.mesh.etp is not None or self.dispatcher != "alltoall"

    def fits(self, *, experts: bool) -> bool:
        """Whether a model with or without experts can be trained like that."""
        if not experts:
            return not self.needs_experts
        return self.mesh.tp == 1 or self.mesh.sequence_parallel

    def trainer_config(self, optimizer: OptimizerConfig, dtype: Literal["float32", "bfloat16"] = "float32") -> TrainerConfig:
        return TrainerConfig(
            dtype=dtype,
            recompute=self.recompute,
            distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=self.overlap,
            moe_dispatcher=self.dispatcher,
            optimizer=optimizer,
        )


SP = {"sequence_parallel": True}

LAYOUTS = (
    Layout(name="1", num_ranks=1),
    Layout(name="full recomputation", num_ranks=1, recompute="full"),
    Layout(name="selective recomputation", num_ranks=1, recompute="selective"),
    Layout(name="TP2", num_ranks=2, mesh=MeshConfig(tp=2)),
    Layout(name="TP2, SP", num_ranks=2, mesh=MeshConfig(tp=2, **SP)),
    Layout(name="TP4, SP (fewer key heads)", num_ranks=4, mesh=MeshConfig(tp=4, **SP)),
    Layout(name="TP2, SP, full recomputation", num_ranks=2, mesh=MeshConfig(tp=2, **SP), recompute="full"),
    Layout(name="PP2", num_ranks=2, mesh=MeshConfig(pp=2)),
    Layout(name="PP4", num_ranks=4, mesh=MeshConfig(pp=4)),
    Layout(name="PP2 VPP2", num_ranks=2, mesh=MeshConfig(pp=2, vpp=2)),
    Layout(name="PP4 VPP2 (8 layers)", num_ranks=4, num_layers=8, mesh=MeshConfig(pp=4, vpp=2)),
    Layout(name="CP2", num_ranks=2, mesh=MeshConfig(cp=2)),
    Layout(name="CP3", num_ranks=3, mesh=MeshConfig(cp=3)),
    Layout(name="CP2, selective recomputation", num_ranks=2, mesh=MeshConfig(cp=2), recompute="selective"),
    Layout(name="DP3", num_ranks=3),
    Layout(name="DP2, overlapped", num_ranks=2, overlap=True),
    Layout(name="DP3, distributed optimizer", num_ranks=3, distributed_optimizer=True),
    Layout(name="DP3, distributed optimizer, overlapped", num_ranks=3, distributed_optimizer=True, overlap=True),
    Layout(name="TP2 CP2, SP", num_ranks=4, mesh=MeshConfig(tp=2, cp=2, **SP)),
    Layout(name="PP2 CP2, distributed optimizer", num_ranks=4, mesh=MeshConfig(pp=2, cp=2), distributed_optimizer=True),
    Layout(name="EP2", num_ranks=2, mesh=MeshConfig(ep=2)),
    Layout(name="EP2, allgather", num_ranks=2, mesh=MeshConfig(ep=2), dispatcher="allgather"),
    Layout(name="EP4, distributed optimizer, overlapped", num_ranks=4, mesh=MeshConfig(ep=4), distributed_optimizer=True, overlap=True),
    Layout(name="EP2 CP2", num_ranks=2, mesh=MeshConfig(ep=2, cp=2)),
    Layout(name="TP2 ETP2, SP", num_ranks=2, mesh=MeshConfig(tp=2, etp=2, **SP)),
    Layout(name="TP2 EP2 ETP1, SP", num_ranks=2, mesh=MeshConfig(tp=2, ep=2, etp=1, **SP)),
    Layout(name="TP2 EP2 ETP1, SP, allgather", num_ranks=2, mesh=MeshConfig(tp=2, ep=2, etp=1, **SP), dispatcher="allgather"),
    Layout(name="TP2 EP2 ETP2, SP", num_ranks=4, mesh=MeshConfig(tp=2, ep=2, etp=2, **SP)),
    Layout(name="TP2 PP2 CP2, SP", num_ranks=8, mesh=MeshConfig(tp=2, pp=2, cp=2, **SP)),
    Layout(
        name="TP2 PP2 DP2, SP, distributed optimizer, overlapped",
        num_ranks=8,
        mesh=MeshConfig(tp=2, pp=2, **SP),
        distributed_optimizer=True,
        overlap=True,
    ),
    Layout(
        name="TP2 PP2 VPP2 CP2, SP, full recomputation, distributed optimizer",
        num_ranks=8,
        mesh=MeshConfig(tp=2, pp=2, vpp=2, cp=2, **SP),
        recompute="full",
        distributed_optimizer=True,
    ),
    Layout(
        name="PP2 VPP2 DP2 CP2, distributed optimizer, overlapped",
        num_ranks=8,
        mesh=MeshConfig(pp=2, vpp=2, cp=2),
        distributed_optimizer=True,
        overlap=True,
    ),
    Layout(name="TP2 EP2 PP2 ETP2, SP", num_ranks=8, mesh=MeshConfig(tp=2, ep=2, pp=2, etp=2, **SP)),
    Layout(
        name="TP2 EP4 ETP1 PP2 VPP2, SP, distributed optimizer",
        num_ranks=8,
        mesh=MeshConfig(tp=2, ep=4, etp=1, pp=2, vpp=2, **SP),
        distributed_optimizer=True,
    ),
    Layout(
        name="TP2 EP2 CP2 DP2, SP, allgather, selective recomputation",
        num_ranks=8,
        mesh=MeshConfig(tp=2, ep=2, etp=1, cp=2, **SP),
        dispatcher="allgather",
        recompute="selective",
        distributed_optimizer=True,
    ),
)
