"""Which meshes are refused, and how a mesh tells where rows go."""

import re

import pytest

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.config import MeshConfig, ModelConfig
from tandem.engine.trainer.layers import qwen3_hf_config
from tandem.engine.trainer.mesh import Mesh, build_mesh, check_mesh
from tests.ranks import run_ranks

DENSE = qwen3_hf_config(ModelConfig(num_layers=12, num_attention_heads=16, num_key_value_heads=4, intermediate_size=64), 256)
MOE = qwen3_hf_config(ModelConfig(num_layers=12, num_attention_heads=16, num_key_value_heads=4, intermediate_size=64, num_experts=8), 256)


@pytest.mark.parametrize(
    ("mesh", "hf_config", "num_ranks", "message"),
    [
        (
            MeshConfig(tp=8, pp=4, cp=2),
            DENSE,
            48,
            "48 ranks do not hold tp=8 x pp=4 x cp=2 (64); set mesh.pp=3 (dp=1), or launch a multiple of 64",
        ),
        (MeshConfig(tp=3), DENSE, 3, "mesh.tp=3 does not divide the model's num_attention_heads=16"),
        (MeshConfig(pp=5), DENSE, 5, "mesh.pp=5 x mesh.vpp=1 does not divide the model's num_hidden_layers=12"),
        (MeshConfig(ep=2), DENSE, 2, "qwen3 has no experts"),
        (MeshConfig(ep=3), MOE, 3, "mesh.ep=3 does not divide the model's num_experts=8"),
        (MeshConfig(ep=8), MOE, 4, "4 ranks do not hold ep=8 x etp=1 x pp=1 (8); set mesh.ep to a divisor of 4"),
        (MeshConfig(tp=2), MOE, 2, "needs mesh.sequence_parallel=True"),
        (MeshConfig(tp=2, etp=1, sequence_parallel=True), MOE, 2, "set mesh.etp=2, or mesh.ep above 1"),
    ],
)
def test_an_impossible_mesh_names_fields_values_and_a_way_out(
    mesh: MeshConfig, hf_config: dict[str, object], num_ranks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_mesh(mesh, hf_config, num_ranks)


def _mesh(config: MeshConfig) -> Mesh:
    return build_mesh(config, DENSE)


@pytest.mark.distributed
def test_every_rank_knows_the_data_parallel_index_of_all() -> None:
    meshes = run_ranks(_mesh, 4, MeshConfig(tp=2))
    assert [mesh.dp_rank_of for mesh in meshes] == [(0, 0, 1, 1)] * 4
    assert [mesh.tp_rank for mesh in meshes] == [0, 1, 0, 1]
    assert {mesh.dp_size for mesh in meshes} == {2}


@pytest.mark.distributed
def test_context_parallel_ranks_share_a_data_parallel_index() -> None:
    assert run_ranks(_mesh, 4, MeshConfig(cp=2))[0].dp_rank_of == (0, 0, 1, 1)
