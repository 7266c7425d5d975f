"""Supervised training alone, in the two stages of Kimi k1.5 (2.5.2)."""

from tandem.engine.config import EvaluationConfig, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig, SFTStage, TrainerConfig


def sft_two_stage() -> RunConfig:
    """Supervised training of --model.path on --data.sft: 32k tokens, then 128k, one epoch each, packed. No reinforcement."""
    return RunConfig(
        name="sft_two_stage",
        steps=0,
        model=ModelConfig(context_length=131_072),
        sft=(
            SFTStage(
                epochs=1,
                batch_tokens=1 << 20,
                max_tokens=32_768,
                optimizer=OptimizerConfig(lr=2e-5, min_lr=2e-6, decay_style="cosine", warmup_steps=10, weight_decay=0.1),
            ),
            SFTStage(
                epochs=1,
                batch_tokens=1 << 20,
                max_tokens=131_072,
                optimizer=OptimizerConfig(lr=1e-5, min_lr=1e-6, decay_style="cosine", warmup_steps=10, weight_decay=0.1),
            ),
        ),
        trainer=TrainerConfig(dtype="bfloat16", microbatch_tokens=32_768, recompute="full"),
        rollout=RolloutConfig(max_response_tokens=8192),
        evaluation=EvaluationConfig(max_prompts=0),
    )
