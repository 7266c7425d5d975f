"""Which control groups are used, and what is written to them. Version 2 on folders that look like it: plain files keep what is written."""

import os
from pathlib import Path

import pytest

from tandem.engine.reward.cgroups import ALLOWANCE_BYTES, ALLOWANCE_PROCESSES, Cgroup, CgroupError, Hierarchies, find
from tandem.engine.reward.execution import MIB, Limits

LIMITS = Limits(memory_bytes=100 * MIB, processes=10, cores=0.5)


def machine(folder: Path, mounts: str, own: str) -> tuple[Path, Path]:
    """The two files of /proc that say what is mounted where, and which groups this process is in."""
    (folder / "mounts").write_text(mounts)
    (folder / "own").write_text(own)
    return folder / "mounts", folder / "own"


def version_2(folder: Path, *, offered: str = "cpu memory pids", handed_down: str = "", procs: str = "") -> Path:
    group = folder / "cgroup2" / "user" / "run"
    group.mkdir(parents=True)
    (group / "cgroup.controllers").write_text(offered)
    (group / "cgroup.subtree_control").write_text(handed_down)
    (group / "cgroup.procs").write_text(procs)
    return group


def test_version_1_is_found_below_the_groups_of_this_process(tmp_path: Path) -> None:
    for controller in ("memory", "pids", "cpu,cpuacct"):
        (tmp_path / controller / "job").mkdir(parents=True)
    mounts = "".join(f"cgroup {tmp_path}/{name} cgroup rw,{name} 0 0\n" for name in ("memory", "pids", "cpu,cpuacct"))
    found = find(*machine(tmp_path, mounts, "3:memory:/job\n2:pids:/elsewhere\n1:cpu,cpuacct:/job\n"))
    assert found.version == 1
    assert found.folders["memory"] == tmp_path / "memory/job"
    assert found.folders["pids"] == tmp_path / "pids"  # the host's path, which this container does not see
    assert found.folders["cpu"] == found.folders["cpuacct"] == tmp_path / "cpu,cpuacct/job"


def test_version_2_hands_its_controllers_down_from_a_group_that_is_delegated(tmp_path: Path) -> None:
    group = version_2(tmp_path)
    found = find(*machine(tmp_path, f"cgroup2 {tmp_path}/cgroup2 cgroup2 rw 0 0\n", "0::/user/run\n"))
    assert found == Hierarchies(version=2, folders={"memory": group, "pids": group, "cpu": group})
    assert (group / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_version_2_moves_a_process_that_is_alone_into_a_leaf(tmp_path: Path) -> None:
    group = version_2(tmp_path, procs=f"{os.getpid()}\n")
    find(*machine(tmp_path, f"cgroup2 {tmp_path}/cgroup2 cgroup2 rw 0 0\n", "0::/user/run\n"))
    assert (group / "tandem-engine" / "cgroup.procs").read_text() == str(os.getpid())


def test_without_controllers_or_groups_the_reason_is_said(tmp_path: Path) -> None:
    version_2(tmp_path, offered="cpu")
    with pytest.raises(CgroupError, match="does not offer memory, pids"):
        find(*machine(tmp_path, f"cgroup2 {tmp_path}/cgroup2 cgroup2 rw 0 0\n", "0::/user/run\n"))
    with pytest.raises(CgroupError, match="no cgroup file system is mounted"):
        find(*machine(tmp_path, "proc /proc proc rw 0 0\n", "0::/\n"))


def test_a_group_of_version_2_gets_its_limits_and_is_read(tmp_path: Path) -> None:
    group = version_2(tmp_path)
    cgroup = Cgroup(Hierarchies(version=2, folders=dict.fromkeys(("memory", "pids", "cpu"), group)), "tandem-1-a", LIMITS)
    own = group / "tandem-1-a"
    assert (own / "memory.max").read_text() == str(100 * MIB + ALLOWANCE_BYTES)
    assert (own / "pids.max").read_text() == str(10 + ALLOWANCE_PROCESSES)
    assert (own / "cpu.max").read_text() == "50000 100000"
    (own / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 3\n")
    cgroup.reset_peak()
    assert not cgroup.reached_limit()
    (own / "memory.events").write_text("low 0\nhigh 0\nmax 8\noom 2\noom_kill 3\n")
    assert cgroup.reached_limit()
    (own / "memory.current").write_text("4096\n")
    (own / "cgroup.procs").write_text("17\n18\n")
    assert (cgroup.num_oom_kills(), cgroup.used_bytes(), cgroup.pids(), cgroup.peak_bytes()) == (3, 4096, [17, 18], None)
    assert cgroup.cpu_usage_file == own / "cpu.stat"
    cgroup.limit_memory(200 * MIB)
    assert (own / "memory.max").read_text() == str(200 * MIB + ALLOWANCE_BYTES)


def test_groups_of_engines_that_are_gone_are_swept(tmp_path: Path) -> None:
    folders = {"memory": tmp_path}
    for name in ("tandem-999999999-a", f"tandem-{os.getpid()}-b", "another"):
        (tmp_path / name).mkdir()
    assert Hierarchies(version=1, folders=folders).sweep() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", f"tandem-{os.getpid()}-b"]


def test_this_machines_groups_hold_a_process_and_its_limits(tmp_path: Path) -> None:
    try:
        hierarchies = find()
    except CgroupError as error:
        pytest.skip(f"no cgroups on this machine: {error}")
    cgroup = Cgroup(hierarchies, f"tandem-{os.getpid()}-test", LIMITS)
    try:
        assert cgroup.pids() == []
        assert cgroup.num_oom_kills() == 0
        cgroup.limit_memory(50 * MIB)
        cgroup.limit_memory(300 * MIB)
    finally:
        cgroup.remove()
    assert not [path for folder in hierarchies.folders.values() for path in folder.glob(f"tandem-{os.getpid()}-test")]
