"""The weights of a Hugging Face model folder: sharded safetensors, read by slices and written in place.

The format is a length (8 bytes, little endian), a JSON header with dtype, shape and byte range of every tensor, and the
bytes (https://huggingface.co/docs/safetensors). Reading and writing it here, by rows at their offset, needs memory for these rows only.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tandem.engine.checkpoint.names import Region
from tandem.engine.types import TensorMeta

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies."""

    descriptor: int
    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsReader:
    """The tensors of a model folder, in one file or several. Use as `with open_safetensors(folder) as reader`.

    Files are read, not mapped: pages of a mapped file count as this process's memory for as long as the file is open.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stored: dict[str, _Stored] = {}
        for file in _weight_files(folder):
            descriptor = os.open(file, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            self._stored |= _read_header(file, descriptor)
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}

    def read(self, name: str, region: Region) -> torch.Tensor:
        """Part of a tensor, in the dtype that it has in the file. Only the rows it lies in are read, a few MiB at a time."""
        stored = self._stored[name]
        out = torch.empty([stop - start for start, stop in region], dtype=stored.dtype)
        if not out.numel():
            return out
        (first, last), inner = (region[0], region[1:]) if region else ((0, 1), ())
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        if all(bounds == (0, extent) for bounds, extent in zip(inner, stored.shape[1:], strict=True)):
            _fill(stored.descriptor, out, stored.start + first * row_bytes)
            return out
        num_rows = max(1, READ_BYTES // row_bytes)
        rows = torch.empty((min(num_rows, last - first), *stored.shape[1:]), dtype=stored.dtype)
        for start in range(first, last, num_rows):
            count = min(num_rows, last - start)
            _fill(stored.descriptor, rows[:count], stored.start + start * row_bytes)
            out[start - first : start - first + count] = rows[(slice(0, count), *(slice(*bounds) for bounds in inner))]
        return out

    def check(self, tensors: Sequence[TensorMeta], ignored: Sequence[str] = ()) -> None:
        """Raises: ValueError naming tensors that are missing, unexpected or of another shape."""
        expected = {meta.name: meta.shape for meta in tensors}
        for what, names in (
            ("lacks", [name for name in expected if name not in self.shapes]),
            ("has unexpected", [name for name in self.shapes if name not in expected and name not in ignored]),
        ):
            if names:
                raise ValueError(
                    f"{self.folder} {what} {len(names)} tensors of the model that config.json describes: {', '.join(names[:5])}"
                )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(f"{self.folder}: {name} has shape {self.shapes[name]}; config.json needs {shape}")


@contextmanager
def open_safetensors(folder: Path) -> Iterator[SafetensorsReader]:
    """Open the weights of a model folder. Raises: ValueError if there are none or a file is damaged."""
    with ExitStack() as stack:
        yield SafetensorsReader(folder, stack)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} names")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights; looked for {INDEX_FILE} and *.safetensors")
    return files


def _fill(descriptor: int, out: torch.Tensor, start: int) -> None:
    """Read a contiguous tensor from byte `start` on."""
    data, done = out.view(-1).view(torch.uint8).numpy().data, 0
    while done < len(data):
        count = os.preadv(descriptor, [data[done:]], start + done)
        if count == 0:
            raise OSError(f"a weights file became shorter while it was read: byte {start + done} is gone")
        done += count


def _read_header(file: Path, descriptor: int) -> dict[str, _Stored]:
    """Every tensor of a file. Raises: ValueError if it is damaged."""
    file_bytes = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 0 < length <= min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"{file} is not a safetensors file: its {file_bytes} bytes do not hold a header of {length}")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        entries = {name: (x["dtype"], tuple(x["shape"]), *x["data_offsets"]) for name, x in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a safetensors file: its header cannot be read ({error})") from error
    found = {}
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: {name} has dtype {dtype}; weights of {', '.join(_DTYPES)} can be read")
        num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
        if start < 0 or stop - start != num_bytes or 8 + length + stop > file_bytes:
            where = f"bytes {start} to {stop} of {file_bytes - 8 - length}"
            raise ValueError(f"{file} is not a safetensors file: {name} has shape {shape} and lies at {where}")
        found[name] = _Stored(descriptor, 8 + length + start, shape, _DTYPES[dtype])
    return found


class SafetensorsWriter:
    """Lays out tensors over files of at most `max_shard_bytes` (a larger tensor has a file of its own).

    Every rank makes the same one; `create` is called for each file by the rank that writes it.
    """

    def __init__(self, folder: Path, tensors: Sequence[TensorMeta], max_shard_bytes: int) -> None:
        self._folder = folder
        files: list[list[TensorMeta]] = [[]]
        size = 0
        for meta in tensors:
            if files[-1] and size + meta.num_bytes > max_shard_bytes:
                files.append([])
                size = 0
            files[-1].append(meta)
            size += meta.num_bytes
        self._tensors = files
        self.file_of = {meta.name: index for index, metas in enumerate(files) for meta in metas}
        self._metas = {meta.name: meta for meta in tensors}
        self._headers = [_header(metas) for metas in files]

    @property
    def num_files(self) -> int:
        return len(self._tensors)

    def path(self, file: int) -> Path:
        if self.num_files == 1:
            return self._folder / SINGLE_FILE
        return self._folder / f"model-{file + 1:05d}-of-{self.num_files:05d}.safetensors"

    def create(self, file: int) -> None:
        """Write the header and reserve the space."""
        header, offsets = self._headers[file]
        with self.path(file).open("wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + max((end for _, end in offsets.values()), default=0))

    def write(self, name: str, rows: torch.Tensor, first_row: int = 0) -> None:
        """Write rows of a tensor from `first_row` on, in the dtype that was announced; the whole of one without dimensions."""
        meta, file = self._metas[name], self.file_of[name]
        assert (tuple(rows.shape[1:]), rows.dtype) == (meta.shape[1:], meta.dtype), (name, rows.shape, rows.dtype, meta)
        header, offsets = self._headers[file]
        row_bytes = math.prod(meta.shape[1:]) * meta.dtype.itemsize
        data = rows.contiguous().view(-1).view(torch.uint8).numpy().data
        descriptor = os.open(self.path(file), os.O_WRONLY)
        try:
            written, start = 0, len(header) + offsets[name][0] + first_row * row_bytes
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], start + written)
        finally:
            os.close(descriptor)

    def write_index(self) -> None:
        """The index that Hugging Face wants beside several files."""
        if self.num_files > 1:
            total = sum(meta.num_bytes for meta in self._metas.values())
            index = {"metadata": {"total_size": total}, "weight_map": {name: self.path(file).name for name, file in self.file_of.items()}}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2))


def _header(tensors: Sequence[TensorMeta]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file's first bytes, and every tensor's byte range after them."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for meta in tensors:
        start, end = end, end + meta.num_bytes
        offsets[meta.name] = start, end
        entries[meta.name] = {"dtype": _DTYPE_NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
