"""The loop on a model folder of every kind: swap into the engine, rollout, training under a layout, checkpoint, resume."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tandem.engine.config import (
    CheckpointConfig,
    EvaluationConfig,
    LengthPenaltyConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainerConfig,
)
from tandem.engine.data.tokenizer import load_tokenizer, padded_vocab_size
from tandem.engine.log import read_metrics
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.small_toy import export, small_toy
from tests.trainer.families import hf_model

pytestmark = pytest.mark.distributed

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
ROUTED: dict[str, Any] = {"replay_routing": True, "moe_aux_loss_coef": 0.01}


def model_folder(folder: Path, family: str, dtype: torch.dtype) -> Path:
    """A random model with the project's own tokenizer."""
    tokenizer = load_tokenizer(None)
    torch.manual_seed(0)
    model = hf_model(family, vocab_size=padded_vocab_size(tokenizer))
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_run(tmp_path: Path, model: Path, *, mesh: MeshConfig, trainer: TrainerConfig, rollout: RolloutConfig) -> RunConfig:
    """Answers of a random model are wrong; the length reward tells those apart that happen to end."""
    return small_toy(
        tmp_path / "run",
        steps=2,
        sft=(),
        model=ModelConfig(path=str(model), context_length=64),
        mesh=mesh,
        trainer=trainer,
        rollout=rollout,
        sampling=SamplingConfig(groups_in_flight=8, num_samples=8),
        replay=ReplayConfig(groups_per_update=8),
        length_penalty=LengthPenaltyConfig(weight=1.0),
        evaluation=EvaluationConfig(every=0, max_prompts=2),
        checkpoint=CheckpointConfig(every=1, keep=3),
    )


@pytest.mark.parametrize(
    ("family", "mesh", "options", "tp"),
    [
        ("deepseek_v3", MeshConfig(ep=2), ROUTED | {"moe_bias_update_rate": 0.001}, 1),
        pytest.param("qwen3_moe", MeshConfig(tp=2, sequence_parallel=True, ep=2), ROUTED, 2, marks=pytest.mark.slow),
        pytest.param("qwen2", MeshConfig(tp=2, sequence_parallel=True), {}, 2, marks=pytest.mark.slow),
        pytest.param("llama, tied", MeshConfig(pp=2), {}, 1, marks=pytest.mark.slow),
    ],
    ids=["deepseek_v3 ep2", "qwen3_moe tp2 ep2", "qwen2 tp2", "llama pp2"],
)
def test_a_family_goes_through_the_loop_and_on_from_its_checkpoint(
    family: str, mesh: MeshConfig, options: dict[str, Any], tp: int, tmp_path: Path
) -> None:
    """Always the one that has most to lose; tests/test_train.py has the others' layouts with Qwen3."""
    folder = model_folder(tmp_path / "model", family, torch.float32)
    trainer = TrainerConfig(updates_per_iteration=2, optimizer=OptimizerConfig(lr=1e-3), **options)
    rollout = RolloutConfig(max_response_tokens=44, tp=tp, record_routing="replay_routing" in options)
    config = small_run(tmp_path, folder, mesh=mesh, trainer=trainer, rollout=rollout)
    run_ranks(train, 2, config)
    run_ranks(train, 2, dataclasses.replace(config, steps=3))
    steps = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2]
    assert all(line["train/grad_norm"] > 0 for line in steps)
    assert max(line["train/logprob_diff_max"] for line in steps) < 1e-5
    export_folder = tmp_path / "exported"
    export(tmp_path / "run", export_folder)
    before, after = (load_file(next(iter(path.glob("*.safetensors")))) for path in (folder, export_folder))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if options.get("moe_bias_update_rate"):
        moved = (after[BIAS] - before[BIAS]).abs().max().item()
        assert 0 < moved <= 6 * 0.001 + 1e-6, "at most the rate per update, two of them in each of three iterations"


def test_expert_biases_stay_in_fp32_through_a_bf16_run(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "deepseek_v3", torch.bfloat16)
    trainer = TrainerConfig(dtype="bfloat16", optimizer=OptimizerConfig(lr=1e-3))
    config = small_run(tmp_path, folder, mesh=MeshConfig(), trainer=trainer, rollout=RolloutConfig(max_response_tokens=44))
    run_ranks(train, 2, config)  # one thread each: a forked rank must not use threads that its parent has started
    export(tmp_path / "run", tmp_path / "exported")
    tensors = load_file(next(iter((tmp_path / "exported").glob("*.safetensors"))))
    assert tensors[BIAS].dtype == torch.float32
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (
        max(line["train/logprob_diff_mean"] for line in read_metrics(tmp_path / "run") if "train/loss" in line) < 0.1
    )  # a rounding may send a token elsewhere
