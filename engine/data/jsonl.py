"""Reading JSONL files with errors that name the file and the line, and writing them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line that is not blank.

    Raises: ValueError for a missing file, a line that is not JSON or not an object, bytes that are not UTF-8, and a file without
    any object.
    """
    found = False
    for number, line in read_lines(path):
        found = True
        yield number, parse_object(line, f"{path}:{number}")
    if not found:
        raise ValueError(f"{path} is empty; it needs at least one line with a JSON object")


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) for every line that is not blank. Raises: ValueError for a missing file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; give a JSONL file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a line. Raises: ValueError that begins with `where`."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} of the line is not UTF-8; save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found a JSON {type(record).__name__}; each line must be one JSON object")
    return record


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


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line. The file appears whole or not at all."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(record)) + "\n" for record in records)
    unfinished.replace(path)
