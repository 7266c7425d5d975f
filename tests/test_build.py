"""What is settled before the parts are built."""

import dataclasses
import json
from pathlib import Path

import pytest

from tandem.engine.config import MeshConfig
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.small_toy import small_toy


@pytest.mark.distributed
@pytest.mark.parametrize(("num_kv_heads", "resolved"), [(2, "ulysses"), (1, "all_gather")])
def test_the_saved_configuration_says_how_context_parallel_ranks_attend(num_kv_heads: int, resolved: str, tmp_path: Path) -> None:
    config = small_toy(tmp_path / "run", steps=0, sft=(), mesh=MeshConfig(cp=2))
    run_ranks(train, 2, dataclasses.replace(config, model=dataclasses.replace(config.model, num_key_value_heads=num_kv_heads)))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trainer"]["cp_attention"] == resolved
