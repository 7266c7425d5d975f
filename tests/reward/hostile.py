"""Attacks on the sandbox, one of each kind. A program that gets what it must not get prints BROKEN."""

from dataclasses import dataclass

from tandem.engine.reward.execution import Status

SECRET = "the expected output of the hidden test"
LIMITED = (Status.TIME_LIMIT, Status.MEMORY_LIMIT, Status.OUTPUT_LIMIT, Status.RUNTIME_ERROR)


@dataclass(frozen=True)
class Attack:
    name: str
    source: str
    ends: tuple[Status, ...] = (Status.OK,)


def refused(name: str, body: str, setup: str = "") -> Attack:
    """An attack whose statements must all raise."""
    attempts = "\n".join(f"attempt(lambda: {line})" for line in body.strip().splitlines())
    return Attack(name, f"{setup}\n{ATTEMPT}\n{attempts}")


ATTEMPT = """
def attempt(action):
    try:
        print("BROKEN", action())
    except OSError as error:
        print("refused", error.errno)
"""
LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return "done"
"""

ATTACKS = [
    Attack("fork bomb", "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", LIMITED),
    Attack(
        "thread bomb", "import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(100,)).start()", LIMITED
    ),
    Attack("memory bomb", "data = []\nwhile True: data.append(bytearray(1 << 20))", (Status.MEMORY_LIMIT, *LIMITED)),
    Attack(
        "memory bomb in children",
        "import os\nfor _ in range(6):\n    if os.fork() == 0:\n        data = bytearray(60 << 20)\n"
        "        while True: pass\nos.wait()\nwhile True: pass",
        LIMITED,
    ),
    Attack(
        "disk filler",
        "with open('/tmp/hostile', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
        (Status.RUNTIME_ERROR, Status.OUTPUT_LIMIT),
    ),
    Attack(
        "inode filler",
        "n = 0\nwhile True:\n    open(f'/dev/shm/hostile{n}', 'w').close()\n    n += 1",
        (Status.RUNTIME_ERROR, Status.TIME_LIMIT),
    ),
    Attack("infinite output", "while True: print('x' * 4096)", (Status.OUTPUT_LIMIT, Status.TIME_LIMIT)),
    Attack(
        "sleeping orphan that left the session",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(1000)\n    os._exit(0)\nprint('parent ends')",
    ),
    Attack(
        "orphan that holds stdout and goes on writing",
        "import os, time\nif os.fork() == 0:\n    while True:\n        os.write(1, b'x')\n        time.sleep(0.01)\nprint('parent ends')",
    ),
    Attack(
        "files and links for the next run",
        "import os\nfor folder in ('/box', '/tmp', '/dev/shm'):\n    open(folder + '/hostile', 'w').write('x')\n"
        "os.symlink('/etc', '/tmp/hostile-link')\nos.mkfifo('/tmp/hostile-fifo')\nos.link('/tmp/hostile', '/tmp/hostile-hard')",
    ),
    Attack(
        "standard output replaced by a file", "import os\nos.dup2(os.open('/tmp/hostile', os.O_CREAT | os.O_RDWR), 1)\nprint('nowhere')"
    ),
    Attack(
        "module patched for the next run",
        "import builtins, json, random, sys\nbuiltins.print = None\nsys.path.insert(0, '/tmp')\nrandom.seed(1)",
    ),
    refused(
        "symlinks out of scratch space",
        "open('/box/a/passwd').read()\nopen('/box/b/zygote.py', 'a')\nopen('/box/main.lnk', 'w')\nos.rename('/usr', '/box/usr')",
        "import os\nos.symlink('/etc', '/box/a')\n"
        "os.symlink('/tandem/tandem/engine/reward', '/box/b')\n"
        "os.symlink('/usr/bin/env', '/box/main.lnk')",
    ),
    refused(
        "proc tricks",
        "open('/proc/1/mem', 'r+b')\nopen('/proc/1/environ').read()\nos.listdir('/proc/1/fd')\nos.listdir('/proc/1/root/')\n"
        "open('/proc/sys/kernel/core_pattern', 'w')\nopen('/proc/sysrq-trigger', 'w')\nopen('/proc/sys/vm/drop_caches', 'w')\n"
        "put('/proc/self/oom_score_adj', b'-1000')\nopen('/proc/kcore', 'rb').read(1)\nput('/proc/self/uid_map', b'0 0 1')",
        "import os\ndef put(path, data):\n    return os.write(os.open(path, os.O_WRONLY), data)",
    ),
    Attack(
        "signals to the parent",  # where it is the same user, they may be sent, but process 1 of a namespace takes none from inside
        "import os, time\nassert os.getppid() == 1\nfor number in range(1, 65):\n"
        "    try:\n        os.kill(1, number)\n    except OSError:\n        pass\ntime.sleep(0.1)\nprint('still watched')",
    ),
    Attack(
        "signals to everybody",
        "import os\ntry:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\nos.killpg(0, 9)",
        (Status.RUNTIME_ERROR, Status.OK),
    ),
    refused(
        "the tests and the reference answer",
        "open(path).read()\nos.listdir(os.path.dirname(path))\nos.listdir('/home')\n"
        "os.listdir('/var')\nopen('/etc/passwd')\nos.listdir('/sys')",
        "import os, gc, sys\npath = '/' + sys.stdin.read().lstrip('/')\n"
        f"words = {SECRET.split()!r}\n"
        "for thing in gc.get_objects():\n    if isinstance(thing, (str, bytes)) and str(thing) == ' '.join(words): print('BROKEN')",
    ),
    refused(
        "ptrace and other processes' memory",
        "call(libc.ptrace, 16, 1, 0, 0)\ncall(libc.ptrace, 0, 0, 0, 0)\ncall(libc.process_vm_readv, 1, 0, 0, 0, 0, 0)",
        LIBC,
    ),
    refused(
        "network",
        "socket.socket(socket.AF_INET)\nsocket.socket(socket.AF_INET6)\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\n"
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nsocket.socket(38)\nsocket.create_connection(('127.0.0.1', 22), 1)",
        "import socket",
    ),
    refused(
        "setuid, namespaces and mounts",
        "os.setuid(0)\nos.setgid(0)\nos.setgroups([0])\ncall(libc.unshare, 0x10000000)\ncall(libc.unshare, 0x20000)\n"
        "call(libc.mount, b'tmpfs', b'/tmp', b'tmpfs', 0, None)\ncall(libc.umount2, b'/proc', 2)\ncall(libc.chroot, b'/tmp')\n"
        "call(libc.setns, 0, 0)\nos.mknod('/tmp/hostile', 0o660 | 0x6000, 0x801)\nos.chown('/tmp', 0, 0)\nos.nice(-5)",
        LIBC,
    ),
    refused(
        "rarely used system calls",
        "call(libc.syscall, 321, 0, 0, 0)\ncall(libc.syscall, 425, 8, 0)\ncall(libc.syscall, 323, 0)\ncall(libc.syscall, 250, 0, 0)\n"
        "call(libc.syscall, 248, b'user', b'hostile', b'x', 1, -2)\ncall(libc.syscall, 298, 0, 0, 0, 0, 0)\ncall(libc.syscall, 435, 0, 0)\n"
        "call(libc.syscall, 600)\ncall(libc.syscall, 0x40000000 + 39)\ncall(libc.syscall, 135, 0x0040000)",
        LIBC,
    ),
    Attack(
        "set-user-id programs",
        "import os, subprocess\nfor name in ('su', 'mount', 'passwd', 'newgrp'):\n    path = '/usr/bin/' + name\n"
        "    if os.path.exists(path):\n        done = subprocess.run([path, '--version'], capture_output=True)\n"
        "print(subprocess.run(['/usr/bin/id', '-u'], capture_output=True, text=True).stdout.strip() == '0' and 'BROKEN')\n"
        "open('/tmp/hostile', 'w').write('x')\nos.chmod('/tmp/hostile', 0o4755)",
    ),
    Attack(
        "system V and POSIX IPC for the next run",
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.shmget(4242, 4096, 0o1666) != -1 or print('BROKEN: was there already')",
    ),
    Attack("closing everything", "import os\nos.closerange(0, 1000)\nwhile True: pass", (Status.TIME_LIMIT,)),
    Attack(
        "ignoring every signal",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        (Status.TIME_LIMIT,),
    ),
]
