"""Five thousand responses, one in a hundred hostile, workers killed meanwhile, and a judge model whose endpoint misbehaves."""

import contextlib
import os
import random
import signal
from typing import Any

import pytest

from tandem.engine.config import RewardConfig
from tandem.engine.reward.judge import Judge
from tandem.engine.reward.math import POOL
from tandem.engine.types import Group
from tests.reward.chat_endpoint import Answer, chat_server, completion
from tests.reward.test_judge import ByteTokenizer, group_of

HOSTILE = ("{" * 10**5, r"\boxed{9**9**9**9}", r"\boxed{\sum_{k=1}^{10^9} \frac{1}{k^2+k^3}}", "1" * 10**6, r"\boxed{" + "(" * 400)
ROOT = r"\boxed{\sqrt{8}}"  # takes a worker


def misbehaving(body: dict[str, Any], number: int) -> Answer:
    """Right for responses that say 18; every fourth request goes wrong in another way."""
    wrong_ways = (
        Answer(body="busy", status=429, headers={"Retry-After": "0"}),
        Answer(body="broken", status=500),
        Answer(body="<html>"),
        Answer(body=completion("I think that it is right")),
        Answer(body=completion('{"correct": "yes"}')),
        Answer(body=completion('{"correct": true}'), delay_s=3.0),  # longer than an attempt
    )
    if number % 4 == 3 and number < 400:
        return wrong_ways[number // 4 % len(wrong_ways)]
    said = body["messages"][-1]["content"]
    return Answer(body=completion(f'It says so. {{"correct": {str("it is 18" in said).lower()}}}'))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hostile_text_dying_workers_and_a_broken_endpoint_cost_no_response_its_verdict() -> None:
    generator = random.Random(0)
    texts = [HOSTILE[i // 100 % len(HOSTILE)] if i % 100 == 0 else ROOT if i % 20 == 1 else rf"\boxed{{{17 + i % 2}}}" for i in range(4500)]
    groups = [group_of(*texts[i : i + 9], domain="math", answer="18", serial=i // 9) for i in range(0, 4500, 9)]
    groups += [group_of(*(f"it is {17 + i % 2}" for i in range(10)), domain="judge", serial=500 + i) for i in range(50)]
    scored: list[Group] = []
    num_killed = 0
    with chat_server(misbehaving) as server:
        config = RewardConfig(judge_url=server.url, judge_timeout_s=4.0, judge_concurrency=16, max_retries=3)
        with contextlib.closing(Judge(config, ByteTokenizer())) as judge:
            for number, group in enumerate(groups):
                judge.submit(group)
                scored += judge.take_scored()
                if number % 25 == 24 and (pids := POOL.worker_pids):
                    with contextlib.suppress(ProcessLookupError):  # it ended by itself
                        os.kill(generator.choice(pids), signal.SIGKILL)
                        num_killed += 1
            scored += judge.finish()
            stats = judge.take_stats()
    assert [group.serial for group in scored] == [group.serial for group in groups]
    assert num_killed >= 10
    for group in scored:
        for response, verdict in zip(group.responses, group.verdicts, strict=True):
            text = ByteTokenizer().decode(response.token_ids, skip_special_tokens=True)
            if text in HOSTILE:
                assert not verdict.correct
            else:
                assert (verdict.correct, verdict.graded) == ("18" in text, True), (text, verdict)
    assert stats["math"].num_responses == 4500
    assert stats["judge"].num_responses == 500
    assert stats["judge"].num_not_graded == 0
