"""Export: what transformers loads is what the run trained."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.engine import cli
from tandem.engine.checkpoint.disk import save_checkpoint
from tandem.engine.config import MeshConfig, ModelConfig, RunConfig
from tandem.engine.data.tokenizer import load_tokenizer, padded_vocab_size
from tandem.engine.trainer.layers import qwen3_hf_config
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh, destroy_mesh
from tests.ranks import run_ranks

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=48)
CONFIG = RunConfig(name="small", model=MODEL, mesh=MeshConfig(tp=2))


def save_run(run_dir: Path) -> float:
    """As two tensor-parallel ranks. Returns the sum of the final norm's weight, which every rank holds whole."""
    hf_config = qwen3_hf_config(MODEL, padded_vocab_size(load_tokenizer(None)))
    mesh = build_mesh(CONFIG.mesh, hf_config)
    trainer = MegatronTrainer(hf_config, mesh, CONFIG.trainer, loss=CONFIG.loss, temperature=1.0, seed=3)
    norm = next(shard for shard in trainer.weight_shards() if shard.name.endswith("final_layernorm.weight"))
    norm.tensor.data.mul_(torch.linspace(0.5, 2.0, MODEL.hidden_size))
    trainer.weights_changed()
    save_checkpoint(run_dir / "checkpoints", 7, trainer.sharded_state_dict(), keep=1)
    total = float(norm.tensor.sum())
    dist.barrier()
    destroy_mesh()
    return total


def test_transformers_loads_what_two_ranks_saved(tmp_path: Path) -> None:
    run_dir, to = tmp_path / "run", tmp_path / "model"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    norm_sums = run_ranks(save_run, 2, run_dir)
    command = [sys.executable, "-m", "tandem.engine.cli", "export", str(run_dir), "--to", str(to)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "after 7 iterations" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(to)
    assert model.config.num_hidden_layers == MODEL.num_layers
    assert float(model.model.norm.weight.sum()) == pytest.approx(norm_sums[0], rel=1e-6)  # the order of the sum
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert tokenizer.decode(tokenizer.encode("1+1?", add_special_tokens=False)) == "1+1?"


def test_a_folder_that_is_no_run_and_a_target_that_exists_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prepare, message in ((False, "is no run folder"), (True, "exists; give a folder that does not")):
        if prepare:
            (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", str(tmp_path), "--to", str(tmp_path)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
