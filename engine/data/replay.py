"""The replay buffer: a leader's unfinished and scored groups in one SQLite file.

Rows are never changed but for one mark: each is stamped with the iteration that made it and, when popped, with the iteration that
took it. `rewind` undoes everything from an iteration on, which is how a run goes back to a checkpoint that was taken before it.

Durability: what `push_…` was given survives `kill -9` of this process (see engine/data/database.py).
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import xxhash

from tandem.engine.data.database import open_database, transaction
from tandem.engine.data.group_bytes import group_from_bytes, group_to_bytes
from tandem.engine.types import Group

Kind = Literal["partial", "scored"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    row_id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    created INTEGER NOT NULL,
    consumed INTEGER,
    payload BLOB NOT NULL,
    checksum BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS waiting ON groups (kind, row_id) WHERE consumed IS NULL;
"""


class ReplayBuffer:
    """Durable queue of groups, first in first out. One writer per file; not shared between threads or across a fork.

    Log-probs are kept as float32; a buffer is used in one iteration at a time, which `begin_iteration` or `rewind` names.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or create the file. Raises: ValueError if it is no replay buffer."""
        self.path = Path(path)
        self._iteration: int | None = None
        try:
            probe = "SELECT row_id, kind, created, consumed, payload, checksum FROM groups LIMIT 0"
            self._database = open_database(self.path, SCHEMA, probe)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
                raise
            raise ValueError(f"{self.path} is no replay buffer ({error}); delete it, or give another run folder") from error

    def begin_iteration(self, iteration: int) -> None:
        """Stamp what follows with `iteration`. Raises: ValueError when it lies before rows that are already there."""
        newest = self._database.execute("SELECT max(max(created), ifnull(max(consumed), -1)) FROM groups").fetchone()[0]
        if newest is not None and iteration < newest:
            raise ValueError(f"{self.path} already holds iteration {newest}; rewind({iteration}) before iteration {iteration} begins again")
        self._iteration = iteration

    def rewind(self, iteration: int) -> None:
        """Restore the buffer as it was when `iteration` began, and stamp what follows with it."""
        with transaction(self._database):
            self._database.execute("DELETE FROM groups WHERE created >= ?", (iteration,))
            self._database.execute("UPDATE groups SET consumed = NULL WHERE consumed >= ?", (iteration,))
        self._iteration = iteration

    def prune(self, before_iteration: int) -> int:
        """Delete rows consumed before `before_iteration`, the oldest that `rewind` may still be asked for. Returns how many."""
        return self._database.execute("DELETE FROM groups WHERE consumed < ?", (before_iteration,)).rowcount

    def push_partial(self, groups: Sequence[Group]) -> None:
        """Keep groups that have unfinished responses. All are durable on return, or none."""
        self._push("partial", groups)

    def push_scored(self, groups: Sequence[Group]) -> None:
        """Keep graded groups. All are durable on return, or none. Raises: ValueError for one that is not graded."""
        for group in groups:
            if len(group.verdicts) != len(group.responses):
                raise ValueError(
                    f"the group of prompt {group.prompt.id!r} has {len(group.verdicts)} verdicts for {len(group.responses)} responses; "
                    "only graded groups can be pushed as scored"
                )
        self._push("scored", groups)

    def pop_partial(self) -> list[Group]:
        """All unfinished groups, oldest first."""
        return self._pop("partial", None)

    def pop_scored(self, limit: int | None = None) -> list[Group]:
        """The oldest scored groups, at most `limit`; all when None."""
        return self._pop("scored", limit)

    @property
    def num_partial(self) -> int:
        return self._count("partial")

    @property
    def num_scored(self) -> int:
        return self._count("scored")

    def close(self) -> None:
        self._database.close()

    def _push(self, kind: Kind, groups: Sequence[Group]) -> None:
        iteration = self._current_iteration()
        payloads = [group_to_bytes(group) for group in groups]
        with transaction(self._database):
            self._database.executemany(
                "INSERT INTO groups (kind, created, payload, checksum) VALUES (?, ?, ?, ?)",
                [(kind, iteration, payload, xxhash.xxh3_64_digest(payload)) for payload in payloads],
            )

    def _pop(self, kind: Kind, limit: int | None) -> list[Group]:
        iteration = self._current_iteration()
        with transaction(self._database):
            rows = self._database.execute(
                "SELECT row_id, created, payload, checksum FROM groups WHERE kind = ? AND consumed IS NULL ORDER BY row_id LIMIT ?",
                (kind, -1 if limit is None else limit),
            ).fetchall()
            # Decoded inside the transaction: a damaged row leaves all of them unmarked.
            groups = [self._decode(*row) for row in rows]
            self._database.executemany("UPDATE groups SET consumed = ? WHERE row_id = ?", [(iteration, row_id) for row_id, *_ in rows])
        return groups

    def _decode(self, row_id: int, created: int, payload: bytes, checksum: bytes) -> Group:
        if xxhash.xxh3_64_digest(payload) != checksum:
            raise RuntimeError(
                f"{self.path}: row {row_id}, made in iteration {created}, is damaged (its checksum differs). Start the run again: going "
                f"back to a checkpoint of iteration {created} or before, it makes the row again. If it goes back to a later one, remove "
                f"the checkpoints of iterations after {created} first"
            )
        return group_from_bytes(payload)

    def _count(self, kind: Kind) -> int:
        return self._database.execute("SELECT count(*) FROM groups WHERE kind = ? AND consumed IS NULL", (kind,)).fetchone()[0]

    def _current_iteration(self) -> int:
        if self._iteration is None:
            raise ValueError(f"{self.path} is not in an iteration; call begin_iteration or rewind first")
        return self._iteration
