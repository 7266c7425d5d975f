"""Every setting that cannot be: a failing and a passing run for each row of the tables, proposals that mend, and nothing begun."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.architecture import Architecture
from tandem.engine.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, SFTStage
from tandem.engine.feasibility import RULES, RunCase, check_run
from tandem.engine.hf_config import qwen3_hf_config
from tandem.engine.mesh_rules import broken, check_mesh, proposals, raise_all, replaced
from tandem.engine.recipes.registry import RECIPES
from tandem.engine.recipes.toy_cpu import toy_cpu
from tandem.engine.train import train
from tests.ranks import run_ranks

SIZES: dict[str, Any] = {
    "num_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
}
ARCHITECTURES = {
    "dense": Architecture.from_hf(qwen3_hf_config(ModelConfig(**SIZES), 256)),
    "odd vocabulary": Architecture.from_hf(qwen3_hf_config(ModelConfig(**SIZES), 250)),
    "experts": Architecture.from_hf(qwen3_hf_config(ModelConfig(**SIZES, num_experts=8), 256)),
}
DENSE = ARCHITECTURES["dense"]
EXPERTS = ARCHITECTURES["experts"]
assert EXPERTS.experts is not None
ARCHITECTURES["shared experts"] = dataclasses.replace(
    EXPERTS, experts=dataclasses.replace(EXPERTS.experts, shared_intermediate_size=20, has_expert_bias=True)
)
STAGE = SFTStage(steps=1, batch_tokens=64, max_tokens=32, optimizer=OptimizerConfig())
SP = {"mesh.sequence_parallel": True}

Fields = dict[str, Any]


def case(fields: Fields, num_ranks: int = 1, model: str = "dense", longest_prompt: int | None = None, ranks_per_node: int = 0) -> RunCase:
    config = RunConfig(name="x", sft=(STAGE,))
    for name, value in fields.items():
        config = replaced(config, name, value)
    return RunCase(
        config=config,
        architecture=ARCHITECTURES[model],
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node or num_ranks,
        longest_prompt=longest_prompt,
    )


# one for every row: the case that fails, its message, and what is nearly the same and passes
FAILING: dict[str, tuple[RunCase, str, RunCase]] = {
    "ranks": (
        case({"mesh.tp": 8, "mesh.pp": 4, "mesh.cp": 2}, 48),
        "48 ranks do not hold tp=8 x pp=4 x cp=2 (64); set mesh.pp=3, or ",
        case({"mesh.tp": 8, "mesh.pp": 4, "mesh.cp": 2}, 64),
    ),
    "ranks, nothing smaller": (
        case({"mesh.tp": 2, "mesh.sequence_parallel": True}, 3),
        "3 ranks do not hold tp=2 x pp=1 x cp=1 (2); launch 4 ranks",
        case({"mesh.tp": 2, "mesh.sequence_parallel": True}, 2),
    ),
    "expert ranks": (
        case({"mesh.ep": 8}, 4, "experts"),
        "4 ranks do not hold ep=8 x etp=1 x pp=1 (8); set mesh.ep=4, or launch 8 ranks",
        case({"mesh.ep": 8}, 8, "experts"),
    ),
    "heads": (
        dataclasses.replace(case({"mesh.tp": 8}, 8), architecture=dataclasses.replace(DENSE, num_heads=12)),
        "mesh.tp=8 does not divide the model's num_attention_heads=12; set mesh.tp=4",
        case({"mesh.tp": 8}, 8),
    ),
    "key/value heads": (
        dataclasses.replace(case({"mesh.tp": 4}, 4), architecture=dataclasses.replace(DENSE, num_heads=12, num_kv_heads=6)),
        "mesh.tp=4 and the model's num_key_value_heads=6 do not divide each other",
        case({"mesh.tp": 8}, 8),  # four heads, each on two ranks
    ),
    "vocabulary": (
        case({"mesh.tp": 4}, 4, "odd vocabulary"),
        "mesh.tp=4 does not divide the model's vocab_size=250; set mesh.tp=2",
        case({"mesh.tp": 2}, 4, "odd vocabulary"),
    ),
    "feed-forward width": (
        dataclasses.replace(case({"mesh.tp": 8}, 8), architecture=dataclasses.replace(DENSE, intermediate_size=100)),
        "mesh.tp=8 does not divide the model's intermediate_size=100; set mesh.tp=4",
        case({"mesh.tp": 8}, 8),
    ),
    "shared experts' width": (
        case({"mesh.tp": 8, **SP}, 8, "shared experts"),
        "mesh.tp=8 does not divide the model's n_shared_experts * moe_intermediate_size=20; set mesh.tp=4",
        case({"mesh.tp": 4, **SP}, 8, "shared experts"),
    ),
    "expert's width": (
        case({"mesh.tp": 1, "mesh.ep": 2, "mesh.etp": 5}, 20, "experts"),
        "mesh.etp=5 does not divide the model's moe_intermediate_size=48; set mesh.etp=2",
        case({"mesh.tp": 1, "mesh.ep": 2, "mesh.etp": 2}, 20, "experts"),
    ),
    "more stages than layers": (
        case({"mesh.pp": 8, "mesh.vpp": 2}, 8),
        "mesh.pp=8 x mesh.vpp=2 is more stages than the model's num_hidden_layers=12",
        case({"mesh.pp": 6, "mesh.vpp": 2}, 6),
    ),
    "layers": (
        case({"mesh.pp": 2, "mesh.vpp": 4}, 2),
        "mesh.pp=2 x mesh.vpp=4 does not divide the model's num_hidden_layers=12; set mesh.vpp=3",
        case({"mesh.pp": 2, "mesh.vpp": 3}, 2),
    ),
    "interleaved without stages": (
        case({"mesh.vpp": 2}, 2),
        "mesh.vpp is 2; it needs mesh.pp > 1 (pp is 1); set mesh.vpp=1, or set mesh.pp=2",
        case({"mesh.vpp": 2, "mesh.pp": 2}, 2),
    ),
    "sequence parallelism alone": (
        case(SP),
        "mesh.sequence_parallel is True; it needs mesh.tp > 1 (tp is 1); set mesh.sequence_parallel=False",
        case({"mesh.tp": 2, **SP}, 2),
    ),
    "expert axes of a dense model": (
        case({"mesh.ep": 2}, 2),
        "mesh.ep=2, mesh.etp=None, but qwen3 has no experts; set mesh.ep=1",
        case({"mesh.ep": 2}, 2, "experts"),
    ),
    "experts": (
        case({"mesh.ep": 3}, 3, "experts"),
        "mesh.ep=3 does not divide the model's num_experts=8; set mesh.ep=1",
        case({"mesh.ep": 4}, 4, "experts"),
    ),
    "replicated experts split otherwise": (
        case({"mesh.tp": 2, "mesh.etp": 1, **SP}, 2, "experts"),
        "mesh.etp=1 with mesh.ep=1 and mesh.tp=2: Megatron reduces",
        case({"mesh.tp": 2, "mesh.etp": 2, **SP}, 2, "experts"),
    ),
    "experts without sequence parallelism": (
        case({"mesh.tp": 2}, 2, "experts"),
        "mesh.tp=2 with num_experts=8 needs mesh.sequence_parallel=True",
        case({"mesh.tp": 2, **SP}, 2, "experts"),
    ),
    "engine across nodes": (
        case({"rollout.tp": 3}, 8, ranks_per_node=4),
        "rollout.tp is 3; it must divide the ranks of a node (4), because an engine lies within one; set rollout.tp=2",
        case({"rollout.tp": 4}, 8, ranks_per_node=4),
    ),
    "budget of less than the engines": (
        case({"rollout.token_budget": 3}, 4),
        "rollout.token_budget is 3; each of the 4 rollout engines needs at least one token of it; set rollout.token_budget=512",
        case({"rollout.token_budget": 3, "rollout.tp": 2}, 4),
    ),
    "response as long as the context": (
        case({"rollout.max_response_tokens": 256}),
        "rollout.max_response_tokens is 256; it must be less than model.context_length (256)",
        case({"rollout.max_response_tokens": 255}),
    ),
    "response and longest prompt": (
        case({"rollout.max_response_tokens": 200}, longest_prompt=57),
        "rollout.max_response_tokens is 200; with the longest prompt (57 tokens) it must fit into model.context_length (256); "
        "set model.context_length=257, or set rollout.max_response_tokens=199",
        case({"rollout.max_response_tokens": 200}, longest_prompt=56),
    ),
    "longer than the model": (
        case({"model.path": "somewhere", "model.context_length": 300, "rollout.max_response_tokens": 100}),
        "model.context_length is 300; it must not exceed max_position_embeddings (256) of somewhere; set model.context_length=256",
        case({"model.path": "somewhere", "model.context_length": 256}),
    ),
    "update of more than is in flight": (
        case({"replay.groups_per_update": 9, "sampling.groups_in_flight": 8}),
        "replay.groups_per_update is 9; it must not exceed sampling.groups_in_flight (8); set replay.groups_per_update=8, or "
        "set sampling.groups_in_flight=9",
        case({"replay.groups_per_update": 8, "sampling.groups_in_flight": 8}),
    ),
    "supervised batch of less than an example": (
        case({"sft": (STAGE, dataclasses.replace(STAGE, batch_tokens=16))}),
        "sft[1].batch_tokens is 16; an example of sft[1].max_tokens (32) must fit into it; set sft[1].batch_tokens=32",
        case({"sft": (STAGE, STAGE)}),
    ),
    "length reward of rest": (
        case({"loss.variant": "rest", "length_penalty.weight": 0.5}),
        "length_penalty.weight is 0.5; loss.variant=rest fits correct responses as they are and would ignore it; "
        "set length_penalty.weight=0.0",
        case({"loss.variant": "rest"}),
    ),
    "repetition penalty of rest": (
        case({"loss.variant": "rest", "reward.repetition_penalty": 0.25}),
        "reward.repetition_penalty is 0.25; loss.variant=rest fits correct responses as they are and would ignore it",
        case({"loss.variant": "grpo", "reward.repetition_penalty": 0.25}),
    ),
    "over-budget penalty of rest": (
        case({"loss.variant": "rest", "reward.over_budget_penalty": 0.5}),
        "reward.over_budget_penalty is 0.5; loss.variant=rest fits correct responses as they are and would ignore it",
        case({"loss.variant": "grpo", "reward.over_budget_penalty": 0.5}),
    ),
    "format penalty of rest": (
        case({"loss.variant": "rest", "reward.format_markers": ("x",), "reward.format_penalty": 0.5}),
        "reward.format_penalty is 0.5; loss.variant=rest fits correct responses as they are and would ignore it",
        case({"loss.variant": "grpo", "reward.format_markers": ("x",), "reward.format_penalty": 0.5}),
    ),
    "pulled back to old policies": (
        case({"loss.stale_segments": "train", "loss.reference": "rollout", "rollout.token_budget": 1000}),
        "loss.stale_segments='train' with loss.reference='rollout'",
        case({"loss.stale_segments": "train", "loss.reference": "rollout"}),  # without a budget no response outlives its iteration
    ),
    "more ranks than heads": (
        case({"trainer.cp_attention": "ulysses", "mesh.tp": 2, "mesh.cp": 4}, 8),
        "trainer.cp_attention='ulysses' with mesh.tp=2 x mesh.cp=4 (8) needs a multiple of that many key/value heads; the model has 4; "
        "set trainer.cp_attention='all_gather'",
        case({"trainer.cp_attention": "ulysses", "mesh.tp": 2, "mesh.cp": 2}, 4),
    ),
    "context-parallel attention of one rank": (
        case({"trainer.cp_attention": "all_gather"}),
        "trainer.cp_attention is 'all_gather'; it needs mesh.cp > 1; set trainer.cp_attention='auto'",
        case({"trainer.cp_attention": "all_gather", "mesh.cp": 2}, 2),
    ),
    "nobody to share a prompt with": (
        case({"trainer.share_prompts": "always", "sampling.num_samples": 1}),
        "trainer.share_prompts is 'always'; it needs sampling.num_samples > 1 (it is 1)",
        case({"trainer.share_prompts": "never", "sampling.num_samples": 1}),
    ),
    "balance loss of a dense model": (
        case({"trainer.moe_aux_loss_coef": 0.1}),
        "trainer.moe_aux_loss_coef is 0.1; it needs a model with experts; set trainer.moe_aux_loss_coef=0.0",
        case({"trainer.moe_aux_loss_coef": 0.1}, model="experts"),
    ),
    "routing of a dense model": (
        case({"trainer.replay_routing": True}),
        "trainer.replay_routing is True; it needs a model with experts",
        case({"trainer.replay_routing": True, "rollout.record_routing": True}, model="experts"),
    ),
    "recording of a dense model": (
        case({"rollout.record_routing": True}),
        "rollout.record_routing is True; it needs a model with experts; set rollout.record_routing=False",
        case({"rollout.record_routing": True}, model="experts"),
    ),
    "blocks that an engine would cut": (
        case({"rollout.engine": "sglang", "rollout.quantization": "block_fp8"}),
        "is no multiple of 128: SGLang cuts or joins that projection there; set rollout.quantization=None",
        case({"rollout.engine": "sglang"}),
    ),
    "replay of nothing": (
        case({"trainer.replay_routing": True}, model="experts"),
        "so there is nothing to replay; set rollout.record_routing=True, or set trainer.replay_routing=False",
        case({"rollout.record_routing": True}, model="experts"),
    ),
    "expert bias that the model lacks": (
        case({"trainer.moe_bias_update_rate": 0.001}, model="experts"),
        "trainer.moe_bias_update_rate is 0.001; it needs a model whose router has an expert bias",
        case({"trainer.moe_bias_update_rate": 0.001}, model="shared experts"),
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_cannot_be_is_named_with_its_values_and_a_way_out(name: str) -> None:
    failing, message, passing = FAILING[name]
    told = broken(RULES, failing)
    assert len(told) == 1, told
    assert message in told[0]
    (rule,) = [rule for rule in RULES if not rule.holds(failing)]
    assert all(field.split(".")[-1] in told[0] for field in rule.fields)
    assert broken(RULES, passing) == []


@pytest.mark.parametrize("name", FAILING)
def test_every_proposal_mends_the_run(name: str) -> None:
    failing, _, _ = FAILING[name]
    (rule,) = [rule for rule in RULES if not rule.holds(failing)]
    found = proposals(RULES, rule, failing)
    assert found, "a message without a way out"
    for changes in found:
        assert broken(RULES, failing.changed(changes)) == [], changes
        assert {re.sub(r"\[\d+\]", "", field) for field in changes} <= {*rule.fields, "ranks"}


def test_every_row_has_a_case() -> None:
    covered = {id(rule) for failing, _, _ in FAILING.values() for rule in RULES if not rule.holds(failing)}
    assert [rule.fields for rule in RULES if id(rule) not in covered] == []


def test_all_that_is_wrong_is_told_at_once() -> None:
    bad = case(
        {"mesh.tp": 8, "mesh.pp": 5, "rollout.token_budget": 3, "replay.groups_per_update": 90, "rollout.max_response_tokens": 300}, 48
    )
    told = broken(RULES, bad)
    assert [re.split(r"[ ;]", text)[0] for text in told] == [
        "48",
        "mesh.pp=5",
        "rollout.token_budget",
        "rollout.max_response_tokens",
        "replay.groups_per_update",
    ]
    with pytest.raises(ValueError, match=re.escape("5 things cannot be as they are:\n  1. 48 ranks do not hold")):
        raise_all(told)


def test_the_trainer_refuses_a_mesh_by_the_same_rows() -> None:
    with pytest.raises(ValueError, match=re.escape("3 ranks do not hold tp=2 x pp=1 x cp=1 (2); set mesh.tp=1, or launch 4 ranks")):
        check_mesh(MeshConfig(tp=2), DENSE, 3)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_recipes_can_be_run_as_they_are(recipe: Any) -> None:
    config = recipe()
    if config.model.path is None:
        check_run(config, num_ranks=2, ranks_per_node=2)


WRONG = ("--replay.groups_per_update", "1000", "--mesh.pp", "3", "--rollout.max_response_tokens", "160")


@pytest.mark.parametrize("launcher", ["two ranks", "torchrun"])
def test_a_run_that_cannot_be_ends_before_anything_is_started_or_written(launcher: str, tmp_path: Path) -> None:
    """Under torchrun the ranks find it themselves; with --nproc the process that would start them does."""
    started = tmp_path / "started"
    # A process that the run starts imports this first.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nopen({str(started)!r}, 'a').write(' '.join(sys.orig_argv) + '\\n')\n")
    head = ["tandem.engine.cli", "train", "toy_cpu", "--nproc", "2"] if launcher == "two ranks" else ["tandem.engine.train", "toy_cpu"]
    command = [sys.executable, "-m", *head, "--run_dir", str(tmp_path / "run"), *WRONG]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    if launcher == "torchrun":  # as torchrun starts one of two ranks; nobody listens at the address, so meeting the other would hang
        environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "error: " in ended.stderr
    assert "Traceback" not in ended.stderr
    for part in ("mesh.pp=3", "num_hidden_layers=4", "groups_per_update is 1000", "max_response_tokens is 160"):
        assert part in ended.stderr
    assert len([line for line in started.read_text().splitlines() if "tandem" in line]) == 1, "the run itself, and nothing that it started"
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_prompts_that_leave_no_room_end_the_run_before_it_writes_its_configuration(tmp_path: Path) -> None:
    """A config.json of a run that cannot be would keep the folder from the corrected one."""
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text(json.dumps({"question": "1+" * 60 + "1?", "answer": "1"}) + "\n")
    data = DataConfig(prompts=str(prompts), long_prompts="skip")
    with pytest.raises(RuntimeError, match=r"max_response_tokens is 112; with the longest prompt \(12\d tokens\) it must fit into"):
        run_ranks(train, 1, dataclasses.replace(toy_cpu(), run_dir=str(folder), data=data))
    assert not (folder / "config.json").exists()
    assert not (folder / "data").exists()
