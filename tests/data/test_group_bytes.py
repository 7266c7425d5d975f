"""Groups survive the way through bytes, with and without the experts that their tokens chose."""

import json

import numpy as np

from tandem.engine.data.group_bytes import group_from_bytes, group_to_bytes
from tandem.engine.types import Group, Prompt, Response, Segment, StopState, Verdict


def segment(tokens: tuple[int, ...], version: int, routed: tuple[int, int] | None = None) -> Segment:
    experts = (
        None if routed is None else np.arange(len(tokens) * routed[0] * routed[1], dtype=np.int16).reshape(len(tokens), *routed) - version
    )
    return Segment(token_ids=tokens, logprobs=tuple(-0.5 * token for token in tokens), policy_version=version, routed_experts=experts)


def test_recorded_experts_come_back_with_their_segments() -> None:
    responses = (
        Response(sample=0, segments=(segment((1, 2, 3), 4, (2, 3)), segment((7,), 5), segment((8, 9), 6, (2, 3))), stop=StopState.FINISHED),
        Response(sample=1),
        Response(sample=2, segments=(segment((5, 6), 6, (1, 1)),), stop=StopState.LENGTH),
    )
    group = Group(prompt=Prompt(id="p", text="?", token_ids=(1, 2), answer="é"), responses=responses, verdicts=(Verdict(correct=True),))
    back = group_from_bytes(group_to_bytes(group))
    assert back == group
    for old, new in zip(group.responses, back.responses, strict=True):
        for a, b in zip(old.segments, new.segments, strict=True):
            assert (a.routed_experts is None) == (b.routed_experts is None)
            if a.routed_experts is not None and b.routed_experts is not None:
                assert b.routed_experts.dtype == np.int16
                assert np.array_equal(a.routed_experts, b.routed_experts)


def test_rows_written_before_experts_were_recorded_still_load() -> None:
    header = {
        "prompt": {"id": "p", "text": "?", "token_ids": 2, "answer": "1", "domain": "math", "level": 0},
        "responses": [{"sample": 0, "stop": "finished", "segments": [[2, 3], [1, 4]]}],
        "verdicts": [],
        "first_iteration": 1,
        "serial": 2,
    }
    text = json.dumps(header).encode()
    arrays = np.array([1, 2], "<i4").tobytes() + np.array([5, 6, 7], "<i4").tobytes() + np.array([-0.5, -1, -2], "<f4").tobytes()
    group = group_from_bytes(len(text).to_bytes(8, "little") + text + arrays)
    (response,) = group.responses
    assert response.token_ids == (5, 6, 7)
    assert response.behaviour_logprobs == (-0.5, -1.0, -2.0)
    assert response.policy_versions == (3, 3, 4)
    assert [s.routed_experts for s in response.segments] == [None, None]
