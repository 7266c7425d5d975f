"""The toy run: chained arithmetic on two CPU cores, from random weights to a policy that reasons."""

from tandem.engine.config import (
    ArithmeticTask,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LengthPenaltyConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RepetitionConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTStage,
    TrainerConfig,
)


def toy_cpu() -> RunConfig:
    """Chained arithmetic on two CPU cores, in minutes."""
    return RunConfig(
        name="toy_cpu",
        steps=36,
        model=ModelConfig(context_length=160),
        data=DataConfig(
            task=ArithmeticTask(
                modulus=10,
                max_operations=5,
                direct_probability=(0.1, 0.3, 0.6, 0.6),
                verbose_share=0.75,
                slip_probability=0.5,
            ),
        ),
        sft=(
            SFTStage(
                steps=600,
                batch_tokens=2048,
                max_tokens=160,
                optimizer=OptimizerConfig(lr=2e-3, min_lr=4e-5, warmup_steps=50, decay_style="linear", decay_start=0.5, clip_grad=1.0),
            ),
        ),
        sampling=SamplingConfig(groups_in_flight=96, num_samples=8, curriculum_steps=6),
        rollout=RolloutConfig(max_response_tokens=112, token_budget=26_000, repetition=RepetitionConfig(ngram=0)),
        replay=ReplayConfig(groups_per_update=48),
        loss=LossConfig(tau=0.1, scale=0.1),
        length_penalty=LengthPenaltyConfig(weight=0.5, start_step=18, warmup_steps=4),
        trainer=TrainerConfig(
            microbatch_tokens=4096,
            updates_per_iteration=4,
            # Decays once the length reward sets in: at full speed it wears off what was learned.
            optimizer=OptimizerConfig(lr=2e-4, min_lr=2e-5, decay_style="linear", decay_start=0.5, eps=1e-4, clip_grad=1.0),
        ),
        evaluation=EvaluationConfig(every=6),
        checkpoint=CheckpointConfig(every=10),
    )
