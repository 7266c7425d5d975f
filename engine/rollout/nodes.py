"""Rollout-only nodes as a run sees them: what they announce in the run folder, and which leader takes which.

A node (engine/rollout_node.py) writes RUN/nodes/NAME.json once its SGLang server is healthy, and removes it when it leaves. The file holds
a secret that every command to the node must show, so it is readable by its owner only.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = "nodes"
PROTOCOL = 1  # of the announcement and of the commands


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """A node that wants to generate."""

    protocol: int
    name: str
    start: str  # differs for each start of the node's server
    host: str  # as the trainer's machines reach it
    port: int  # of SGLang
    control_port: int
    secret: str
    sglang: str  # version
    model: str  # see `model_digest`
    max_batch: int  # responses at the same time

    @property
    def url(self) -> str:
        return f"http://{_in_url(self.host)}:{self.port}"

    @property
    def control_url(self) -> str:
        return f"http://{_in_url(self.host)}:{self.control_port}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def model_digest(hf_config: Mapping[str, Any], *, dtype: str, context_length: int) -> str:
    """What a node's server must have in common with the run's: 16 hexadecimal digits."""
    text = json.dumps([dict(hf_config), dtype, context_length], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_announcement(folder: Path, announcement: Announcement) -> Path:
    """Whole or not at all. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{announcement.name}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.touch(mode=0o600)
    unfinished.write_text(json.dumps(asdict(announcement)))
    unfinished.replace(path)
    return path


def read_announcement(path: Path, *, model: str, sglang: str) -> Announcement:
    """Raises: ValueError saying what is wrong with it for a run of this model on this version of SGLang; OSError."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error}); start `tandem rollout-node` again") from error
    kinds = {field.name: field.type for field in fields(Announcement)}
    if not isinstance(values, dict) or values.get("protocol") != PROTOCOL:
        found = values.get("protocol") if isinstance(values, dict) else values
        raise ValueError(f"its protocol is {found!r}, this run speaks {PROTOCOL}; start the node with the run's version of Tandem")
    wrong = [name for name, kind in kinds.items() if type(values.get(name)) is not kind] + sorted(set(values) - set(kinds))
    if wrong:
        raise ValueError(f"its field {wrong[0]} is {values.get(wrong[0])!r}, which is no announcement's; start `tandem rollout-node` again")
    announcement = Announcement(**values)
    if announcement.name != path.stem:
        raise ValueError(f"it says that it is {announcement.name!r}; the file's name must be the node's")
    if announcement.model != model:
        raise ValueError(f"its model is {announcement.model}, the run's is {model} (config.json, dtype or context differ); start it again")
    if announcement.sglang != sglang:
        raise ValueError(f"it has SGLang {announcement.sglang}, the run has {sglang}; install the same, or set its --python")
    for name in ("port", "control_port", "max_batch"):
        if values[name] < 1:
            raise ValueError(f"its {name} is {values[name]}; it must be at least 1")
    return announcement


def assign(nodes: Sequence[str], leaders: Sequence[int], before: Mapping[str, int]) -> dict[str, int]:
    """Which leader has which node: as evenly as can be, and as few as possible with another leader than before."""
    held: dict[int, list[str]] = {leader: [] for leader in leaders}
    free = list[str]()
    for node in sorted(nodes):
        held.get(before.get(node, -1), free).append(node)
    for node in free:
        held[min(leaders, key=lambda leader: (len(held[leader]), leader))].append(node)
    while True:
        fullest = max(leaders, key=lambda leader: (len(held[leader]), leader))
        emptiest = min(leaders, key=lambda leader: (len(held[leader]), leader))
        if len(held[fullest]) - len(held[emptiest]) <= 1:
            return {node: leader for leader, of_leader in held.items() for node in of_leader}
        held[emptiest].append(held[fullest].pop())
