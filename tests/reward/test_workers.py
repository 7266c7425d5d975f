"""Killable workers: deadlines, memory, crashes, and that nothing outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tandem.engine.reward.workers import WorkerError, WorkerPool, WorkerTimeoutError
from tests.reward import worker_calls as calls

WAIT_S = 120


@pytest.fixture(name="pool")
def one_worker() -> Iterator[WorkerPool]:
    with WorkerPool(1, deadline_s=WAIT_S, max_bytes=1 << 30) as pool:
        yield pool


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


def test_calls_run_in_one_other_process_that_starts_with_the_first(pool: WorkerPool) -> None:
    assert pool.worker_pids == []
    assert pool.run(calls.add, 1, 2) == 3
    pids = {pool.run(calls.pid) for _ in range(3)}
    assert pids == set(pool.worker_pids)
    assert os.getpid() not in pids


def test_submit_returns_at_once_and_workers_run_side_by_side() -> None:
    with WorkerPool(2, deadline_s=WAIT_S) as pool:
        futures = [pool.submit(calls.add, i, i) for i in range(200)]
        assert [future.result(WAIT_S) for future in futures] == [2 * i for i in range(200)]
        started = [pool.submit(calls.sleep, 600) for _ in range(2)]
        assert wait_for(lambda: all(future.running() for future in started))
        assert len(pool.worker_pids) == 2


@pytest.mark.parametrize(("call", "arguments"), [(calls.compute_forever, ()), (calls.sleep, (600,))])
def test_a_call_past_its_deadline_costs_its_worker_and_nothing_else(
    pool: WorkerPool, call: Callable[..., object], arguments: tuple[int, ...]
) -> None:
    first = pool.run(calls.pid)
    late = pool.submit(call, *arguments, deadline_s=0.3)
    next_one = pool.submit(calls.pid)
    with pytest.raises(WorkerTimeoutError, match=r"did not end within 0.3 s"):
        late.result(WAIT_S)
    assert next_one.result(WAIT_S) != first
    assert not is_running(first)


def test_the_deadline_does_not_count_the_time_in_the_queue(pool: WorkerPool) -> None:
    first, second = pool.submit(calls.sleep, 2.1), pool.submit(calls.add, 1, 1, deadline_s=2)
    assert (first.result(WAIT_S), second.result(WAIT_S)) == (2.1, 2)


@pytest.mark.parametrize("call", [calls.fill_memory, calls.fill_memory_and_hide_it])
def test_running_out_of_memory_is_an_error_even_where_a_library_hides_it(pool: WorkerPool, call: Callable[[], object]) -> None:
    first = pool.run(calls.pid)
    with pytest.raises(WorkerError, match="out of memory"):
        pool.run(call)
    assert pool.run(calls.pid) != first  # what it used is gone with it


def test_what_the_parent_holds_is_not_counted_against_a_worker() -> None:
    program = """
from tandem.engine.reward.workers import WorkerPool
from tests.reward import worker_calls
held = b"x" * (400 << 20)
with WorkerPool(1, deadline_s=60, max_bytes=512 << 20) as pool:
    print(pool.run(worker_calls.add, 1, 2))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout == "3\n", done.stderr


def test_a_crash_is_an_error_that_names_the_signal(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="its worker died: signal 11"):
        pool.run(calls.crash)
    assert pool.run(calls.add, 1, 1) == 2


def test_an_exception_is_handed_on_by_its_name_and_costs_no_worker(pool: WorkerPool) -> None:
    first = pool.run(calls.pid)
    with pytest.raises(WorkerError, match="ArithmeticError: too much"):
        pool.run(calls.fail, "too much")
    with pytest.raises(WorkerError, match="the result cannot be sent"):
        pool.run(calls.unpicklable)
    assert pool.run(calls.pid) == first


def test_a_worker_killed_while_idle_is_replaced(pool: WorkerPool) -> None:
    first = pool.run(calls.pid)
    os.kill(first, signal.SIGKILL)
    assert wait_for(lambda: first not in pool.worker_pids)
    assert pool.run(calls.add, 2, 2) == 4


def test_a_pool_that_cannot_start_ends_every_call_with_the_reason() -> None:
    with WorkerPool(2, deadline_s=WAIT_S, initialise=calls.fail_to_start) as pool:
        for future in [pool.submit(calls.pid) for _ in range(4)]:
            with pytest.raises(WorkerError, match="ImportError: no sympy here"):
                future.result(WAIT_S)


def test_closing_ends_workers_running_calls_and_queued_ones() -> None:
    pool = WorkerPool(1, deadline_s=WAIT_S)
    (pid,) = {pool.run(calls.pid)}
    futures: list[Future[object]] = [pool.submit(calls.sleep, 600) for _ in range(3)]
    pool.close()
    pool.close()
    for future in futures:
        with pytest.raises(WorkerError, match="closed"):
            future.result(WAIT_S)
    assert not is_running(pid)
    with pytest.raises(WorkerError, match="closed"):
        pool.submit(calls.pid)


def test_a_cancelled_call_never_runs(pool: WorkerPool, tmp_path: Path) -> None:
    blocking, cancelled = pool.submit(calls.wait_for, str(tmp_path / "go")), pool.submit(calls.crash)
    assert cancelled.cancel()
    (tmp_path / "go").touch()
    assert blocking.result(WAIT_S) == str(tmp_path / "go")
    assert pool.run(calls.add, 1, 1) == 2


def test_what_a_worker_cannot_import_is_refused_before_it_is_queued() -> None:
    pool = WorkerPool(1, deadline_s=1)
    with pytest.raises(ValueError, match=r"<lambda> cannot be imported by a worker"):
        pool.submit(lambda: 1)
    with pytest.raises(ValueError, match="deadline_s is 0; it must be positive"):
        WorkerPool(1, deadline_s=0)


def test_many_threads_share_a_pool() -> None:
    sums: list[int] = []
    with WorkerPool(2, deadline_s=WAIT_S) as pool:
        threads = [threading.Thread(target=lambda i=i: sums.append(pool.run(calls.add, i, 1))) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert sorted(sums) == list(range(1, 21))


def test_a_forked_process_gets_workers_of_its_own(pool: WorkerPool) -> None:
    ours = pool.run(calls.pid)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(pool.run(calls.pid)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        theirs = int(pipe.read())
    os.waitpid(child, 0)
    assert theirs != ours
    assert wait_for(lambda: not is_running(theirs))
    assert pool.run(calls.pid) == ours


PARENT = """
import sys, time
from tandem.engine.reward.workers import WorkerPool
from tests.reward import worker_calls as calls
pool = WorkerPool(2, deadline_s=600)
futures = [pool.submit(calls.compute_forever), pool.submit(calls.sleep, 600)]
while not all(future.running() for future in futures):
    time.sleep(0.01)
print(*pool.worker_pids, flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["kill -9", "exit"])
def test_no_worker_outlives_its_parent_whatever_it_computes(ending: str) -> None:
    command = [sys.executable, "-c", PARENT, "wait" if ending == "kill -9" else "end"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if ending == "kill -9":
            assert all(is_running(pid) for pid in pids)
            parent.kill()
        parent.wait(WAIT_S)
    assert wait_for(lambda: not any(is_running(pid) for pid in pids))
