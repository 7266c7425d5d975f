"""`tandem export RUN --to DIR`: the newest checkpoint of a run as a folder that transformers loads. One process, whatever the run had."""

import functools
import json
import tempfile
from pathlib import Path

from tandem.engine.checkpoint.disk import load_latest
from tandem.engine.checkpoint.hf_folder import GENERATION_CONFIG, export_hf, read_stop_token_ids
from tandem.engine.config import MeshConfig, RunConfig, from_dict
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.hf_config import hf_config_of
from tandem.engine.run import single_process_group
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh, destroy_mesh


def export_run(run_dir: Path, to: Path) -> int:
    """Write config.json, safetensors and tokenizer. Returns the iteration that they are from: that many were done.

    Raises: FileNotFoundError if the folder is no run or has no checkpoint; ValueError if `to` exists or no
        checkpoint is whole.
    """
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir} is no run folder: it has no config.json")
    if to.exists():
        raise ValueError(f"{to} exists; give a folder that does not")
    config = from_dict(RunConfig, json.loads((run_dir / "config.json").read_text(encoding="utf-8")))
    tokenizer = load_tokenizer(config.model.path)
    hf_config = hf_config_of(config.model, tokenizer)
    beside_weights: list[Path] = []
    if config.model.path is not None and (Path(config.model.path) / GENERATION_CONFIG).is_file():
        beside_weights.append(Path(config.model.path) / GENERATION_CONFIG)
    if hf_config.get("eos_token_id") is None:  # without one, transformers generates to the length limit
        named = read_stop_token_ids(Path(config.model.path)) if config.model.path is not None else ()
        hf_config["eos_token_id"] = list(named) if named else tokenizer.eos_token_id
    with single_process_group(), tempfile.TemporaryDirectory() as folder:
        mesh = build_mesh(MeshConfig(), hf_config)
        trainer = MegatronTrainer(hf_config, mesh, config.trainer, loss=config.loss, temperature=1.0, seed=None)
        # Not the optimizer: its state loads under the same ep only.
        state = functools.partial(trainer.sharded_state_dict, optimizer=False)
        found = load_latest(run_dir / "checkpoints", state, rename_damaged=False)
        if found is None:
            raise FileNotFoundError(f"{run_dir} has no checkpoint yet")
        trainer.load_sharded(found.state)
        tokenizer.save_pretrained(folder)
        export_hf(trainer, to, extra_files=[*sorted(Path(folder).iterdir()), *beside_weights])
        destroy_mesh()
    return found.step
