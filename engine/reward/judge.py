"""Chooses the grader by the prompt's domain and grades whole groups."""

import dataclasses

from tandem.engine.config import RewardConfig
from tandem.engine.reward.arithmetic import grade_arithmetic
from tandem.engine.reward.math import grade_math
from tandem.engine.types import Group, Prompt, Response, StopState, Tokenizer, Verdict

# The domains that have a grader; `load_prompts` refuses any other.
DOMAINS = ("arithmetic", "math")


class Judge:
    """Grades responses by their decoded text, special tokens left out."""

    def __init__(self, config: RewardConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self._tokenizer = tokenizer

    def score(self, group: Group) -> Group:
        """The group with one verdict per response.

        A grader that fails leaves its response ungraded, with the reason: it counts neither as right nor as wrong.

        Raises: ValueError for an unknown domain, a group without responses, or one with an unfinished response.
        """
        if group.prompt.domain not in DOMAINS:
            raise ValueError(f"prompt {group.prompt.id!r} has domain {group.prompt.domain!r}; there are graders for {', '.join(DOMAINS)}")
        if not group.responses:
            raise ValueError(f"the group of prompt {group.prompt.id!r} has no responses; it needs at least one")
        for response in group.responses:
            if not response.stop.is_final:
                raise ValueError(
                    f"sample {response.sample} of prompt {group.prompt.id!r} stopped by {response.stop.value}; grade finished ones only"
                )
        return dataclasses.replace(group, verdicts=tuple(self._grade(group.prompt, response) for response in group.responses))

    def _grade(self, prompt: Prompt, response: Response) -> Verdict:
        try:
            text = self._tokenizer.decode(list(response.token_ids), skip_special_tokens=True)[-self.config.max_response_chars :]
            is_complete = response.stop is StopState.FINISHED
            if prompt.domain == "math":
                return grade_math(text, prompt.answer, is_complete=is_complete)
            if not is_complete:
                return Verdict(correct=False, reason=f"the response did not end by itself but by {response.stop.value}")
            return grade_arithmetic(text, prompt.answer)
        # Whatever goes wrong in a parser of model output must not end the run, and must not pass for a wrong answer.
        except Exception as error:
            return Verdict(correct=False, reason=f"{type(error).__name__}: {error}", graded=False)
