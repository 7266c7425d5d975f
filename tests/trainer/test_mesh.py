"""How a mesh tells where rows go."""

import pytest

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.config import MeshConfig, ModelConfig
from tandem.engine.hf_config import qwen3_hf_config
from tandem.engine.trainer.mesh import Mesh, build_mesh
from tests.ranks import run_ranks

DENSE = qwen3_hf_config(ModelConfig(num_layers=12, num_attention_heads=16, num_key_value_heads=4, intermediate_size=64), 256)


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
