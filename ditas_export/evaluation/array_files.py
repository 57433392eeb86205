"""Arrays in an .npz file that anyone may have written: plain numbers alone, and nothing is run.

A header is held against the one form that NumPy writes, not parsed as Python; the bytes of an array
against its header, before they are asked for. Images are read batch by batch, and are never held
all at once. Source: numpy/lib/format.py, the .npy format, versions 1 to 3.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ditas_export.errors import EvaluationError
from ditas_export.file_signs import describe_impostor

Array = np.ndarray[Any, np.dtype[Any]]

MOST_DIMS = 4
"""Dimensions of an array: images, height, width, channels."""

LARGEST_ARRAY = 2**40
"""Bytes of an array that is read batch by batch."""

LARGEST_WHOLE = 2**33
"""Bytes of an array that is read at once."""

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}
"""Bytes of the header's length, by version."""

_LONGEST_HEADER = 65_535

_HEADER = re.compile(
    r"\{'descr': '(?P<type>[<>|][uif][1248])', 'fortran_order': (?P<turned>True|False), "
    r"'shape': \((?P<shape>|[0-9]{1,18},|[0-9]{1,18}(?:, [0-9]{1,18}){1,31})\), \} *\n?"
)

_READ_BYTES = 2**24
"""Bytes that are unpacked at once."""

_TROUBLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,  # an encrypted entry; NotImplementedError: a way of compressing that is not known
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""What zipfile raises on files that are none, or damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayHeader:
    """What an array is by its header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    turned: bool  # whether the first index varies fastest
    start: int  # bytes before the numbers

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        """Return type and shape."""
        return f"{self.dtype.name} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayFile:
    """An open .npz file; `open_arrays` makes it."""

    path: Path
    arrays: Mapping[str, ArrayHeader]  # by name, those that were asked for
    comment: bytes  # of the archive
    _archive: zipfile.ZipFile

    def read(self, name: str) -> Array:
        """Return a whole array.

        Raises:
            EvaluationError: it is too large for that, cut short or damaged.
        """
        header = self.arrays[name]
        if header.size_bytes > LARGEST_WHOLE:
            raise EvaluationError(
                f"{self.path}: {name} has {header.size_bytes:,} bytes, {LARGEST_WHOLE:,} at most "
                f"are read"
            )
        with self._numbers(name) as file:
            flat = _numbers_of(file, header.dtype, math.prod(header.shape))
        order: Any = "F" if header.turned else "C"
        return flat.reshape(header.shape, order=order)

    def batches(self, name: str, *, most: int) -> Iterator[Array]:
        """Yield an array in parts along its first index.

        Args:
            name: an array of one dimension and more, in C's order.
            most: entries along the first index of a part.

        Raises:
            EvaluationError: it is cut short or damaged.
        """
        header = self.arrays[name]
        count, *rest = header.shape
        with self._numbers(name) as file:
            for first in range(0, count, most):
                part = min(most, count - first)
                yield _numbers_of(file, header.dtype, part * math.prod(rest)).reshape(part, *rest)

    @contextmanager
    def _numbers(self, name: str) -> Iterator[IO[bytes]]:
        """Yield the numbers of an array as a file; with the last one its checksum is tested."""
        with _refusing(self.path, name), self._archive.open(f"{name}.npy") as file:
            _exactly(file, self.arrays[name].start)
            yield file


@contextmanager
def open_arrays(path: Path, names: Collection[str]) -> Iterator[ArrayFile]:
    """Open an .npz file and read the headers of some arrays, those that it has.

    What else is in the file is not looked at.

    Raises:
        EvaluationError: no such file, no .npz file, a damaged one, or an array that is empty, holds
            objects, or whose header and bytes contradict each other.
    """
    if path.exists() and not path.is_file():
        raise EvaluationError(f"{path} is {describe_impostor(path)}")
    with ExitStack() as stack:
        with _refusing(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
        entries = [each for each in archive.infolist() if each.filename[:-4] in names]
        if len({entry.filename for entry in entries}) < len(entries):
            raise EvaluationError(f"{path} has two arrays of one name; expected one of each")
        headers = {entry.filename[:-4]: _header(path, archive, entry) for entry in entries}
        yield ArrayFile(path=path, arrays=headers, comment=archive.comment, _archive=archive)


def _header(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> ArrayHeader:
    """Return the header of an array, held against the bytes that the archive has of it."""
    name = entry.filename[:-4]
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise EvaluationError(
            f"{path}: {name} is compressed in a way that NumPy does not use; save it by numpy.savez"
        )
    with _refusing(path, name), archive.open(entry) as file:
        start = _exactly(file, len(_MAGIC) + 2)
        length_bytes = _LENGTH_BYTES.get(start[-2])
        if not start.startswith(_MAGIC) or length_bytes is None:
            raise ValueError("no array of NumPy")
        length = int.from_bytes(_exactly(file, length_bytes), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        text = _exactly(file, length).decode("latin-1")
    found = _HEADER.fullmatch(text)
    if found is None:
        raise EvaluationError(
            f"{path}: {name} is no array of plain numbers: {text[:80].strip()!r}; nothing else is "
            f"read, save images as uint8 and features as float32"
        )
    header = ArrayHeader(
        dtype=np.dtype(found["type"]),
        shape=tuple(int(size) for size in found["shape"].split(",") if size),
        turned=found["turned"] == "True",
        start=len(_MAGIC) + 2 + length_bytes + length,
    )
    held = entry.file_size - header.start
    if header.size_bytes != held or not 0 < held <= LARGEST_ARRAY or len(header.shape) > MOST_DIMS:
        raise EvaluationError(
            f"{path}: {name} is {header}, {header.size_bytes:,} bytes, and the file has {held:,}; "
            f"expected the same, 1 to {LARGEST_ARRAY:,}, and {MOST_DIMS} dimensions at most"
        )
    return header


def _exactly(file: IO[bytes], size: int) -> bytes:
    """Return the next bytes of a file, all of them there."""
    found = file.read(size)
    if len(found) < size:
        raise EOFError(f"{size - len(found):,} bytes are missing")
    return found


def _numbers_of(file: IO[bytes], dtype: np.dtype[Any], count: int) -> Array:
    """Return the next numbers of a file, (count,), all of them there."""
    numbers = np.empty(count, dtype)
    raw, filled = numbers.view(np.uint8).data, 0
    while filled < len(raw):
        part = file.read(min(len(raw) - filled, _READ_BYTES))
        if not part:
            raise EOFError(f"{len(raw) - filled:,} bytes are missing")
        raw[filled : filled + len(part)] = part
        filled += len(part)
    return numbers


@contextmanager
def _refusing(path: Path, name: str = "") -> Iterator[None]:
    """Raise what zipfile says of a damaged file as EvaluationError."""
    try:
        yield
    except _TROUBLE as error:
        where = f"{path}: {name}" if name else f"{path}"
        what = describe_impostor(path)
        reason = f"it is {what}" if what else _reason(error)
        raise EvaluationError(
            f"{where} cannot be read: {reason}; expected an .npz file as ditas-sample writes it"
        ) from error


def _reason(error: Exception) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
