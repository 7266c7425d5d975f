"""What was measured, kept from the moment each prompt is finished: a killed command goes on after it."""

import sqlite3
from pathlib import Path
from typing import Self

from tandem.engine.curate.tally import Tally
from tandem.engine.data.database import open_database

_COLUMNS = "digest, num_samples, num_graded, num_correct"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS measured (
    digest BLOB PRIMARY KEY,
    num_samples INTEGER NOT NULL,
    num_graded INTEGER NOT NULL,
    num_correct INTEGER NOT NULL
) WITHOUT ROWID;
"""


class MeasurementJournal:
    """One SQLite file. A row is found under the digest that it was written with, which covers all that the responses depend on: after a
    change of model, template or seed, nothing old is taken for new, and what the change leaves alone stays.
    """

    def __init__(self, path: Path) -> None:
        """Raises: ValueError for a damaged file."""
        self._path = path
        try:
            self._database = open_database(path, _SCHEMA, f"SELECT {_COLUMNS} FROM measured LIMIT 0")
        except sqlite3.OperationalError:
            raise  # the disk is full or cannot be reached
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def record(self, digest: bytes, tally: Tally) -> None:
        """Durable against kill -9 on return."""
        values = (digest, tally.num_samples, tally.num_graded, tally.num_correct)
        self._database.execute(f"INSERT OR REPLACE INTO measured ({_COLUMNS}) VALUES (?, ?, ?, ?)", values)

    def find(self, digest: bytes) -> Tally | None:
        try:
            row = self._database.execute(f"SELECT {_COLUMNS} FROM measured WHERE digest = ?", (digest,)).fetchone()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        return Tally(num_samples=row[1], num_graded=row[2], num_correct=row[3]) if row is not None else None

    def close(self) -> None:
        self._database.close()

    def _damaged(self, error: sqlite3.DatabaseError) -> ValueError:
        return ValueError(f"{self._path} is damaged ({error}); remove it, and what it held is measured again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
