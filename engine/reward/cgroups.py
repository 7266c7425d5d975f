"""Control groups of the sandbox's workers: made once, with the worker, and used by all of its runs in turn.

A worker's processes stay in its group for life: no run pays for moving a process, which waits for the whole machine's forks. Version 1
has one hierarchy for each controller, version 2 one for all. Where neither can be had, `find` says why.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.engine.reward.execution import MIB, Limits

V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")
PERIOD_US = 100_000  # of the CPU quota; the kernel's default
ALLOWANCE_BYTES = 32 * MIB  # for the zygote and the supervisor, which share the group with the program
ALLOWANCE_PROCESSES = 4
LARGEST_CHARGE_BYTES = 8 * MIB  # a peak so far below the limit may be the last before a charge (a huge page) that did not fit


class CgroupError(RuntimeError):
    """A control group cannot be made or set up; says which file refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchies:
    """Where groups can be made: a folder for each controller (version 1), or the same one for all (version 2)."""

    version: int
    folders: dict[str, Path]

    def sweep(self) -> int:
        """Remove the empty groups of engines that were killed. Returns how many."""
        num_removed = 0
        for folder in set(self.folders.values()):
            for group in folder.glob("tandem-*-*"):
                if not Path("/proc", group.name.split("-")[1]).exists():
                    try:
                        group.rmdir()
                        num_removed += 1
                    except OSError:
                        continue  # still in use, by somebody in another container
        return num_removed


def find(mounts_file: Path = Path("/proc/self/mounts"), own_file: Path = Path("/proc/self/cgroup")) -> Hierarchies:
    """The folders below this process's own groups, so that the limits of its container hold for the sandbox too.

    Raises: CgroupError if no version offers memory and process limits to this process.
    """
    mounts = [line.split()[1:4] for line in mounts_file.read_text().splitlines()]
    own = {tuple(names.split(",")): path for _, names, path in (line.split(":", 2) for line in own_file.read_text().splitlines())}
    problems = []
    folders = {}
    for mount, kind, options in mounts:
        for controller in V1_CONTROLLERS:
            if kind == "cgroup" and controller in options.split(","):
                path = next((path for names, path in own.items() if controller in names), "/")
                folders[controller] = _below(Path(mount), path)
    if {"memory", "pids"} <= folders.keys():
        refused = [str(folder) for folder in folders.values() if not os.access(folder, os.W_OK)]
        if not refused:
            return Hierarchies(version=1, folders=folders)
        problems.append(f"no permission to write to {', '.join(refused)}")
    for mount, kind, _ in mounts:
        if kind == "cgroup2":
            folder = _below(Path(mount), own.get(("",), "/"))
            problem = _enable(folder)
            if problem is None:
                return Hierarchies(version=2, folders=dict.fromkeys(("memory", "pids", "cpu"), folder))
            problems.append(problem)
    raise CgroupError("; ".join(problems) or "no cgroup file system is mounted")


def _below(mount: Path, path: str) -> Path:
    """In a container the path may be the host's, while the mount shows only a part of it."""
    inside = mount / path.lstrip("/")
    return inside if inside.is_dir() else mount


def _enable(folder: Path) -> str | None:
    """Hand the controllers of version 2 down to the groups below; None, or why that fails."""
    try:
        offered = (folder / "cgroup.controllers").read_text().split()
        if missing := {"memory", "pids", "cpu"} - set(offered):
            return f"{folder} does not offer {', '.join(sorted(missing))}"
        if {"memory", "pids", "cpu"} <= set((folder / "cgroup.subtree_control").read_text().split()):
            return None
        if (folder / "cgroup.procs").read_text().split() == [str(os.getpid())]:
            # groups with processes cannot hand controllers down: this process moves into a leaf of its own
            leaf = folder / "tandem-engine"
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text(str(os.getpid()))
        (folder / "cgroup.subtree_control").write_text("+memory +pids +cpu")
    except OSError as error:
        return f"{folder} is not delegated to this process ({error.strerror}); start it with systemd-run --scope -p Delegate=yes"
    return None


