"""Opening a leader's SQLite files: one writer each, durable against `kill -9`.

Write-ahead log with synchronous=NORMAL: a commit is written to the operating system before it returns, so it survives the death of
this process; it is not flushed to the disk, so a power cut may lose the newest commits but never damages the file. FULL would cost an
fsync per commit to save what a resumed run can make again.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_database(path: Path, schema: str, probe: str) -> sqlite3.Connection:
    """Open or create a file with the tables of `schema`.

    Args:
        probe: a statement that fails if the file holds other tables under these names.
    Raises: sqlite3.DatabaseError if it is another kind of file.
    """
    database = sqlite3.connect(path, isolation_level=None, timeout=30)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.executescript(schema)
        database.execute(probe)
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All of the block is durable afterwards, or nothing of it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # SQLite ends it by itself when the disk is full
            database.execute("ROLLBACK")
        raise
