"""The domains, and the grader of each."""

from concurrent.futures import Future

from tandem.engine.config import RewardConfig
from tandem.engine.reward.arithmetic import grade_arithmetic
from tandem.engine.reward.code_grader import CodeGrader
from tandem.engine.reward.k12 import K12Grader
from tandem.engine.reward.math import submit_math
from tandem.engine.reward.preference import PreferenceGrader
from tandem.engine.reward.reward_model import ModelJudge
from tandem.engine.types import Grader, Prompt, Verdict

# Those that have a grader; `load_prompts` refuses any other.
DOMAINS = ("arithmetic", "math", "k12", "code", "judge", "preference")


def open_grader(domain: str, config: RewardConfig, *, num_workers: int) -> Grader:
    """Start the grader of a domain.

    Args:
        num_workers: programs that run at a time, where the grader runs any.
    Raises: ValueError for a domain without one and a judge model that does not answer, UnavailableError where this machine cannot run a
        sandbox.
    """
    if domain == "arithmetic":
        return ArithmeticGrader()
    if domain == "math":
        return MathGrader()
    if domain == "k12":
        return K12Grader(ModelJudge.open(config) if config.judge_url is not None else None)
    if domain == "code":
        return CodeGrader.open(config.sandbox_url, num_workers=num_workers)
    if domain == "judge":
        return ModelJudge.open(config)
    if domain == "preference":
        folder, threshold = config.preference_model, config.preference_threshold
        return PreferenceGrader.open(folder, threshold=threshold, num_workers=num_workers, timeout_s=config.preference_timeout_s)
    raise ValueError(f"domain {domain!r} has no grader; there are graders for {', '.join(DOMAINS)}")


class ArithmeticGrader:
    """The toy task. Answers at once."""

    def check(self, prompt: Prompt) -> None:
        if not prompt.answer:
            raise ValueError("it has no answer")

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Verdict:
        if not is_complete:
            return Verdict(correct=False, reason="the response was cut")
        return grade_arithmetic(text, prompt.answer)

    def close(self) -> None:
        pass


class MathGrader:
    """Final answers. What needs algebra goes to the workers of `reward/math.py`, which all graders of this process share."""

    def check(self, prompt: Prompt) -> None:
        if not prompt.answer:
            raise ValueError("it has no answer")

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> Verdict | Future[Verdict]:
        return submit_math(text, prompt.answer, is_complete=is_complete, question=prompt.text)

    def close(self) -> None:
        pass
