"""safetensors files: a reader over a memory map and a streaming writer.

The reader owns one mapping and uses the header only after it agrees with the file's size. The writer owns one file handle and hashes what
it writes. Neither knows the meaning of the tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from workers.artifacts.git_lfs import HEAD_BYTES, refuse_pointer
from workers.artifacts.number_formats import STORAGE, Array
from workers.layout.quant_parts import Format
from workers.protocol.errors import ArtifactError

#: Hints for a model file that is damaged, and for a model that no engine here computes.
COPY_AGAIN = "copy or download it again"
SUPPORTED_MODELS = "use a plain llama, mistral, qwen2 or qwen3 model in fp32, bf16 or fp16"
#: Largest header that the format allows, bytes.
MAX_HEADER = 100_000_000
NAMES: dict[Format, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "I8", "uint8": "U8", "fp8": "F8_E4M3", "int32": "I32"}
FORMATS: dict[str, Format] = {name: form for form, name in NAMES.items()}


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor in a file: format name as in the header, shape, and byte offsets from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a manifest says of a file: lowercase hex sha256, size in bytes."""

    sha256: str
    bytes: int


def regular(path: Path) -> Path:
    """``path``. Raises OSError when it exists and is no regular file: opening a FIFO would wait, and reading a device might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path


class SafetensorsFile:
    """A safetensors file for reading. The returned arrays are views of its mapping, which must live longer than they do."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`ArtifactError` when the file is missing, truncated or not safetensors."""
        self.path = path
        try:
            with regular(path).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.entries, self._data = _read_header(path, file, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read", error.strerror or str(error), COPY_AGAIN) from error

    def view(self, name: str) -> tuple[Array, Format]:
        """(values, format) of a whole tensor, without copying. Raises :class:`ArtifactError` for a format that is not in ``NAMES``."""
        entry = self.entries[name]
        if entry.dtype not in FORMATS:
            raise ArtifactError(f"{self.path}: {name} is {entry.dtype}", f"weights can be read as {', '.join(FORMATS)}", SUPPORTED_MODELS)
        form = FORMATS[entry.dtype]
        flat = np.frombuffer(self._map, STORAGE[form], math.prod(entry.shape), self._data + entry.data_offsets[0])
        return flat.reshape(entry.shape), form

    def size_of(self, name: str) -> int:
        """Bytes of a tensor."""
        start, stop = self.entries[name].data_offsets
        return stop - start

    def release(self) -> None:
        """Release the pages read so far, because they would count as this process's memory."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, TensorEntry], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ArtifactError(f"{path} is truncated", f"{size} bytes are no safetensors file", COPY_AGAIN)
    refuse_pointer(path, prefix + file.read(HEAD_BYTES - 8))
    file.seek(8)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ArtifactError(f"{path} is not a safetensors file, or truncated", f"header of {length} bytes in a file of {size}", COPY_AGAIN)
    try:
        raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(value, type=TensorEntry) for name, value in raw.items()}
    except RecursionError as error:
        raise ArtifactError(f"{path} is not a safetensors file", "its header is nested too deeply", COPY_AGAIN) from error
    except msgspec.MsgspecError as error:
        raise ArtifactError(f"{path} is not a safetensors file", str(error), COPY_AGAIN) from error
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        width = STORAGE[FORMATS[entry.dtype]].itemsize if entry.dtype in FORMATS else None
        if start != end or stop < start or min(entry.shape, default=0) < 0:
            raise ArtifactError(f"{path}: {name} has impossible offsets", f"{start}..{stop}, expected to start at {end}", COPY_AGAIN)
        if width is not None and stop - start != width * math.prod(entry.shape):
            raise ArtifactError(
                f"{path}: {name} has {stop - start} bytes", f"its shape {list(entry.shape)} needs another number", COPY_AGAIN
            )
        end = stop
    if 8 + length + end != size:
        raise ArtifactError(f"{path} is truncated or damaged", f"expected {8 + length + end} bytes, got {size}", COPY_AGAIN)
    return entries, 8 + length


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the order announced, so that only one tensor is in memory at a time."""

    def __init__(self, path: Path, tensors: dict[str, tuple[tuple[int, ...], Format]], metadata: dict[str, str]) -> None:
        """``tensors``: name → (shape, format)."""
        self._left = list(tensors.items())
        self._path = path
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._file = path.open("xb")
        self._put(_header(tensors, metadata))

    def write(self, name: str, values: Array) -> None:
        """Append a tensor; ``values`` must have the announced shape and the storage type of its format."""
        expected, (shape, form) = self._left.pop(0)
        if (expected, shape, STORAGE[form]) != (name, values.shape, values.dtype):
            raise ValueError(f"{self._path}: expected {expected} {shape} {form}, got {name} {values.shape} {values.dtype}")
        self._put(np.ascontiguousarray(values).data.cast("B"))

    def finish(self) -> FileRecord:
        """Flush the file to the disk and return its hash. Every announced tensor must have been written."""
        if self._left:
            raise ValueError(f"{self._path}: {self._left[0][0]} was never written")
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(sha256=self._hash.hexdigest(), bytes=self._bytes)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)


def _header(tensors: dict[str, tuple[tuple[int, ...], Format]], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (shape, form) in tensors.items():
        stop = offset + math.prod(shape) * STORAGE[form].itemsize
        header[name] = {"dtype": NAMES[form], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    # Data starts on a multiple of 8 bytes, so that a mapping of it is aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def hash_file(path: Path) -> FileRecord:
    """Hash a file. Raises :class:`ArtifactError` when it is missing or unreadable."""
    digest, size = hashlib.sha256(), 0
    try:
        with regular(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read", error.strerror or str(error), COPY_AGAIN) from error
    return FileRecord(sha256=digest.hexdigest(), bytes=size)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a small file and flush it to the disk; its folder is made where it is missing."""
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
