"""The loop on one GPU with SGLang, to measure it: a random model of 0.5B parameters, which learns nothing in five iterations."""

from tandem.engine.config import (
    CheckpointConfig,
    EvaluationConfig,
    LengthPenaltyConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SwapConfig,
    TrainerConfig,
)


def gpu_loop() -> RunConfig:
    """Five iterations of a random 0.5B model with SGLang on one GPU, for benchmarks/gpu_loop.sh."""
    return RunConfig(
        name="gpu_loop",
        steps=5,
        # Layers of a Qwen2.5-0.5B with Qwen3's norms. It has 24, of 358M parameters, and an embedding of 136M, which a vocabulary of
        # bytes lacks: 10 more make up for that (507M).
        model=ModelConfig(
            num_layers=34,
            hidden_size=896,
            num_attention_heads=14,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=4864,
            context_length=2048,
            rope_theta=1e6,
        ),
        sampling=SamplingConfig(groups_in_flight=32, num_samples=8),
        rollout=RolloutConfig(engine="sglang", max_response_tokens=1024, max_batch=256),
        replay=ReplayConfig(groups_per_update=32),
        length_penalty=LengthPenaltyConfig(weight=0.5),  # what a random model is wrong about differs in length: something to train on
        trainer=TrainerConfig(dtype="bfloat16", microbatch_tokens=16_384, updates_per_iteration=2, optimizer=OptimizerConfig(lr=1e-6)),
        swap=SwapConfig(bucket_bytes=64 << 20),
        evaluation=EvaluationConfig(every=0, max_prompts=16),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(tensorboard=False, rollouts_every=0),
    )
