"""The loop with SGLang as its rollout engine, on a CPU: a server for each of two ranks."""

import dataclasses
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.algo.pack import TrainingRow, build_microbatch
from tandem.engine.config import LossConfig, MeshConfig, OptimizerConfig, RepetitionConfig, RolloutConfig, SGLangConfig, TrainerConfig
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_server import SGLangServer
from tandem.engine.train import train
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.types import GenerationRequest
from tests.ranks import run_ranks
from tests.rollout.models import VOCAB_SIZE, disk_tensors, reference_logprobs, serve, tiny_model
from tests.rollout.sglang_servers import need_sglang, server_processes, setup_of
from tests.small_toy import small_toy, steps_of
from tests.trainer.compare import load

pytestmark = [pytest.mark.slow, pytest.mark.sglang, pytest.mark.timeout(1500)]


def test_two_iterations_with_sglang_train_on_logprobs_that_are_the_trainers(tmp_path: Path) -> None:
    need_sglang()
    before, shared_before = server_processes(), set(os.listdir("/dev/shm"))
    config = small_toy(tmp_path / "run", steps=2)
    # In turns, as on a GPU: the trainer's state leaves, and the servers are told to release memory, weights too.
    sglang = SGLangConfig(start_timeout_s=600, release="all")
    rollout = RolloutConfig(engine="sglang", max_response_tokens=48, max_batch=32, sglang=sglang)
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, sleep="on"))
    warm_start = (dataclasses.replace(config.sft[0], steps=100),)
    run_ranks(train, 2, dataclasses.replace(config, rollout=rollout, sft=warm_start), timeout_s=1200)
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1]
    for step in steps:
        # Two float32 implementations that add in a different order: the project's bound on train against rollout.
        assert step["train/logprob_diff_max"] <= 1e-5
        assert step["rollout/new_tokens"] > 0
        assert step["memory/serve/trainer_bytes"] == 0 < step["memory/train/trainer_bytes"]
    assert server_processes() <= before
    assert set(os.listdir("/dev/shm")) <= shared_before


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_over_swaps_at_a_learning_rate_of_0_the_difference_stays_flat(tmp_path: Path, engine: Literal["embedded", "sglang"]) -> None:
    """benchmarks/logprob_drift.py in small."""
    if engine == "sglang":
        need_sglang()
    config = small_toy(tmp_path / "run", steps=5)
    rollout = RolloutConfig(engine=engine, max_response_tokens=48, max_batch=32, sglang=SGLangConfig(start_timeout_s=600))
    trainer = TrainerConfig(updates_per_iteration=2, optimizer=OptimizerConfig(lr=0.0, eps=1e-4))
    warm_start = (dataclasses.replace(config.sft[0], steps=60),)
    run_ranks(train, 2, dataclasses.replace(config, rollout=rollout, trainer=trainer, sft=warm_start), timeout_s=1200)
    means = [step["train/logprob_diff_mean"] for step in steps_of(tmp_path / "run")]
    assert len(means) == 5
    assert max(step["train/logprob_diff_max"] for step in steps_of(tmp_path / "run")) <= 1e-5
    # Other tokens each time, so not the same number; an error that each swap adds to would be five times the first.
    assert 0 < max(means) <= 2.5 * min(means)


def trained_logprobs(hf_config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], rows: Sequence[TrainingRow]) -> torch.Tensor:
    """The trainer's log-probs of the responses of this rank's part of the rows."""
    trainer = MegatronTrainer(hf_config, build_mesh(MeshConfig(), hf_config), TrainerConfig(), LossConfig(), 1.0, None)
    load(trainer, weights)
    size = len(rows) // dist.get_world_size()
    microbatch = build_microbatch(rows[dist.get_rank() * size :][:size])
    (found,) = trainer.logprobs([microbatch])
    return found[microbatch.loss_mask_T]


def test_where_float32_is_far_from_the_truth_the_server_is_near_the_trainer() -> None:
    """Of a random model with large weights, whose log-probs are more sensitive to rounding than a trained one's."""
    need_sglang()
    sizes = {"hidden_size": 160, "intermediate_size": 448, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 32}
    model = tiny_model("qwen3", initializer_range=0.8, num_hidden_layers=4, **sizes)  # pyright: ignore[reportArgumentType]
    config = RolloutConfig(max_batch=32, repetition=RepetitionConfig(max_period=0, ngram=0), sglang=SGLangConfig(start_timeout_s=600))
    generator = random.Random(0)
    prompts = [tuple(generator.randrange(VOCAB_SIZE) for _ in range(generator.randrange(1, 50))) for _ in range(64)]
    requests = [
        GenerationRequest(request_id=str(i), token_ids=prompt, num_prefix_tokens=0, max_new_tokens=40, seed=i)
        for i, prompt in enumerate(prompts)
    ]
    engine = SGLangEngine(SGLangServer(setup_of(model, config=config.sglang)), config, stop_token_ids=(), timeout_s=120.0)
    try:
        serve(engine, model)
        completions = {completion.request_id: completion for completion in engine.generate(requests)}
    finally:
        engine.close()
    rows = list[TrainingRow]()
    for i, prompt in enumerate(prompts):
        completion = completions[str(i)]
        all_tokens = np.ones(len(completion.token_ids), dtype=np.bool_)
        row = TrainingRow(
            prompt_ids=np.array(prompt, dtype=np.int32),
            response_ids=np.array(completion.token_ids, dtype=np.int32),
            behaviour_logprobs=np.array(completion.logprobs, dtype=np.float32),
            loss_mask=all_tokens,
            on_policy=all_tokens,
            advantage=0.0,
            row_id=i,
        )
        rows.append(row)
    weights = disk_tensors(model)
    trained = torch.cat(run_ranks(trained_logprobs, 2, setup_of(model).hf_config, weights, rows))
    served = torch.tensor([logprob for row in rows for logprob in row.behaviour_logprobs.tolist()])
    exact_model = model.double()  # pyright: ignore[reportArgumentType, reportCallIssue]
    exact = torch.cat([reference_logprobs(exact_model, row.prompt_ids.tolist(), row.response_ids.tolist()) for row in rows])
    assert (trained - exact).abs().max() > 3e-5
    assert (served - exact).abs().max() > 3e-5
    assert (trained - served).abs().max() <= 5e-6
