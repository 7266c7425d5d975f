"""Reading JSONL files with errors that name the file and the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line that is not blank.

    Raises: ValueError for a missing file, a line that is not JSON or not an object, bytes that are not UTF-8, and a file without
    any object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; give a JSONL file")
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: byte {error.start} of the line is not UTF-8; save the file as UTF-8") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); each line must be one JSON object") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: found a JSON {type(record).__name__}; each line must be one JSON object")
            found = True
            yield number, record
    if not found:
        raise ValueError(f"{path} is empty; it needs at least one line with a JSON object")


def text_field(record: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of these fields that the record has; it must be a string with more than white space in it."""
    for name in names:
        if name in record:
            value = record[name]
            if not isinstance(value, str):
                raise ValueError(f"{where}: field {name!r} is {value!r:.80}; it must be a string")
            if not value.strip():
                raise ValueError(f"{where}: field {name!r} is empty; it must hold text")
            return value
    present = ", ".join(sorted(record)) or "no fields"
    raise ValueError(f"{where}: found {present}; it needs a field {' or '.join(names)}")
