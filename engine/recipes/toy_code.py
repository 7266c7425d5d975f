"""The toy run of the code domain: programs of one line, graded by running them in the sandbox."""

from tandem.engine.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ProgramTask,
    RepetitionConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTStage,
    TrainerConfig,
)


def toy_code() -> RunConfig:
    """Programs of one line, run by the sandbox, on two CPU cores, in minutes."""
    return RunConfig(
        name="toy_code",
        steps=20,
        model=ModelConfig(num_layers=3, hidden_size=128, num_attention_heads=4, intermediate_size=320, context_length=96),
        data=DataConfig(task=ProgramTask()),
        sft=(
            # Which operand goes where is learned late and all at once, after 400 to 800 steps by the seed; the decay waits for it.
            SFTStage(
                steps=1200,
                batch_tokens=1024,
                max_tokens=96,
                optimizer=OptimizerConfig(lr=2e-3, min_lr=4e-5, warmup_steps=50, decay_style="linear", decay_start=0.7, clip_grad=1.0),
            ),
        ),
        # Few, for a run of the sandbox takes longer than the response that it grades. All prompts alike: the reward is then the task's.
        sampling=SamplingConfig(groups_in_flight=32, num_samples=8, prioritised=False),
        rollout=RolloutConfig(max_response_tokens=56, repetition=RepetitionConfig(ngram=0)),
        replay=ReplayConfig(groups_per_update=16),
        loss=LossConfig(tau=0.1, scale=0.1),
        trainer=TrainerConfig(
            microbatch_tokens=4096,
            updates_per_iteration=2,
            # As in toy_cpu: an optimizer that is made anew every iteration is too hot with the usual eps.
            optimizer=OptimizerConfig(lr=4e-4, min_lr=2e-5, decay_style="linear", decay_start=0.5, eps=1e-4, clip_grad=1.0),
        ),
        evaluation=EvaluationConfig(every=5),
        checkpoint=CheckpointConfig(every=10),
    )
