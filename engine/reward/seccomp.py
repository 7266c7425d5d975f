"""The system call filter of sandboxed programs, as classic BPF for seccomp(2).

A list of what is refused, not of what is allowed: four language runtimes must live with it, on kernels that differ. What programs of one
process tree need no privilege for, but which reaches into the kernel's least tested parts or across processes, is refused with EPERM.
Calls younger than the list are refused with ENOSYS, so that a new kernel brings no new way out.
"""

import platform
import struct

EPERM, ENOSYS = 1, 38
AF_UNIX = 1
CLONE_NEW_ANY = 0x7E020000  # every CLONE_NEW* flag of clone(2): mount, cgroup, uts, ipc, user, pid, net

# name: number on x86-64, on aarch64 (None: does not exist there). Sources: asm/unistd_64.h and asm-generic/unistd.h of Linux.
REFUSED: dict[str, tuple[int, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "perf_event_open": (298, 241),
    # namespaces, mounts, handles of files
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # what outlives a process: keys
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # parts of the kernel with many past holes
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "modify_ldt": (154, None),
    "vmsplice": (278, 75),
    # the machine
    "personality": (135, 92),
    "syslog": (103, 116),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "lookup_dcookie": (212, 18),
}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
NEWEST_KNOWN = 462  # mseal, Linux 6.10
X32 = 0x40000000  # calls of the x32 ABI, numbered anew from here: beyond the newest known, so refused with them

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data, both machines little endian


def program(machine: str | None = None) -> bytes:
    """The filter for this machine, 8 bytes an instruction (struct sock_filter).

    Raises: ValueError for a machine whose system calls are not in the list.
    """
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        raise ValueError(f"there is no system call filter for {machine}; there is one for {', '.join(_AUDIT_ARCH)}")
    column = 0 if machine == "x86_64" else 1

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    def refuse(error: int) -> bytes:
        return step(_RETURN, _ERRNO | error)

    allow = step(_RETURN, _ALLOW)
    steps = [
        step(_LOAD, _ARCH),
        step(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        step(_RETURN, _KILL_PROCESS),  # another ABI, where the numbers mean other calls
        step(_LOAD, _NUMBER),
        step(_JUMP_GREATER, NEWEST_KNOWN, 0, 1),
        refuse(ENOSYS),
        # its flags lie in memory, where a filter cannot look; with ENOSYS the C library falls back on clone
        step(_JUMP_EQUAL, CLONE3[column], 0, 1),
        refuse(ENOSYS),
        step(_JUMP_EQUAL, CLONE[column], 0, 4),
        step(_LOAD, _ARGUMENT_0),
        step(_JUMP_ANY_BIT, CLONE_NEW_ANY, 0, 1),
        refuse(EPERM),
        allow,
        step(_JUMP_EQUAL, SOCKET[column], 0, 4),
        step(_LOAD, _ARGUMENT_0),
        step(_JUMP_EQUAL, AF_UNIX, 1, 0),
        refuse(EPERM),
        allow,
    ]
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            steps += [step(_JUMP_EQUAL, number, 0, 1), refuse(EPERM)]
    return b"".join([*steps, allow])
