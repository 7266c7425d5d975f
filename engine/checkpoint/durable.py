"""Files that are on the disk when a function returns, and the fingerprints by which a damaged one is known."""

import os
from pathlib import Path
from typing import Any

import xxhash

_CHUNK_BYTES = 16 << 20


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and xxh3-64 of a file, which is flushed to the disk first."""
    digest, size = xxhash.xxh3_64(), 0
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(1, file.stat().st_size))))
    with file.open("rb", buffering=0) as opened:
        os.fsync(opened.fileno())
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"bytes": size, "xxh3": digest.hexdigest()}


def write_durably(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    unfinished = file.with_name(f"{file.name}.tmp")
    with unfinished.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def num_bytes_in(folder: Path) -> int:
    """What the files of a folder take, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
