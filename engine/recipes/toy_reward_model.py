"""The toy reward model: which of two worked solutions is right, on two CPU cores."""

from tandem.engine.config import (
    ArithmeticTask,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SFTStage,
    TrainerConfig,
)


def toy_reward_model() -> RunConfig:
    """A reward model from random weights, on pairs of right and wrong chained arithmetic; minutes on two CPU cores."""
    return RunConfig(
        name="toy_reward_model",
        steps=0,
        model=ModelConfig(
            num_layers=2, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320, context_length=64
        ),
        data=DataConfig(
            task=ArithmeticTask(
                modulus=5,
                max_operand=4,
                min_operand=0,
                min_operations=3,
                max_operations=3,
                operators="+",
                direct_probability=(0.0,),
                verbose_share=0.0,
                num_sft_examples=20_000,
                num_test=400,
            ),
        ),
        preference=(
            SFTStage(
                steps=500,
                batch_tokens=2560,
                max_tokens=64,
                optimizer=OptimizerConfig(lr=2e-3, min_lr=1e-4, warmup_steps=40, decay_style="linear", decay_start=0.5),
            ),
        ),
        trainer=TrainerConfig(microbatch_tokens=4096),
        rollout=RolloutConfig(max_response_tokens=32),
        evaluation=EvaluationConfig(every=50),
        checkpoint=CheckpointConfig(every=200),
    )
