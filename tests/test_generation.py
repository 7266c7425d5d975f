"""What becomes of a run whose rollout engines die one after the other."""

import dataclasses
from pathlib import Path

import pytest

from tandem.engine.causes import is_peer_lost
from tandem.engine.config import ElasticConfig, RolloutConfig, RunConfig, SGLangConfig
from tandem.engine.errors import RunEnded
from tandem.engine.generation import MAX_ENGINE_DEATHS
from tandem.engine.train import train
from tandem.engine.types import EngineDiedError
from tests.ranks import run_ranks
from tests.rollout.sglang_servers import server_processes
from tests.small_toy import small_toy


def how_it_ends(config: RunConfig) -> str:
    with pytest.raises(RunEnded) as ended:
        train(config)
    return str(ended.value)


@pytest.mark.slow  # whole runs
@pytest.mark.timeout(900)
@pytest.mark.parametrize("elastic", [False, True])
def test_an_engine_that_dies_again_and_again_ends_the_run_with_its_last_words(elastic: bool, tmp_path: Path) -> None:
    before, python = server_processes(), tmp_path / "python"
    python.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo 0.5.21; else echo "no gloo: --nonsense is no option"; exit 3; fi\n')
    python.chmod(0o755)
    sglang = SGLangConfig(python=str(python))
    rollout = RolloutConfig(engine="sglang", max_response_tokens=48, sglang=sglang, elastic=ElasticConfig(enabled=elastic))
    config = small_toy(tmp_path / "run", steps=1)
    config = dataclasses.replace(config, rollout=rollout, sft=(dataclasses.replace(config.sft[0], steps=1),))
    said = run_ranks(how_it_ends, 2, config, timeout_s=800)
    given_up = f"the rollout engine died {MAX_ENGINE_DEATHS + 1} times in a row, without a finished phase between, and is given up"
    last_words = [text for text in said if given_up in text]
    assert last_words
    assert all("--nonsense is no option" in text for text in last_words)
    assert all("is gone, noticed in" in text for text in said if text not in last_words), "the other rank may have been quicker"
    assert server_processes() <= before


def test_an_engine_that_speaks_of_gloo_is_not_taken_for_a_rank_that_is_gone() -> None:
    said = "Connection closed by peer: gloo"
    assert is_peer_lost(RuntimeError(said))
    assert not is_peer_lost(EngineDiedError(said))
    assert not is_peer_lost(RunEnded(said))
