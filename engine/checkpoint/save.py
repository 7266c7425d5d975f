"""Saving checkpoints while training goes on.

`CheckpointSaver.save` blocks training only while the state is copied into host memory. A thread of each rank then writes its file, and
tells the others by a file beside it that it is done: the threads never communicate over the network, which belongs to training. The
thread of rank 0 waits for the others' files, writes the marker and gives the folder its name. So a checkpoint becomes whole by itself,
however long the iteration takes in which it is written, and what is killed before leaves a folder without that name. Threads, not
processes: they share the copy, wait for the disk without the interpreter's lock, and cannot outlive their rank.

    partial_00000012/         becomes step_00000012/
        state/  extra_0.pt    see checkpoint/disk.py
        written_0             rank 0 has written its part; gone from the finished checkpoint
"""

import io
import json
import logging
import pickle
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from tandem.engine.checkpoint.disk import MARKER, STATE, checkpoint_name, saved_steps
from tandem.engine.checkpoint.durable import fingerprint, num_bytes_in, sync_folder, write_durably
from tandem.engine.checkpoint.host_copy import HostCopy
from tandem.engine.types import CheckpointError

_LOG = logging.getLogger("tandem.checkpoint")
# After an error in training, the background gets this long to finish what it has begun.
_GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveTimes:
    """One save on this rank. `blocked_s` is within `save`; `total_s` lasts until this rank's thread is done."""

    step: int
    num_bytes: int
    blocked_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One save. The thread sets `done` at its end, after `errors` if there are any."""

    step: int
    started: float  # time.perf_counter()
    blocked_s: float
    partial: Path
    extra: bytes | None
    common: Mapping[str, Any]
    writer: Any  # Megatron's FileSystemWriterAsync, which holds the copies
    metadata: Any  # on rank 0
    num_bytes: int
    errors: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    give_up: threading.Event = field(default_factory=threading.Event)


class CheckpointSaver:
    """Saves the checkpoints of a run, one at a time. `save`, `poll`, `wait` and leaving the context are collectives.

    An error in the background is raised by the next of them on every rank, as a CheckpointError: a run whose checkpoints fail is stopped
    rather than carried on without. The newest whole checkpoint stays, and is counted among the kept until a newer one is whole.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        asynchronous: bool = True,
        timeout_s: float = 1800.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            folder: of all checkpoints of the run, on storage that all ranks share.
            keep: how many whole checkpoints are kept.
            asynchronous: False makes `save` return when the checkpoint is whole.
            timeout_s: a save that takes longer has failed.
            group: all ranks, on a CPU backend; None: the default group.
        """
        self._folder, self._keep, self._asynchronous, self._timeout_s, self._group = folder, keep, asynchronous, timeout_s, group
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._copy = HostCopy()
        self._planner: Any = None
        self._signature = ""
        self._job: _Job | None = None  # what is under way, as far as the ranks have agreed
        self._oldest: int | None = None
        self.last: SaveTimes | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish what is being saved. After an error the ranks no longer meet, and each gives its thread a moment."""
        if kind is None:
            self.wait()
        elif self._job is not None:
            self._job.done.wait(_GRACE_S)
            self._job.give_up.set()

    def save(self, step: int, sharded_state: dict[str, Any], extra: Any = None) -> None:
        """Begin to save a checkpoint, after the one before is whole.

        Args:
            sharded_state: the trainer's sharded_state_dict(), values of Megatron's dist_checkpointing mapping. Used up.
            extra: anything of plain containers, numbers, strings and tensors, per rank; None saves nothing for this rank.
        Raises: CheckpointError if the one before failed, or the disk has too little space.
        """
        # here, not above: on a CPU megatron can only be imported once the trainer has prepared torch for it
        from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

        from tandem.engine.checkpoint.megatron_plan import Planner, saved_tensors, signature_of

        self._finish_pending()
        started = time.perf_counter()
        tensors = saved_tensors(sharded_state)
        num_bytes = sum(values.numel() * values.element_size() for _, values in tensors)
        signature = signature_of([place for place, _ in tensors])
        packed = _to_bytes(extra)
        facts: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(facts, (num_bytes + len(packed or b""), signature == self._signature), group=self._group)
        partial = self._make_folder(step, sum(size for size, _ in facts))
        if not all(is_same for _, is_same in facts):
            self._planner, self._signature = Planner(), signature
        copies = self._copy.take([values for _, values in tensors])
        for (place, _), copy in zip(tensors, copies, strict=True):
            place.data = copy
        state, common = save_preprocess(sharded_state, validate_access_integrity=not self._planner.has_plan)
        writer, metadata = self._planner.plan(state, partial / STATE)
        self._job = _Job(
            step=step,
            started=started,
            blocked_s=time.perf_counter() - started,
            partial=partial,
            extra=packed,
            common=common,
            writer=writer,
            metadata=metadata,
            num_bytes=num_bytes,
        )
        threading.Thread(target=self._work, args=(self._job,), name=f"checkpoint {step}", daemon=True).start()
        if not self._asynchronous:
            self._finish_pending()

    def poll(self) -> int | None:
        """The oldest step that is kept, once after every save that has become whole; None otherwise. Does not wait for the disk."""
        if self._job is not None:
            self._agree(self._job)
        oldest, self._oldest = self._oldest, None
        return oldest

    def wait(self) -> int | None:
        """`poll` when the save that is under way has become whole."""
        self._finish_pending()
        return self.poll()

    def _finish_pending(self) -> None:
        while self._job is not None:
            self._job.done.wait(0.2)
            self._agree(self._job)

    def _agree(self, job: _Job) -> None:
        """Ask all ranks whether they are done: forget the save when it is whole, or raise on every rank what went wrong on any."""
        is_running = not job.done.is_set()
        if is_running and time.perf_counter() - job.started > self._timeout_s:
            job.errors.append(f"rank {self._rank} has not written its part within {self._timeout_s:g} s (checkpoint.timeout_s)")
        has_failed = bool(job.errors)
        oldest = min(saved_steps(self._folder)) if self._rank == 0 and not is_running and not has_failed else 0
        flags = torch.tensor([is_running, has_failed, oldest], dtype=torch.int64)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        if flags[1]:
            self._fail(job)
        if not flags[0]:
            self._job, self._oldest = None, int(flags[2])

    def _fail(self, job: _Job) -> None:
        """Stop the threads, remove what was written and raise."""
        self._job = None
        job.give_up.set()
        job.done.wait(1.0)  # not longer: it may hang in the file system
        errors: list[list[str]] = [[]] * self._num_ranks
        dist.all_gather_object(errors, job.errors, group=self._group)
        if self._rank == 0:
            shutil.rmtree(job.partial, ignore_errors=True)
        kept = max(saved_steps(self._folder), default=None)
        rest = "no checkpoint is whole" if kept is None else f"the newest whole checkpoint is that of step {kept}"
        found = "; ".join(error for of_rank in errors for error in of_rank)
        raise CheckpointError(f"the checkpoint of step {job.step} was not saved: {found}; {rest}")

    def _make_folder(self, step: int, num_bytes: int) -> Path:
        """Make the folder, on rank 0; raise on every rank if it cannot be made or would not fit on its disk."""
        partial, box = self._folder / f"partial_{step:08d}", [""]
        if self._rank == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                for stale in self._folder.glob("partial_*"):
                    shutil.rmtree(stale)
                free = shutil.disk_usage(self._folder).free
                if num_bytes > free:
                    damaged = sum(map(num_bytes_in, self._folder.glob("damaged_step_*")))
                    hint = f" (the damaged_step_* folders in it take {damaged:,})" if damaged else ""
                    box = [f"{self._folder} needs {num_bytes:,} bytes, and {free:,} are free there{hint}; {_ADVICE}"]
                else:
                    (partial / STATE).mkdir(parents=True)
            except OSError as error:
                box = [f"rank 0 cannot make {partial}: {error.strerror} ({error.filename}); {_ADVICE}"]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        if box[0]:
            raise CheckpointError(f"the checkpoint of step {step} was not saved: {box[0]}")
        return partial

    # In the background

    def _work(self, job: _Job) -> None:
        try:
            self._write(job)
            if self._rank == 0:
                self._finish(job)
            total_s = time.perf_counter() - job.started
            self.last = SaveTimes(step=job.step, num_bytes=job.num_bytes, blocked_s=job.blocked_s, total_s=total_s)
        except OSError as error:
            free = shutil.disk_usage(self._folder).free
            job.errors.append(
                f"rank {self._rank} could not write {error.filename or job.partial}: {error.strerror or error} (its part has "
                f"{job.num_bytes:,} bytes, and {free:,} are free there); {_ADVICE}"
            )
        except BaseException as error:  # whatever it is, training must hear of it
            _LOG.exception("rank %d: saving the checkpoint of step %d failed", self._rank, job.step)
            job.errors.append(f"rank {self._rank}: {type(error).__name__}: {error}")
        finally:
            job.done.set()

    def _write(self, job: _Job) -> None:
        """This rank's files, and a note of what they are."""
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

        from tandem.engine.checkpoint.megatron_plan import write_tensors

        state = job.partial / STATE
        results, files = write_tensors(job.writer)
        if self._rank == 0:
            TorchCommonSaveStrategy("torch", 1).save_common(dict(job.common), str(state))
            save_config(CheckpointingConfig("torch_dist", 1), str(state))
            files += [state / "common.pt", state / "metadata.json"]
        if job.extra is not None:
            files.append(job.partial / f"extra_{self._rank}.pt")
            write_durably(files[-1], job.extra)
        note = {str(file.relative_to(job.partial)): fingerprint(file) for file in files}
        write_durably(job.partial / f"written_{self._rank}", pickle.dumps((results, note)))

    def _finish(self, job: _Job) -> None:
        """On rank 0: once all have written their part, complete the checkpoint, name it, and remove the oldest."""
        notes = [job.partial / f"written_{rank}" for rank in range(self._num_ranks)]
        while missing := [rank for rank, note in enumerate(notes) if not note.exists()]:
            if job.give_up.wait(0.02):
                return
            if time.perf_counter() - job.started > self._timeout_s:
                raise TimeoutError(f"ranks {missing} have not written their part within {self._timeout_s:g} s (checkpoint.timeout_s)")
        results, files = [], {}
        for note in notes:
            of_rank, written = pickle.loads(note.read_bytes())
            results.append(of_rank)
            files |= written
        job.writer.finish(job.metadata, results)
        files[f"{STATE}/.metadata"] = fingerprint(job.partial / STATE / ".metadata")
        sync_folder(job.partial / STATE)
        for note in notes:
            note.unlink()
        marker = {"step": job.step, "num_ranks": self._num_ranks, "files": dict(sorted(files.items()))}
        write_durably(job.partial / MARKER, json.dumps(marker, indent=1).encode())
        final = self._folder / checkpoint_name(job.step)
        replaced = final.with_name(f"partial_replaced_{job.step:08d}")
        if final.exists():
            final.rename(replaced)
        job.partial.rename(final)
        sync_folder(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in sorted(saved_steps(self._folder))[: -self._keep]:
            shutil.rmtree(self._folder / checkpoint_name(old))


_ADVICE = "make room there, or move the run folder to a larger disk (run_dir), and start the run again"


def _to_bytes(extra: Any) -> bytes | None:
    if extra is None:
        return None
    torch.save(extra, packed := io.BytesIO())
    return packed.getvalue()
