"""Hugging Face folders and run checkpoints, with the real trainer and with transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.checkpoint import hf_folder as hf_folder_module
from tandem.engine.checkpoint import safetensors_folder
from tandem.engine.checkpoint.disk import STATE, find_damage, find_latest, load_latest
from tandem.engine.checkpoint.hf_folder import export_hf, load_hf_weights, read_hf_config, read_stop_token_ids, write_model
from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.stored import stored_weights
from tandem.engine.types import WeightShard
from tests.checkpoint.test_names import DENSE, megatron_shards, random_hf_state
from tests.ranks import run_ranks
from tests.trainer.families import hf_model


def hf_folder(folder: Path, family: str) -> Path:
    """A tiny random model as transformers saves it."""
    hf_model(family).save_pretrained(folder, max_shard_size="40KB")
    return folder


def build_trainer(folder: Path, mesh: MeshConfig) -> MegatronTrainer:
    config = read_hf_config(folder)
    return MegatronTrainer(config, build_mesh(mesh, config), TrainerConfig(), LossConfig(), 1.0, None)


def import_and_export(source: Path, target: Path, mesh: MeshConfig) -> None:
    """A few rows at a time, even of these tensors. A checkpoint lies beside the target."""
    hf_folder_module.BAND_BYTES, safetensors_folder.READ_BYTES = 1500, 700
    trainer = build_trainer(source, mesh)
    load_hf_weights(source, trainer)
    tokenizer = source / "tokenizer.json"
    export_hf(trainer, target, max_shard_bytes=40_000, extra_files=[tokenizer])
    with pytest.raises(ValueError, match="exists"):
        export_hf(trainer, target)
    CheckpointSaver(target.with_suffix(".saved"), keep=1, asynchronous=False).save(1, trainer.sharded_state_dict())


def export_stored(source: Path, target: Path, checkpoints: Path) -> None:
    """What `tandem export` does with a checkpoint, whatever layout saved it."""
    hf_folder_module.BAND_BYTES = 1500
    hf_config, found = read_hf_config(source), find_latest(checkpoints)
    assert found is not None
    weights = stored_weights(hf_config, build_mesh(MeshConfig(), hf_config), TrainerConfig(), found[1] / STATE)
    write_model(hf_config, torch.float32, weights, target, max_shard_bytes=40_000)
    with pytest.raises(ValueError, match="exists"):
        write_model(hf_config, torch.float32, weights, target)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


LAYOUTS = {
    "qwen3": MeshConfig(tp=2),
    "qwen3, tied": MeshConfig(pp=2),
    "qwen3_moe": MeshConfig(tp=2, sequence_parallel=True, ep=2),
    "llama": MeshConfig(tp=2, sequence_parallel=True),
    "llama, tied": MeshConfig(pp=2, vpp=2),
    "qwen2": MeshConfig(tp=2),
    "deepseek_v3": MeshConfig(ep=2),
    "moonlight": MeshConfig(pp=2),
}


@pytest.mark.distributed
@pytest.mark.parametrize("family", LAYOUTS)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, family: str):
    source = hf_folder(tmp_path / "source", family)
    (source / "tokenizer.json").write_text("{}")
    target, stored = tmp_path / "target", tmp_path / "stored"
    run_ranks(import_and_export, 2, source, target, LAYOUTS[family])
    run_ranks(export_stored, 1, source, stored, tmp_path / "target.saved")
    assert (target / "tokenizer.json").read_text() == "{}"
    before = tensors_of(source)
    for folder in (target, stored):
        after = tensors_of(folder)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert len(list(folder.glob("*.safetensors"))) > 1
    assert not list(tmp_path.glob("*.partial"))


# In a process of its own: Megatron's CPU shim patches torch.
COMPARE_LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(1, 33).view(2, 16)
for i in range(1, len(sys.argv), 2):
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval()(tokens).logits for f in sys.argv[i : i + 2])
    assert a.std() > 0.01
    # mapped weights lie elsewhere in their files, and matrix kernels choose by alignment: some units in the last place
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.distributed
def test_transformers_loads_an_export_and_computes_the_same_logits(tmp_path: Path):
    folders = []
    for family in ("qwen3_moe", "llama, tied", "qwen2", "deepseek_v3"):
        source, target = hf_folder(tmp_path / family, family), tmp_path / f"{family}_out"
        (source / "tokenizer.json").write_text("{}")
        run_ranks(import_and_export, 2, source, target, LAYOUTS[family])
        folders += [source, target]
    subprocess.run([sys.executable, "-c", COMPARE_LOGITS, *map(str, folders)], check=True)


class OneRank:
    """The whole model in one process, cut by hand."""

    def __init__(self) -> None:
        self.hf_config = DENSE
        self.shards = megatron_shards(DENSE, random_hf_state(DENSE, seed=0), 1, 1, 1, 1)[0]

    def weight_shards(self) -> list[WeightShard]:
        return self.shards

    def weights_changed(self) -> None: ...


def broken(folder: Path, how: str) -> None:
    state = random_hf_state(DENSE, seed=0)
    (folder / "config.json").write_text(json.dumps(DENSE))
    if how == "missing":
        del state["model.norm.weight"]
    elif how == "unexpected":
        state["model.extra.weight"] = torch.zeros(1)
    elif how == "shape":
        state["model.norm.weight"] = torch.zeros(25)
    if how != "no weights":
        save_file(state, folder / "model.safetensors")
    if how == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    if how == "shard":
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "lacks 1 tensors .*model.norm.weight"),
        ("unexpected", "has unexpected 1 tensors .*model.extra.weight"),
        ("shape", r"model.norm.weight has shape \(25,\); config.json needs \(24,\)"),
        ("no weights", r"has no weights; looked for model.safetensors.index.json and \*.safetensors"),
        ("truncated", "is not a safetensors file"),
        ("shard", "lacks model-00001-of-00002.safetensors, which model.safetensors.index.json names"),
    ],
)
def test_a_broken_model_folder_is_a_clear_error(tmp_path: Path, how: str, message: str):
    broken(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        load_hf_weights(tmp_path, OneRank())


def test_a_folder_that_is_no_model_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is not a folder; a model folder holds config.json"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"it has no config.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no model_type"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2", "n_embd": 8}, r"config.json: model_type is 'gpt2'; known are qwen3, qwen3_moe"),
        (
            {name: value for name, value in DENSE.items() if name != "hidden_size"},
            r"config.json: the config of the qwen3 model lacks hidden_size",
        ),
    ],
    ids=["family", "size"],
)
def test_a_model_of_another_family_or_without_a_field_is_named(tmp_path: Path, config: dict[str, Any], message: str):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_hf_config(tmp_path)


def test_stop_tokens_are_those_of_both_configs(tmp_path: Path):
    for config, generation_config, wanted in (
        ({}, None, ()),
        ({"eos_token_id": 0}, None, (0,)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 3]}, (3, 5, 7)),
        ({"eos_token_id": [9, 2]}, {"eos_token_id": 4}, (2, 4, 9)),
        ({"eos_token_id": None}, {"temperature": 0.6}, ()),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation_config is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
        assert read_stop_token_ids(tmp_path) == wanted
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is '</s>'; it must be a token id or a list"):
        read_stop_token_ids(tmp_path)


def save_steps(source: Path, folder: Path, mesh: MeshConfig, steps: list[int], keep: int = 2) -> list[int | None]:
    """Save one checkpoint per step, whose final norm is the step."""
    saver = CheckpointSaver(folder, keep=keep, asynchronous=False)
    trainer = build_trainer(source, mesh)
    load_hf_weights(source, trainer)
    oldest = []
    for step in steps:
        for weight in trainer.weight_shards():
            if weight.name == "decoder.final_layernorm.weight":
                weight.tensor.data.fill_(step)
        trainer.weights_changed()
        extra = {"rank": dist.get_rank(), "seen": {7: [0.5, "a"]}} if dist.get_rank() == 0 else None
        saver.save(step, trainer.sharded_state_dict(), extra)
        oldest.append(saver.poll())
    return oldest


def load_step(source: Path, folder: Path, mesh: MeshConfig) -> tuple[int, Any, dict[str, torch.Tensor]] | None:
    trainer = build_trainer(source, mesh)
    found = load_latest(folder, lambda: trainer.sharded_state_dict())
    if found is None:
        return None
    trainer.load_sharded(found.state)
    return found.step, found.extra, {shard.name: shard.tensor.detach().clone() for shard in trainer.weight_shards()}


@pytest.mark.distributed
def test_the_newest_whole_checkpoint_is_loaded_on_another_layout(tmp_path: Path):
    source, folder = hf_folder(tmp_path / "source", "qwen3"), tmp_path / "checkpoints"
    assert run_ranks(load_step, 1, source, folder, MeshConfig()) == [None]
    assert run_ranks(save_steps, 2, source, folder, MeshConfig(tp=2), [1, 2, 3]) == [[1, 1, 2]] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000003"]

    ((step, extra, weights),) = run_ranks(load_step, 1, source, folder, MeshConfig())
    assert step == 3
    assert extra == {"rank": 0, "seen": {7: [0.5, "a"]}}
    assert (weights["decoder.final_layernorm.weight"] == 3).all()
    assert torch.equal(weights["embedding.word_embeddings.weight"], tensors_of(source)["model.embed_tokens.weight"])

    # killed while writing: a folder without its name, and one whose marker lacks
    shutil.copytree(folder / "step_00000003", folder / "partial_00000004")
    shutil.copytree(folder / "step_00000003", folder / "step_00000005")
    (folder / "step_00000005" / "complete.json").unlink()

    # a flipped bit
    flip_a_bit(folder / "step_00000003")
    assert "another checksum" in find_damage(folder / "step_00000003")
    step, extra, weights = run_ranks(load_step, 2, source, folder, MeshConfig(pp=2))[1]
    assert (step, extra) == (2, None)
    assert (weights["decoder.final_layernorm.weight"] == 2).all()
    names = ["damaged_step_00000003", "damaged_step_00000005", "partial_00000004", "step_00000002"]
    assert sorted(path.name for path in folder.iterdir()) == names

    # a damaged one is not counted among the kept
    assert run_ranks(save_steps, 1, source, folder, MeshConfig(), [4], 1) == [[4]]
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000004"]


def flip_a_bit(checkpoint: Path) -> None:
    victim = max((checkpoint / "state").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def not_loaded() -> dict[str, Any]:
    raise AssertionError("there is nothing to load")


def load_nothing(folder: Path) -> str:
    with pytest.raises(ValueError, match="is whole") as error:
        load_latest(folder, not_loaded)
    return str(error.value)


@pytest.mark.distributed
def test_checkpoints_of_which_none_is_whole_are_an_error_on_every_rank(tmp_path: Path):
    for name in ("step_00000001", "step_00000002", "damaged_step_00000003"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000001" / "complete.json").write_text(json.dumps({"files": {"state.bin": {"bytes": 8, "xxh3": "0"}}}))
    for _ in range(2):  # the second start says the same as the first
        first, second = run_ranks(load_nothing, 2, tmp_path)
        assert first == second
        assert f"no checkpoint in {tmp_path} is whole: step_00000002 (complete.json: " in first
        assert "; step_00000001 (state.bin is missing); damaged_step_00000003; " in first
        assert first.endswith("delete the folder to start anew")


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_lost_file_is_found(tmp_path: Path, damage: str):
    file = tmp_path / "state.bin"
    file.write_bytes(b"12345678")
    (tmp_path / "complete.json").write_text(json.dumps({"files": {"state.bin": {"bytes": 8, "xxh3": "0"}}}))
    if damage == "truncate":
        file.write_bytes(b"1234")
        assert find_damage(tmp_path) == "state.bin has 4 bytes; 8 were written"
    else:
        file.unlink()
        assert find_damage(tmp_path) == "state.bin is missing"
