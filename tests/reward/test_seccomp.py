"""The system call filter, run by an interpreter of its own: what the kernel of this machine does with it, the attacks show."""

import struct

import pytest

from tandem.engine.reward import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def decide(machine: str, number: int, argument: int = 0, arch: int | None = None) -> int:
    """What the filter returns for a call (classic BPF, the instructions that it uses)."""
    data = struct.pack("<IIQ6Q", number, ARCH[machine] if arch is None else arch, 0, argument, 0, 0, 0, 0, 0)
    steps = list(struct.iter_unpack("<HBBI", seccomp.program(machine)))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            [accumulator] = struct.unpack_from("<I", data, value)
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[code]
            at += if_true if holds else if_false


def refused(error: int) -> int:
    return 0x00050000 | error


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_listed_calls_are_refused_and_others_allowed(machine: str, column: int) -> None:
    listed = {numbers[column] for numbers in seccomp.REFUSED.values()} - {None}
    special = {seccomp.CLONE[column], seccomp.CLONE3[column], seccomp.SOCKET[column]}
    for number in range(seccomp.NEWEST_KNOWN + 1):
        if number not in special:
            assert decide(machine, number) == (refused(seccomp.EPERM) if number in listed else ALLOW), number


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_processes_yes_namespaces_no_and_sockets_of_this_machine_only(machine: str, column: int) -> None:
    assert decide(machine, seccomp.CLONE[column], 17) == ALLOW  # fork: SIGCHLD
    assert decide(machine, seccomp.CLONE[column], 0x3D0F00) == ALLOW  # a thread
    for flag in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(machine, seccomp.CLONE[column], 17 | flag) == refused(seccomp.EPERM)
    assert decide(machine, seccomp.CLONE3[column]) == refused(seccomp.ENOSYS)
    assert [family for family in range(64) if decide(machine, seccomp.SOCKET[column], family) == ALLOW] == [1]


def test_unknown_calls_and_other_abis_are_refused() -> None:
    assert decide("x86_64", seccomp.NEWEST_KNOWN + 1) == refused(seccomp.ENOSYS)
    assert decide("x86_64", seccomp.X32 + 39) == refused(seccomp.ENOSYS)
    assert decide("x86_64", 39, arch=0x40000003) == KILL  # the 32-bit calls


def test_a_machine_without_a_list_is_an_error() -> None:
    with pytest.raises(ValueError, match="no system call filter for riscv64"):
        seccomp.program("riscv64")
