"""The trainer's guards and what it reports; that it computes what Hugging Face computes is in test_layouts.py."""

from typing import Any

import pytest

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer import megatron
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tests.ranks import run_ranks
from tests.trainer.compare import Findings, combine, compare
from tests.trainer.layouts import Layout
from tests.trainer.reference import CROSS_ENTROPY, Reference, make_reference

INTERLEAVED = Layout(name="PP2 VPP2", num_ranks=2, mesh=MeshConfig(pp=2, vpp=2))


def _together() -> None:
    """From here on the trainer's stages send and receive in one."""
    build_config = megatron.transformer_config

    def with_batched_sends(*args: Any, **kwargs: Any) -> Any:
        config = build_config(*args, **kwargs)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    megatron.transformer_config = with_batched_sends


def _refused(reference: Reference) -> str:
    _together()
    mesh = build_mesh(INTERLEAVED.mesh, reference.hf_config)
    try:
        MegatronTrainer(reference.hf_config, mesh, TrainerConfig(), LossConfig(), 1.0, 1)
    except ValueError as error:
        return str(error)
    return ""


def _unguarded(reference: Reference) -> Findings:
    _together()
    megatron.check_schedule = lambda _: None
    return compare(INTERLEAVED, reference, [CROSS_ENTROPY])


@pytest.mark.distributed
def test_two_interleaved_stages_that_would_train_wrongly_are_refused() -> None:
    reference = make_reference("qwen3", losses={CROSS_ENTROPY: None})
    for message in run_ranks(_refused, 2, reference):
        assert message.startswith("overlap_p2p_comm is False with pp=2 and vpp=2: gradients would be wrong; set it to True")
    errors = combine(run_ranks(_unguarded, 2, reference), reference)
    assert errors.gradient > 1.0  # they are: the guard can go with the megatron-core for which this fails
    assert errors.logprobs < 1e-5  # though nothing is to be seen in a forward pass
