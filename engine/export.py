"""`tandem export RUN --to DIR`: the newest checkpoint of a run as a folder that transformers loads.

One process, whatever the run had, and one parameter at a time: the model need not fit into its memory.
"""

import json
import tempfile
from pathlib import Path

from tandem.engine.checkpoint.disk import STATE, find_latest
from tandem.engine.checkpoint.hf_folder import GENERATION_CONFIG, read_stop_token_ids, write_model
from tandem.engine.config import MeshConfig, RunConfig, from_dict
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.hf_config import hf_config_of
from tandem.engine.reward_training import score_config, write_scoring
from tandem.engine.run import single_process_group
from tandem.engine.trainer.layers import DTYPES
from tandem.engine.trainer.mesh import build_mesh, destroy_mesh
from tandem.engine.trainer.stored import stored_weights


def export_run(run_dir: Path, to: Path) -> int:
    """Write config.json, safetensors and tokenizer, of a reward model also how text is scored with it.

    Returns: the iteration (or step) that they are from: that many were done.

    Raises: FileNotFoundError if the folder is no run or has no checkpoint; ValueError if `to` exists or no
        checkpoint is whole.
    """
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir} is no run folder: it has no config.json")
    if to.exists():
        raise ValueError(f"{to} exists; give a folder that does not")
    config = from_dict(RunConfig, json.loads((run_dir / "config.json").read_text(encoding="utf-8")))
    tokenizer = load_tokenizer(config.model.path)
    hf_config = score_config(config, tokenizer) if config.preference else hf_config_of(config.model, tokenizer)
    beside_weights: list[Path] = []
    if config.model.path is not None and (Path(config.model.path) / GENERATION_CONFIG).is_file():
        beside_weights.append(Path(config.model.path) / GENERATION_CONFIG)
    if hf_config.get("eos_token_id") is None:  # without one, transformers generates to the length limit
        named = read_stop_token_ids(Path(config.model.path)) if config.model.path is not None else ()
        hf_config["eos_token_id"] = list(named) if named else tokenizer.eos_token_id
    with single_process_group(), tempfile.TemporaryDirectory() as folder:
        mesh = build_mesh(MeshConfig(), hf_config)
        found = find_latest(run_dir / "checkpoints", rename_damaged=False)
        if found is None:
            raise FileNotFoundError(f"{run_dir} has no checkpoint yet")
        step, checkpoint = found
        tokenizer.save_pretrained(folder)
        weights = stored_weights(hf_config, mesh, config.trainer, checkpoint / STATE)
        if config.preference:
            write_scoring(config, tokenizer, run_dir, Path(folder))
        beside_weights += sorted(Path(folder).iterdir())
        write_model(hf_config, DTYPES[config.trainer.dtype], weights, to, extra_files=beside_weights)
        destroy_mesh()
    return step
