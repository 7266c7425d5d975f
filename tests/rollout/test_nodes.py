"""What nodes announce, and which leader takes which."""

import dataclasses
import itertools
import json
import random
import stat
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.rollout.nodes import Announcement, assign, model_digest, read_announcement, write_announcement

GOOD = Announcement(
    protocol=1,
    name="a",
    start="a-1",
    host="10.0.0.7",
    port=3000,
    control_port=3001,
    secret="s",
    sglang="0.5.21",
    model="abc",
    max_batch=64,
)


def read(folder: Path, **changes: Any) -> Announcement:
    path = folder / "a.json"
    path.write_text(json.dumps(dataclasses.asdict(GOOD) | changes))
    return read_announcement(path, model="abc", sglang="0.5.21")


def test_what_is_written_is_read_and_only_the_owner_may_read_it(tmp_path: Path) -> None:
    path = write_announcement(tmp_path / "nodes", GOOD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_announcement(path, model="abc", sglang="0.5.21") == GOOD
    assert (GOOD.url, GOOD.control_url) == ("http://10.0.0.7:3000", "http://10.0.0.7:3001")
    assert dataclasses.replace(GOOD, host="fd00::7").url == "http://[fd00::7]:3000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": 2}, "its protocol is 2, this run speaks 1; start the node with the run's version"),
        ({"protocol": None}, "its protocol is None"),
        ({"port": "3000"}, "its field port is '3000', which is no announcement's"),
        ({"port": True}, "its field port is True"),
        ({"port": 0}, "its port is 0; it must be at least 1"),
        ({"max_batch": -1}, "its max_batch is -1; it must be at least 1"),
        ({"more": 1}, "its field more is 1"),
        ({"name": "b"}, "it says that it is 'b'; the file's name must be the node's"),
        ({"model": "abd"}, r"its model is abd, the run's is abc \(config.json, dtype or context differ\); start it again"),
        ({"sglang": "0.5.17"}, "it has SGLang 0.5.17, the run has 0.5.21; install the same, or set its --python"),
    ],
)
def test_what_does_not_suit_the_run_is_named_with_what_to_do(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"protocol": 1}', "\x00" * 40])
def test_garbage_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"it is no JSON|its protocol is|its field name is None"):
        read_announcement(tmp_path / "a.json", model="abc", sglang="0.5.21")


def test_the_model_s_digest_depends_on_all_that_a_server_is_started_with() -> None:
    config = {"hidden_size": 8, "rope_parameters": {"rope_theta": 1e4}}
    digests = {
        model_digest(config, dtype="float32", context_length=64),
        model_digest(config, dtype="bfloat16", context_length=64),
        model_digest(config, dtype="float32", context_length=65),
        model_digest(config | {"hidden_size": 9}, dtype="float32", context_length=64),
    }
    assert len(digests) == 4
    assert model_digest(dict(reversed(config.items())), dtype="float32", context_length=64) in digests


def fewest_moves(nodes: list[str], leaders: list[int], before: dict[str, int]) -> int:
    """By trying everything."""
    fewest = len(nodes)
    for owners in itertools.product(leaders, repeat=len(nodes)):
        counts = [owners.count(leader) for leader in leaders]
        if max(counts) - min(counts) <= 1:
            fewest = min(fewest, sum(before.get(node, owner) != owner for node, owner in zip(nodes, owners, strict=True)))
    return fewest


@pytest.mark.parametrize("seed", range(60))
def test_nodes_are_spread_evenly_with_as_few_moves_as_can_be(seed: int) -> None:
    generator = random.Random(seed)
    leaders = list(range(0, 2 * generator.randrange(1, 4), 2))
    names = [f"node{i}" for i in range(6)]
    before = {name: generator.choice([*leaders, 99]) for name in names if generator.random() < 0.7}
    nodes = generator.sample(names, generator.randrange(7))
    dealt = assign(nodes, leaders, before)
    assert set(dealt) == set(nodes)
    counts = [list(dealt.values()).count(leader) for leader in leaders]
    assert max(counts) - min(counts) <= 1
    known = {name: leader for name, leader in before.items() if leader in leaders}
    assert sum(known.get(node, leader) != leader for node, leader in dealt.items()) == fewest_moves(nodes, leaders, known)
    assert assign(sorted(nodes), leaders, dealt) == dealt
