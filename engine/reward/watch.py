"""Feeding a program, taking its output and stopping it at its limits, as process 1 of its namespace. Standard library only."""

import contextlib
import os
import select
import signal
import stat
import time

CHUNK = 1 << 16
LONGEST_WAIT_S = 0.1  # orphans that ended count as processes until somebody notices
MAX_COLLECTED_BYTES = 64 << 20


class Child:
    """The parent's ends of a program's pipes, and its id."""

    def __init__(self, pid, stdin, stdout, stderr):
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr


def cpu_seconds(settings):
    """Of everything in the worker's cgroup, or None without one."""
    if settings["cpu_fd"] is None:
        return None
    text = os.pread(settings["cpu_fd"], 4096, 0).decode()
    if text.startswith("usage_usec"):  # cgroup v2
        return int(text.split()[1]) / 1e6
    return int(text) / 1e9


def watch(program, channel, request, settings):
    """Feeds the program and takes its output until it ends or reaches a limit, then ends all processes of the run."""
    limits = request["limits"]
    unsent = memoryview(request["blobs"]["stdin"])
    output = {program.stdout: bytearray(), program.stderr: bytearray()}
    poller = select.poll()
    for end in output:
        poller.register(end, select.POLLIN)
    poller.register(os.pidfd_open(program.pid), select.POLLIN)
    poller.register(channel.socket, select.POLLRDHUP)
    if unsent:
        poller.register(program.stdin, select.POLLOUT)
    else:
        os.close(program.stdin)
    start, start_cpu = time.monotonic(), cpu_seconds(settings)
    cause = ended = None
    while cause is None and ended is None:
        cpu_left = limits["cpu_s"] - ((cpu_seconds(settings) or 0.0) - start_cpu) if start_cpu is not None else limits["cpu_s"]
        wall_left = limits["wall_s"] - (time.monotonic() - start)
        if cpu_left <= 0 or wall_left <= 0:
            cause = "cpu" if cpu_left <= 0 else "wall"
            break
        for end, event in poller.poll(1000 * max(0.001, min(wall_left, cpu_left / limits["cores"], LONGEST_WAIT_S))):
            if end == channel.socket.fileno():
                os._exit(1)  # nobody waits for the result
            elif end == program.stdin:
                unsent = feed(program, unsent, event, poller)
            elif end in output and not take(end, output[end], limits["output_bytes"]):
                poller.unregister(end)
            if end in output and len(output[end]) > limits["output_bytes"]:
                cause = "output"
        ended = reap(program.pid)
    wall_s, end_cpu = time.monotonic() - start, cpu_seconds(settings)
    end_all()
    if ended is None:
        ended = reap(program.pid, wait=True)
    for end, data in output.items():
        while len(data) <= limits["output_bytes"] and take(end, data, limits["output_bytes"]):
            pass
        if len(data) > limits["output_bytes"]:
            cause = cause or "output"
            del data[limits["output_bytes"] :]
    assert ended is not None, "the program is waited for above"
    code, usage = ended
    message = {
        "code": code,
        "cause": cause,
        "wall_s": wall_s,
        "cpu_s": usage.ru_utime + usage.ru_stime if end_cpu is None or start_cpu is None else end_cpu - start_cpu,
        "resident_bytes": usage.ru_maxrss * 1024,
    }
    blobs = {"stdout": bytes(output[program.stdout]), "stderr": bytes(output[program.stderr])}
    if code == 0 and cause is None:
        blobs.update({f"file:{name}": data for name in request["collect"] if (data := collect(name)) is not None})
    return message, blobs


def feed(program, unsent, event, poller):
    try:
        unsent = unsent[os.write(program.stdin, unsent[:CHUNK]) :]
    except BlockingIOError:
        return unsent
    except BrokenPipeError:
        unsent = unsent[len(unsent) :]
    if not unsent:
        poller.unregister(program.stdin)
        os.close(program.stdin)
    return unsent


def take(end, data, limit):
    """One chunk, at most one byte beyond the limit; False when there is nothing (more)."""
    try:
        chunk = os.read(end, min(CHUNK, limit + 1 - len(data)))
    except BlockingIOError:
        return False
    data += chunk
    return bool(chunk)


def reap(pid, wait=False):
    """Exit code and resource usage of the program if it has ended; also takes in orphans that have."""
    ended = None
    while True:
        try:
            child, status, usage = os.wait4(pid if wait else -1, 0 if wait else os.WNOHANG)
        except ChildProcessError:
            return ended
        if child == 0:
            return ended
        if child == pid:
            ended = os.waitstatus_to_exitcode(status), usage
            if wait:
                return ended


def end_all():
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # everything in this namespace but process 1


def collect(name):
    """A plain file that the program left; nothing that only looks like one."""
    try:
        fd = os.open(os.path.join("/box", name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        data = file.read(MAX_COLLECTED_BYTES + 1)
    return data if len(data) <= MAX_COLLECTED_BYTES else None
