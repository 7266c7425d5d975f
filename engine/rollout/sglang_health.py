"""Whether a running SGLang server still answers, and what can be learnt of one that does not, or that ended.

A process that ends is noticed by itself. One that hangs looks alive: it has to be asked.
"""

import asyncio
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from tandem.engine.config import SGLangConfig
from tandem.engine.rollout.sglang_client import ServerGoneError, SGLangClient
from tandem.engine.rollout.sglang_guard import processes

# Goes through every process of the server and back. Unlike /health it generates nothing, which a server without weights or cache could not.
_QUESTION = "/server_info"
_STATES = {"R": "running", "S": "asleep", "D": "waiting for a device", "T": "stopped by a signal", "t": "stopped by a debugger"}
_MAX_FRAMES = 8
_SPY_TIMEOUT_S = 20.0
_QUOTE_CHARS = 400
_NO_MEMORY = re.compile(r"out of memory|OutOfMemoryError|not enough memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_NO_PORT = re.compile(r"address already in use|errno 98", re.IGNORECASE)


async def watch(client: SGLangClient, config: SGLangConfig) -> str:
    """Ask the server every `health_interval_s`. Returns what is wrong once it does not answer; "" once it is gone.

    While a command of the client runs, its own deadline counts: a process that loads weights answers nobody else.
    """
    while True:
        await asyncio.sleep(config.health_interval_s)
        num_commands = client.num_commands
        try:
            async with asyncio.timeout(config.health_timeout_s):
                await client.get(_QUESTION)
        except TimeoutError:
            if client.num_running == 0 and client.num_commands == num_commands:
                return f"answered no health check for rollout.sglang.health_timeout_s={config.health_timeout_s:g} s"
        except ServerGoneError:
            return ""
        except RuntimeError:
            continue  # an answer, if not a good one: what is wrong shows where it matters


def stacks(guard_pid: int, python: Path) -> str:
    """What the processes of a server are doing: their states, and the main threads' innermost frames where its environment has py-spy."""
    parts = list[str]()
    for session in sessions(guard_pid):
        for pid in sorted(processes(session)):
            with suppress(OSError):
                title = (Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())[:60]
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                parts.append(f"process {pid}, {title!r}, {_STATES.get(state, state)}")
                parts += [f"    {frame}" for frame in _frames(pid, python.with_name("py-spy"))]
    return "\n".join(parts)


def sessions(guard_pid: int) -> list[int]:
    """The session of the processes that a guard watches; none once there is no guard."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{guard_pid}/task/{guard_pid}/children").read_text().split()]
    return []


def _frames(pid: int, spy: Path) -> list[str]:
    command = [str(spy), "dump", "--nonblocking", "--pid", str(pid)]  # to stop a process for it would wait for one that cannot run
    try:
        dump = subprocess.run(command, capture_output=True, text=True, timeout=_SPY_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    _, _, main = dump.partition('"MainThread"\n')
    return [line.strip() for line in main.partition("\nThread ")[0].splitlines()[:_MAX_FRAMES]]


def cause_in(log: str) -> str:
    """The line of a server's log that tells of too little memory, or of a port that was taken, and what to do; "" without one."""
    for pattern, advice in (
        (_NO_MEMORY, "it ran out of memory: lower rollout.sglang.memory_fraction, rollout.sglang.kv_tokens or rollout.max_batch"),
        (_NO_PORT, "its port was taken while it started: choose another rollout.sglang.port, or None: another at each start"),
    ):
        lines = [line.strip() for line in log.splitlines() if pattern.search(line)]
        if lines:
            return f"{advice} (it said: {lines[-1][:_QUOTE_CHARS]})"
    return ""
