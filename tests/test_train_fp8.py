"""The loop with SGLang generating from block-fp8 weights, on a CPU: one server of two processes, filled by two tensor-parallel ranks."""

import dataclasses
from pathlib import Path

import pytest

from tandem.engine.config import MeshConfig, RolloutConfig, SGLangConfig
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.rollout.sglang_servers import need_sglang, server_processes
from tests.small_toy import small_toy, steps_of


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.timeout(1500)
def test_two_iterations_train_on_what_quantised_weights_generate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need_sglang()
    before = server_processes()
    config = small_toy(tmp_path / "run", steps=2)
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 256}
    rollout = RolloutConfig(
        engine="sglang",
        tp=2,
        quantization="block_fp8",
        max_response_tokens=48,
        max_batch=32,
        sglang=SGLangConfig(start_timeout_s=900),
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **sizes),
        mesh=MeshConfig(tp=2),
        sft=(dataclasses.replace(config.sft[0], steps=60),),
        rollout=rollout,
        log=dataclasses.replace(config.log, progress=True),
        loss=dataclasses.replace(config.loss, variant="grpo", reference="rollout"),
    )
    run_ranks(train, 2, config, timeout_s=1400)
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1]
    for step in steps:
        assert step["rollout/new_tokens"] > 0
        # The weights differ by up to 1/16 each; without quantisation the largest difference is below 1e-5.
        assert 1e-4 < step["train/logprob_diff_mean"] < 0.3
    said = capfd.readouterr().out
    assert "responses are drawn from quantised weights, and others trained" in said
    assert "the loss weighs tokens by their ratio, up to loss.importance_cap" in said
    assert server_processes() <= before
