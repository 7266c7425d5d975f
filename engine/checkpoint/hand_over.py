"""For engines that do not watch the buckets' counters themselves: a thread of their leader hands them one bucket after the other."""

import threading
from collections.abc import Sequence

from tandem.engine.buckets import CHECKSUMMED, FAILED, LOADED, NUM_SLOTS, BucketStream, PeerFailed, SharedBuckets
from tandem.engine.types import BucketEntry, WeightSink, WeightTransferError


class HandOver:
    """The buckets of one swap on their way to a plain `WeightSink`. Meets `PendingTransfer`."""

    def __init__(
        self, sink: WeightSink, shared: SharedBuckets, stream: BucketStream, policy_version: int, *, swap: int, first_ticket: int
    ) -> None:
        self._sink, self._shared, self._stream = sink, shared, stream
        self._policy_version, self._swap, self._first_ticket = policy_version, swap, first_ticket
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="weight-swap", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Nothing: what fails in the thread is published at once."""

    def wait(self) -> None:
        """Raises: as `PendingTransfer.wait`, and TimeoutError if the engine did not answer in time; `is_stuck` then tells."""
        self._thread.join(self._stream.timeout_s)
        if self.is_stuck:
            done = self._shared.progress(self._stream.leader, LOADED) - self._first_ticket + 1
            bucket = min(max(0, done), len(self._stream.buckets) - 1)
            names = [part.name for part in self._stream.buckets[bucket]]
            where = f"bucket {bucket} of {len(self._stream.buckets)}, tensors {names[0]} to {names[-1]}"
            raise TimeoutError(f"{where}: the engine did not answer within {self._stream.timeout_s:g} s")
        if self._error is not None:
            raise self._error

    @property
    def is_stuck(self) -> bool:
        """Whether the engine still has not answered; it cannot be asked for anything else meanwhile."""
        return self._thread.is_alive()

    def _run(self) -> None:
        where, entries = "prepare", []
        try:
            self._sink.prepare(self._policy_version, self._stream.tensors)
            for number in range(len(self._stream.buckets)):
                where, entries = f"bucket {number} of {len(self._stream.buckets)}", []
                entries = self._wait_for(number)
                self._sink.load(self._shared.path(number % NUM_SLOTS), entries)
                self._shared.publish(self._stream.leader, LOADED, self._first_ticket + number)
        except PeerFailed as error:
            self._error = error
        except Exception as error:  # whatever it is, all ranks must roll back
            self._shared.publish(self._stream.leader, FAILED, self._swap)
            self._error = WeightTransferError(f"{where}{_which_tensor(entries, str(error))}: {error}")

    def _wait_for(self, number: int) -> list[BucketEntry]:
        """The bucket's entries, once all ranks have written them."""
        stream, layout = self._stream, self._stream.buckets[number]
        self._shared.wait(
            stream.ranks,
            CHECKSUMMED,
            self._first_ticket + number,
            swap=self._swap,
            timeout_s=stream.timeout_s,
            waited_for=f"write bucket {number}",
        )
        checksums = self._shared.checksums[number % NUM_SLOTS, : len(layout)].tolist()
        return [BucketEntry(*part[:4], checksum=checksum) for part, checksum in zip(layout, checksums, strict=True)]


def _which_tensor(entries: Sequence[BucketEntry], message: str) -> str:
    """The tensor that an engine's error names, otherwise those that it was given."""
    named = [entry.name for entry in entries if entry.name in message]
    if named:
        return f", tensor {max(named, key=len)}"
    return f", tensors {entries[0].name} to {entries[-1].name}" if entries else ""
