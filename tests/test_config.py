"""Every check of a configuration: the field, the value and the rule are named."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tandem.engine.config import (
    DataConfig,
    ElasticConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProgramTask,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SFTStage,
    SGLangConfig,
    SwapConfig,
    from_dict,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(name="x", seed=-1), "seed is -1; it must not be negative"),
        (lambda: RunConfig(name="x", steps=-1), "steps is -1; it must not be negative"),
        (lambda: RolloutConfig(elastic=ElasticConfig(enabled=True)), "rollout.elastic.enabled is True; it needs rollout.engine=sglang"),
        (lambda: ElasticConfig(timeout_s=0.0), "rollout.elastic.timeout_s is 0.0; it must be positive"),
        (lambda: RunConfig(name="x", timeout_s=0.0), "timeout_s is 0.0; it must be positive"),
        (
            lambda: RewardConfig(over_budget_penalty=-1.0),
            "reward.over_budget_penalty is -1.0; it is subtracted, so it must not be negative",
        ),
        (lambda: RewardConfig(over_budget_start=1.5), "reward.over_budget_start is 1.5; it must lie in [0, 1]"),
        (lambda: RewardConfig(format_penalty=1.0), "reward.format_markers is (); reward.format_penalty needs at least one"),
        (lambda: RewardConfig(format_markers=("",)), "reward.format_markers is ('',); none may be empty"),
        (lambda: RewardConfig(max_retries=-1), "reward.max_retries is -1; it must not be negative"),
        (lambda: RewardConfig(timeout_s=0.0), "reward.timeout_s is 0.0; it must be positive"),
        (lambda: RewardConfig(judge_timeout_s=0.0), "reward.judge_timeout_s is 0.0; it must be positive"),
        (lambda: RewardConfig(judge_max_tokens=0), "reward.judge_max_tokens is 0; it must be at least 1"),
        (lambda: RewardConfig(judge_concurrency=0), "reward.judge_concurrency is 0; it must be at least 1"),
        (
            lambda: RewardConfig(judge_url="judge-1:8000/v1"),
            "reward.judge_url is 'judge-1:8000/v1'; it must begin with http:// or https://",
        ),
        (lambda: RewardConfig(alarm_jump=0.0), "reward.alarm_jump is 0.0; it must lie in (0, 1]"),
        (lambda: ModelConfig(intermediate_size=0), "model.intermediate_size is 0; it must be at least 1"),
        (lambda: ModelConfig(moe_intermediate_size=-5), "model.moe_intermediate_size is -5; it must be at least 1"),
        (lambda: ModelConfig(head_dim=0), "model.head_dim is 0; it must be at least 1"),
        (lambda: ModelConfig(head_dim=33), "model.head_dim is 33; it must be even"),
        (lambda: ModelConfig(num_attention_heads=5, num_key_value_heads=2), "model.num_key_value_heads is 2; it must divide"),
        (lambda: ModelConfig(num_experts=4, num_experts_per_tok=5), "model.num_experts_per_tok is 5; it must lie between 1 and"),
        (lambda: MeshConfig(pp=0), "mesh.pp is 0; it must be at least 1"),
        (lambda: OptimizerConfig(beta1=1.0), "optimizer.beta1 is 1.0; it must lie in [0, 1)"),
        (lambda: OptimizerConfig(beta2=-0.1), "optimizer.beta2 is -0.1; it must lie in [0, 1)"),
        (lambda: OptimizerConfig(beta2=float("nan")), "optimizer.beta2 is nan; it must lie in [0, 1)"),
        (lambda: OptimizerConfig(lr=1e-3, min_lr=1e-2), "optimizer.min_lr is 0.01; it must lie between 0 and lr"),
        (lambda: LossConfig(baseline="log_mean_exp", tau=0.0), "loss.tau is 0.0; baseline=log_mean_exp divides by it"),
        (lambda: RolloutConfig(temperature=0.0), "rollout.temperature is 0.0; it must be positive"),
        (lambda: SGLangConfig(port=0), "rollout.sglang.port is 0; it must lie between 1 and 65535, or be None"),
        (lambda: SGLangConfig(health_timeout_s=0.0), "rollout.sglang.health_timeout_s is 0.0; it must be positive"),
        (lambda: SGLangConfig(stream_interval=0), "rollout.sglang.stream_interval is 0; it must be at least 1"),
        (lambda: SGLangConfig(memory_fraction=1.0), "rollout.sglang.memory_fraction is 1.0; it must lie between 0 and 1"),
        (lambda: SwapConfig(bucket_bytes=100), "swap.bucket_bytes is 100; it must be at least 4096"),
        (lambda: SwapConfig(device_bucket_bytes=100), "swap.device_bucket_bytes is 100; it must be at least 4096"),
        (lambda: SwapConfig(sleep_budget_bytes=-1), "swap.sleep_budget_bytes is -1; it must not be negative"),
        (lambda: SFTStage(steps=0, batch_tokens=1, max_tokens=1, optimizer=OptimizerConfig()), "sft.steps is 0; steps or epochs"),
    ],
)
def test_a_value_that_a_rule_forbids_is_named_with_the_rule(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value).startswith(message)


def test_a_configuration_is_the_same_after_being_saved() -> None:
    stage = SFTStage(steps=3, batch_tokens=100, max_tokens=50, optimizer=OptimizerConfig(lr=1e-3))
    config = RunConfig(name="x", timeout_s=60.0, sft=(stage,), mesh=MeshConfig(etp=1))
    assert from_dict(RunConfig, config.to_dict()) == config


def test_a_task_is_restored_as_the_kind_that_it_was() -> None:
    for config in (RunConfig(name="x"), RunConfig(name="x", data=DataConfig(task=ProgramTask(num_inputs=3)))):
        assert from_dict(RunConfig, json.loads(json.dumps(config.to_dict()))).data.task == config.data.task


def test_a_saved_field_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="RunConfig has no field stepz; it has name"):
        from_dict(RunConfig, {"name": "x", "stepz": 3})
