"""The segment journal: what a leader's engine generated, kept from the moment each segment ends until no checkpoint needs it.

A run that died goes back to a checkpoint and does the iterations after it again. What it draws, and the weights, come out the same bit
for bit, so the segments would too: those that had ended are taken from here instead. A row is only given back under the digest that it
was written with, which covers everything that the segment depends on; a row that is damaged or belongs to other settings is a miss,
and its segment is generated again.
"""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from tandem.engine.data.database import open_database
from tandem.engine.types import Completion, Group, StopState

_LOG = logging.getLogger("tandem.journal")

SCHEMA = """
CREATE TABLE IF NOT EXISTS segments (
    iteration INTEGER NOT NULL,
    serial INTEGER NOT NULL,
    sample INTEGER NOT NULL,
    segment INTEGER NOT NULL,
    digest BLOB NOT NULL,
    header BLOB NOT NULL,
    token_ids BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    routed_experts BLOB NOT NULL,
    checksum BLOB NOT NULL,
    PRIMARY KEY (iteration, serial, sample, segment)
) WITHOUT ROWID;
"""
COLUMNS = "iteration, serial, sample, segment, digest, header, token_ids, logprobs, routed_experts, checksum"


class SegmentKey(NamedTuple):
    """Which segment of a run: of the group with this serial number, and the iteration that generates it."""

    iteration: int
    serial: int
    sample: int
    segment: int


def settings_digest(settings: Any) -> bytes:
    """16 bytes that differ for settings (JSON) under which an engine may generate something else."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).digest()


def segment_digest(settings: bytes, weights_digest: str, group: Group, sample: int) -> bytes:
    """16 bytes over all that the next segment of a response depends on: settings, weights, prompt and what it has so far."""
    response = next(response for response in group.responses if response.sample == sample)
    digest = hashlib.blake2b(settings, digest_size=16)
    images = [image.digest for image in group.prompt.images]
    about = [weights_digest, group.prompt.id, len(group.prompt.token_ids), *images]
    digest.update(json.dumps(about).encode("utf-8", "surrogatepass"))
    digest.update(np.array(group.prompt.token_ids + response.token_ids, dtype="<i8").tobytes())
    return digest.digest()


class SegmentJournal:
    """One SQLite file. One writer per file; not shared between threads or across a fork. Log-probs are kept as float32."""

    def __init__(self, path: str | Path) -> None:
        """Open or create the file. One that is damaged is renamed damaged_… and begun anew: nothing depends on it but time."""
        self.path = Path(path)
        try:
            self._database = self._open()
        except sqlite3.OperationalError:
            raise  # the disk is full or cannot be reached
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)

    def record(self, key: SegmentKey, digest: bytes, completion: Completion) -> None:
        """Keep a segment, in place of an older one under this key. Durable on return."""
        routed = completion.routed_experts
        header = {
            "stop": completion.stop.value,
            "policy_version": completion.policy_version,
            "routed_shape": None if routed is None else list(routed.shape),
        }
        content = (
            digest,
            json.dumps(header).encode(),
            np.array(completion.token_ids, dtype="<i4").tobytes(),
            np.array(completion.logprobs, dtype="<f4").tobytes(),
            b"" if routed is None else np.ascontiguousarray(routed, dtype="<i2").tobytes(),
        )
        statement = f"INSERT OR REPLACE INTO segments ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._execute(statement, (*key, *content, _checksum(key, content)))

    def find(self, key: SegmentKey, digest: bytes) -> Completion | None:
        """The segment that was recorded under this key and digest (its request_id is empty); None if there is none, or it is damaged."""
        row = self._execute(
            "SELECT digest, header, token_ids, logprobs, routed_experts, checksum FROM segments "
            "WHERE iteration = ? AND serial = ? AND sample = ? AND segment = ?",
            key,
        ).fetchone()
        if row is None:
            return None
        *content, checksum = row
        if not all(isinstance(part, bytes) for part in content) or _checksum(key, content) != checksum:
            _LOG.warning("%s: segment %s is damaged and generated again", self.path, key)
            return None
        found, encoded, token_ids, logprobs, routed = content
        if found != digest:
            return None
        header = json.loads(encoded)
        shape = header["routed_shape"]
        return Completion(
            request_id="",
            token_ids=tuple(np.frombuffer(token_ids, "<i4").tolist()),
            logprobs=tuple(np.frombuffer(logprobs, "<f4").tolist()),
            stop=StopState(header["stop"]),
            policy_version=header["policy_version"],
            routed_experts=None if shape is None else np.frombuffer(routed, "<i2").reshape(shape).astype(np.int16),
        )

    def prune(self, before_iteration: int) -> int:
        """Delete the segments of iterations that no kept checkpoint leads back to. Returns how many."""
        return self._execute("DELETE FROM segments WHERE iteration < ?", (before_iteration,)).rowcount

    def num_tokens(self, iteration: int) -> int:
        """Tokens that are kept of one iteration, whatever they were generated under."""
        found = self._execute("SELECT ifnull(sum(length(token_ids)), 0) FROM segments WHERE iteration = ?", (iteration,))
        return found.fetchone()[0] // 4

    def close(self) -> None:
        self._database.close()

    def _open(self) -> sqlite3.Connection:
        return open_database(self.path, SCHEMA, f"SELECT {COLUMNS} FROM segments LIMIT 0")

    def _execute(self, statement: str, arguments: tuple[Any, ...]) -> sqlite3.Cursor:
        """Of a file whose pages turn out to be damaged, nothing is left: it is begun anew."""
        try:
            return self._database.execute(statement, arguments)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self._database.close()
            self._begin_anew(error)
            return self._database.execute(statement, arguments)

    def _begin_anew(self, error: sqlite3.DatabaseError) -> None:
        _LOG.warning("%s is damaged (%s); it is renamed and begun anew, and what it held is generated again", self.path, error)
        self.path.replace(self.path.with_name(f"damaged_{self.path.name}"))
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self._database = self._open()


def _checksum(key: SegmentKey, content: Sequence[bytes]) -> bytes:
    whole = xxhash.xxh3_64(repr(tuple(key)).encode())
    for part in content:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.digest()
