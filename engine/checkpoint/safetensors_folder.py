"""The weights of a Hugging Face model folder: sharded safetensors, read by slices and written in place.

The format is a length (8 bytes, little endian), a JSON header with dtype, shape and byte range of every tensor, and the
bytes (https://huggingface.co/docs/safetensors). Writing it here, tensor by tensor at its offset, needs memory for one tensor only.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tandem.engine.checkpoint.names import Region
from tandem.engine.types import TensorMeta

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class SafetensorsReader:
    """The tensors of a model folder, in one file or several. Use as `with open_safetensors(folder) as reader`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        for file in _weight_files(folder):
            try:
                self._files[file] = stack.enter_context(safe_open(file, "pt"))
            except Exception as error:  # safetensors' own error type is no subclass of a narrower one
                raise ValueError(f"{file} is not a safetensors file: {error}") from error
        self._file_of = {name: opened for opened in self._files.values() for name in opened.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name, opened in self._file_of.items()}

    def read(self, name: str, region: Region) -> torch.Tensor:
        """Part of a tensor; only these bytes are read."""
        return self._file_of[name].get_slice(name)[tuple(slice(*bounds) for bounds in region)]

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

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor, of the dtype that was announced."""
        meta, file = self._metas[name], self.file_of[name]
        assert (tuple(tensor.shape), tensor.dtype) == (meta.shape, meta.dtype), (name, tensor.shape, tensor.dtype, meta)
        header, offsets = self._headers[file]
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        descriptor = os.open(self.path(file), os.O_WRONLY)
        try:
            written, start = 0, len(header) + offsets[name][0]
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
