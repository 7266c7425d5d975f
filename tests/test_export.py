"""Export: what transformers loads is what the run trained."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.engine import cli
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.checkpoint.plan import Region
from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.config import MeshConfig, ModelConfig, RunConfig
from tandem.engine.data.tokenizer import load_tokenizer, padded_vocab_size
from tandem.engine.hf_config import qwen3_hf_config
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh, destroy_mesh
from tests.ranks import run_ranks

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=48)
MOE = dataclasses.replace(MODEL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=False)
CONFIG = RunConfig(name="small", model=MODEL, mesh=MeshConfig(tp=2))


def save_run(run_dir: Path, config: RunConfig) -> list[tuple[tuple[str, Region], torch.Tensor]]:
    """A checkpoint of random weights. Returns what this rank holds, by Hugging Face name and region."""
    hf_config = qwen3_hf_config(config.model, padded_vocab_size(load_tokenizer(None)))
    mesh = build_mesh(config.mesh, hf_config)
    trainer = MegatronTrainer(hf_config, mesh, config.trainer, loss=config.loss, temperature=1.0, seed=3)
    shards = trainer.weight_shards()
    for shard in shards:
        if shard.tensor.dim() == 1:  # norms start as ones, which would hide that they were not loaded
            shard.tensor.mul_(torch.linspace(0.5, 2.0, len(shard.tensor)))
    trainer.weights_changed()
    CheckpointSaver(run_dir / "checkpoints", keep=1, asynchronous=False).save(7, trainer.sharded_state_dict())
    held = []
    for view in (view for shard in shards for view in NameMap(hf_config).views(shard)):
        part = torch.empty([stop - start for start, stop in view.region])
        view.copy_to(part)
        held.append(((view.name, view.region), part))
    dist.barrier()
    destroy_mesh()
    return held


def write_config(run_dir: Path, config: RunConfig) -> None:
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(config.to_dict()))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(CONFIG, model=MOE, mesh=MeshConfig(ep=2))],
    ids=["dense tp2", "moe ep2"],
)
def test_transformers_loads_bit_for_bit_what_two_ranks_saved(tmp_path: Path, config: RunConfig) -> None:
    run_dir, to = tmp_path / "run", tmp_path / "model"
    write_config(run_dir, config)
    held = [part for rank in run_ranks(save_run, 2, run_dir, config) for part in rank]
    (run_dir / "checkpoints" / "step_00000009").mkdir()  # one that a run beside it would be writing or removing
    command = [sys.executable, "-m", "tandem.engine.cli", "export", str(run_dir), "--to", str(to)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "after 7 iterations" in done.stdout
    assert (run_dir / "checkpoints" / "step_00000009").is_dir()

    written = {name: tensor for file in to.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {name for (name, _), _ in held} == written.keys()
    covered = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in written.items()}
    for (name, region), part in held:
        where = tuple(slice(*bounds) for bounds in region)
        assert torch.equal(written[name][where], part), name
        covered[name][where] = True
    assert all(mask.all() for mask in covered.values())

    model, tokenizer = AutoModelForCausalLM.from_pretrained(to), AutoTokenizer.from_pretrained(to)
    assert torch.equal(model.model.norm.weight, written["model.norm.weight"])
    assert tokenizer.decode(tokenizer.encode("1+1?", add_special_tokens=False)) == "1+1?"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.distributed
def test_end_tokens_that_only_the_generation_config_names_are_kept(tmp_path: Path) -> None:
    source, run_dir, to = tmp_path / "source", tmp_path / "run", tmp_path / "model"
    tokenizer = load_tokenizer(None)
    tokenizer.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(qwen3_hf_config(MODEL, padded_vocab_size(tokenizer))))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, path=str(source)), mesh=MeshConfig())
    write_config(run_dir, config)
    run_ranks(save_run, 1, run_dir, config)
    command = [sys.executable, "-m", "tandem.engine.cli", "export", str(run_dir), "--to", str(to)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=240, check=True)
    assert json.loads((to / "config.json").read_text())["eos_token_id"] == [5, 7]
    assert (to / "generation_config.json").read_text() == (source / "generation_config.json").read_text()


def test_a_folder_that_is_no_run_and_a_target_that_exists_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prepare, message in ((False, "is no run folder"), (True, "exists; give a folder that does not")):
        if prepare:
            (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", str(tmp_path), "--to", str(tmp_path)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
