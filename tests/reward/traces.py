"""What runs in the sandbox could leave on a machine."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Traces:
    """What a run could leave on the machine. Workers, whose group has their id, may have been replaced: they are counted."""

    num_processes: int
    mounts: frozenset[str]
    num_cgroups: int
    shared_memory: frozenset[str]
    temporary: frozenset[str]

    @classmethod
    def now(cls) -> "Traces":
        """Of this process: what others do at the same time is not ours."""
        groups = [str(path) for path in Path("/sys/fs/cgroup").rglob(f"tandem-{os.getpid()}-*") if path.is_dir()]
        mounts = [
            line for line in Path("/proc/self/mounts").read_text().splitlines() if re.search(r" /(box|mnt|tmp|dev/shm)/?\S* tmpfs", line)
        ]
        return cls(
            num_processes=len(psutil.Process().children(recursive=True)),
            mounts=frozenset(mounts),
            num_cgroups=len(groups),
            shared_memory=frozenset(name for name in os.listdir("/dev/shm") if "hostile" in name),
            temporary=frozenset(name for name in os.listdir("/tmp") if "hostile" in name),
        )


def settled(before: Traces, timeout_s: float = 60.0) -> Traces:
    """What is there once it is no more than before, or after the time."""
    deadline = time.monotonic() + timeout_s
    while (after := Traces.now()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    return after
