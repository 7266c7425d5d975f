"""How a rollout-only node runs (rollout_node.py)."""

import re
from dataclasses import dataclass

from tandem.engine.model_config import check

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """How a node runs; everything else is the run's."""

    host: str | None = None
    """This machine's address, as the trainer's machines reach it. None: that of the interface that leads to other networks."""
    port: int | None = None
    """Port of the SGLang server. None: any free one."""
    control_port: int | None = None
    """Port of the commands of the trainer's ranks. None: any free one."""
    name: str | None = None
    """Name of the node, different for each. None: host name and process."""
    python: str | None = None
    """Interpreter of SGLang's environment. None: as in the run."""
    tp: int = 1
    """GPUs (on a CPU: processes) that share the model."""
    first_gpu: int = 0
    """Number of the first of them."""
    threads: int = 1
    """CPU threads of each of the tp processes, where there is no GPU."""
    batch: int | None = None
    """Most responses at the same time. None: rollout.max_batch of the run."""
    wait_s: float = 600.0
    """How long the run folder may have no config.json yet, in seconds."""
    idle_s: float = 1800.0
    """Without a word from the run for so long, the node ends, in seconds."""
    grace_s: float = 600.0
    """After SIGTERM or Ctrl-C its present responses may take so long, in seconds; then they are generated elsewhere."""

    def __post_init__(self) -> None:
        for field, least in (("tp", 1), ("first_gpu", 0), ("threads", 1), ("wait_s", 0), ("idle_s", 0), ("grace_s", 0)):
            check(getattr(self, field) >= least, field, getattr(self, field), f"it must be at least {least}")
        for field in ("port", "control_port"):
            port = getattr(self, field)
            check(port is None or 0 < port < 1 << 16, field, port, "it must lie between 1 and 65535, or be None")
        check(self.batch is None or self.batch >= 1, "batch", self.batch, "it must be at least 1, or None")
        rule = "it becomes a file's: letters, digits, . _ and - only, not beginning with a dot"
        check(self.name is None or _NAME.fullmatch(self.name) is not None, "name", self.name, rule)
