"""The judge chooses the grader, and never takes a failure for a wrong answer."""

import dataclasses

import pytest

from tandem.engine.config import RewardConfig
from tandem.engine.reward import judge as judge_module
from tandem.engine.reward.judge import DOMAINS, Judge
from tandem.engine.types import Group, Prompt, Response, Segment, StopState


class ByteTokenizer:
    """Bytes, and 256 as the end token."""

    eos_token_id: int | None = 256
    pad_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: object, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return bytes(token for token in token_ids if token < 256).decode()  # type: ignore[attr-defined]


def group_of(*texts: str, domain: str = "arithmetic", answer: str = "18", stop: StopState = StopState.FINISHED) -> Group:
    token_ids = [(*text.encode(), 256) for text in texts]
    segments = [Segment(token_ids=ids, logprobs=(0.0,) * len(ids), policy_version=0) for ids in token_ids]
    return Group(
        prompt=Prompt(id="p", text="", token_ids=(1,), answer=answer, domain=domain),
        responses=tuple(Response(sample=i, segments=(segment,), stop=stop) for i, segment in enumerate(segments)),
    )


def verdicts(group: Group, config: RewardConfig | None = None) -> list[tuple[bool, bool]]:
    scored = Judge(config or RewardConfig(), ByteTokenizer()).score(group)
    assert scored.responses == group.responses
    return [(verdict.correct, verdict.graded) for verdict in scored.verdicts]


def test_the_domain_chooses_the_grader() -> None:
    assert verdicts(group_of("A:18.", "it is 18")) == [(True, True), (False, True)]
    assert verdicts(group_of("A:18.", "it is 18", domain="math")) == [(True, True), (True, True)]


def test_a_cut_arithmetic_response_is_wrong_and_a_cut_math_response_needs_its_answer_marked() -> None:
    for stop in (StopState.LENGTH, StopState.REPETITION):
        assert verdicts(group_of("A:18.", stop=stop)) == [(False, True)]
        assert verdicts(group_of("#### 18", "it is 18", domain="math", stop=stop)) == [(True, True), (False, True)]


def test_an_empty_response_is_wrong() -> None:
    for domain in DOMAINS:
        group = group_of("", domain=domain)
        empty = dataclasses.replace(group, responses=(Response(sample=0, stop=StopState.FINISHED),))
        assert verdicts(empty) == [(False, True)]


def test_only_the_end_of_a_long_response_is_read() -> None:
    assert verdicts(group_of("A:18." + "x" * 20, "x" * 50 + "A:18."), RewardConfig(max_response_chars=10)) == [(False, True), (True, True)]
    with pytest.raises(ValueError, match=r"reward\.max_response_chars is 0"):
        RewardConfig(max_response_chars=0)


def test_a_grader_that_raises_leaves_its_response_ungraded_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def grade(text: str, reference_answer: str) -> None:
        raise RecursionError(f"too deep: {text}")

    monkeypatch.setattr(judge_module, "grade_arithmetic", grade)
    (verdict,) = Judge(RewardConfig(), ByteTokenizer()).score(group_of("A:18.")).verdicts
    assert (verdict.correct, verdict.graded, verdict.reason) == (False, False, "RecursionError: too deep: A:18.")


def test_unknown_domains_empty_groups_and_unfinished_responses_are_errors() -> None:
    with pytest.raises(ValueError, match="domain 'chess'; there are graders for arithmetic, math"):
        verdicts(group_of("x", domain="chess"))
    with pytest.raises(ValueError, match="has no responses"):
        verdicts(group_of())
    with pytest.raises(ValueError, match="sample 0 of prompt 'p' stopped by budget"):
        verdicts(group_of("x", stop=StopState.BUDGET))