class Cgroup:
    """The group of one worker: a folder in each hierarchy."""

    def __init__(self, hierarchies: Hierarchies, name: str, limits: Limits) -> None:
        """Raises: CgroupError, leaving nothing behind."""
        self.hierarchies = hierarchies
        self._folders = {controller: folder / name for controller, folder in hierarchies.folders.items()}
        self._is_v1 = hierarchies.version == 1
        self._limit_bytes: int | None = None
        self._num_limit_hits = 0
        try:
            for folder in self._each():
                folder.mkdir()
            self._write("pids", "pids.max", limits.processes + ALLOWANCE_PROCESSES)
            self._set_cores(limits.cores)
            self.limit_memory(limits.memory_bytes)
        except OSError as error:
            self.remove()
            raise CgroupError(f"the control group {name} cannot be set up: {error}") from error

    @property
    def cpu_usage_file(self) -> Path | None:
        """CPU time of the group: nanoseconds (version 1), or lines that begin with microseconds (version 2)."""
        if not self._is_v1:
            return self._folders["cpu"] / "cpu.stat"
        return self._folders["cpuacct"] / "cpuacct.usage" if "cpuacct" in self._folders else None

    def add(self, pid: int) -> None:
        for folder in self._each():
            (folder / "cgroup.procs").write_text(str(pid))

    def limit_memory(self, memory_bytes: int) -> None:
        total = memory_bytes + ALLOWANCE_BYTES
        if total == self._limit_bytes:
            return
        if not self._is_v1:
            self._write("memory", "memory.max", total)
            self._write_if_there("memory", "memory.swap.max", 0)
            self._write_if_there("memory", "memory.oom.group", 0)  # 1 would take the zygote along
        else:
            # memory and swap together may never be below memory alone
            names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
            for name in names if self._limit_bytes is None or total < self._limit_bytes else reversed(names):
                self._write_if_there("memory", name, total)
        self._limit_bytes = total

    def num_oom_kills(self) -> int:
        """Processes that were ended for lack of memory: the group's, or that of the machine or of a group above."""
        return self._count("memory.oom_control" if self._is_v1 else "memory.events", "oom_kill")

    def used_bytes(self) -> int:
        return self._read("memory", "memory.usage_in_bytes" if self._is_v1 else "memory.current")

    def reset_peak(self) -> None:
        if self._is_v1:
            self._write("memory", "memory.max_usage_in_bytes", 0)
        else:
            self._num_limit_hits = self._limit_events()

    def reached_limit(self) -> bool:
        """Whether the group came to its own memory limit since `reset_peak`."""
        if self._is_v1:  # by the peak: not every kernel counts in memory.failcnt
            assert self._limit_bytes is not None, "set with the group"
            return self._read("memory", "memory.max_usage_in_bytes") > self._limit_bytes - LARGEST_CHARGE_BYTES
        return self._limit_events() > self._num_limit_hits

    def _limit_events(self) -> int:
        return self._count("memory.events", "max") + self._count("memory.events", "oom")

    def peak_bytes(self) -> int | None:
        """Since `reset_peak`; None where it cannot be reset (version 2: one for the group's whole life)."""
        return self._read("memory", "memory.max_usage_in_bytes") if self._is_v1 else None

    def pids(self) -> list[int]:
        return [int(line) for line in (self._folders["pids"] / "cgroup.procs").read_text().split()]

    def remove(self, timeout_s: float = 5.0) -> None:
        """Remove the folders, waiting for processes that are on their way out.

        Raises: CgroupError if some are still there after that.
        """
        deadline = time.monotonic() + timeout_s
        for folder in self._each():
            while folder.is_dir():
                try:
                    folder.rmdir()
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise CgroupError(f"the control group {folder} cannot be removed: {error.strerror}") from error
                    time.sleep(0.005)

    def _each(self) -> Sequence[Path]:
        return list(dict.fromkeys(self._folders.values()))

    def _set_cores(self, cores: float) -> None:
        if not self._is_v1:
            self._write("cpu", "cpu.max", f"{int(cores * PERIOD_US)} {PERIOD_US}")
        elif "cpu" in self._folders:
            self._write_if_there("cpu", "cpu.cfs_period_us", PERIOD_US)
            self._write_if_there("cpu", "cpu.cfs_quota_us", int(cores * PERIOD_US))

    def _count(self, name: str, event: str) -> int:
        counts = dict(line.split() for line in (self._folders["memory"] / name).read_text().splitlines())
        return int(counts.get(event, 0))

    def _read(self, controller: str, name: str) -> int:
        return int((self._folders[controller] / name).read_text())

    def _write(self, controller: str, name: str, value: object) -> None:
        (self._folders[controller] / name).write_text(str(value))

    def _write_if_there(self, controller: str, name: str, value: object) -> None:
        if (self._folders[controller] / name).exists():
            self._write(controller, name, value)
