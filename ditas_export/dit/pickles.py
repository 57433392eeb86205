"""PyTorch's pickles, read without running anything in them; tensors are mapped from the file.

Two forms are read: the zip archive that `torch.save` writes, and the stream that it wrote before
PyTorch 1.6.
"""

from __future__ import annotations

import mmap
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditas_export.dit.pickle_machine import PickleReader, Storage
from ditas_export.errors import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First number in a stream of `torch.save`."""

_UNREADABLE = (
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)
"""What damaged bytes raise, as seen on truncated and random ones."""

_ALIGNMENT = 8
"""Bytes that every storage's place in memory is a multiple of, or it is copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PickleContent:
    """What a pickle holds."""

    content: Any  # dicts, lists, tuples, sets, text, numbers, tensors and `Inert`s
    not_made: tuple[str, ...]  # names of what would have been called
    tensors: int  # in all


def read_zip_pickle(path: Path) -> PickleContent:
    """Read what `torch.save` wrote as a zip archive.

    Raises:
        CheckpointError: a damaged archive, one that holds something else, or TorchScript.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = {info.filename: info for info in archive.infolist()}
            main = next((name for name in records if name.split("/")[1:] == ["data.pkl"]), None)
            if main is None:
                raise CheckpointError(
                    f"{path} is a zip archive, but not one of torch.save: it has no data.pkl; "
                    f"unpack it and pass the checkpoint"
                )
            root = main.removesuffix("data.pkl")
            if f"{root}constants.pkl" in records:
                raise CheckpointError(
                    f"{path} is a TorchScript archive, which is a program; expected tensors: save "
                    f"the model's state_dict()"
                )
            if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
                raise CheckpointError(f"{path} was written on a big-endian machine; save it anew")
            reader = PickleReader()
            content = reader.run(_stored(archive, records[main]))
            spans = {
                key: _span(file, records[f"{root}data/{key}"])
                for key, storage in reader.storages.items()
                if storage.nbytes
            }
            _fill(path, reader, spans)
    except _UNREADABLE as error:
        raise CheckpointError(_damaged(path, error)) from error
    return PickleContent(
        content=content, not_made=tuple(reader.not_made), tensors=len(reader.pending)
    )


def read_legacy_pickle(path: Path) -> PickleContent:
    """Read what `torch.save` wrote as a stream.

    Raises:
        CheckpointError: a damaged stream, or a pickle that `torch.save` did not write.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream,
        ):
            first = PickleReader()
            if (magic := first.run(stream)) != LEGACY_MAGIC:
                raise CheckpointError(_no_torch_pickle(path, magic, first.not_made))
            PickleReader().run(stream)  # version of the protocol
            if PickleReader().run(stream).get("little_endian") is not True:
                raise CheckpointError(f"{path} was written on a big-endian machine; save it anew")
            reader = PickleReader()
            content = reader.run(stream)
            spans = dict(_legacy_spans(stream, reader))
            _fill(path, reader, spans)
    except _UNREADABLE as error:
        raise CheckpointError(_damaged(path, error)) from error
    return PickleContent(
        content=content, not_made=tuple(reader.not_made), tensors=len(reader.pending)
    )


def _content(content: Any, reader: PickleReader) -> PickleContent:
    """Return what a reader made."""
    return PickleContent(
        content=content, not_made=tuple(reader.not_made), tensors=len(reader.pending)
    )


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a record's bytes; `torch.save` compresses none, so no archive unpacks to more."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    return archive.read(info)


def _span(file: Any, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Return where in a zip archive a record's bytes start, and how many there are."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    file.seek(info.header_offset)
    header = file.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + len(header) + name_length + extra_length, info.file_size


def _legacy_spans(stream: mmap.mmap, reader: PickleReader) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield key, start and bytes of the storages that follow a stream's pickle."""
    for key in PickleReader().run(stream):
        (count,) = struct.unpack("<q", stream.read(8))
        start, nbytes = stream.tell(), count * reader.storages[key].dtype.itemsize
        yield key, (start, nbytes)
        stream.seek(start + nbytes)


def _fill(path: Path, reader: PickleReader, spans: Mapping[str, tuple[int, int]]) -> None:
    """Give every tensor its bytes, mapped from the file."""
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are read on little-endian machines only")
    file_size = path.stat().st_size
    mapped: Any = torch.UntypedStorage.from_file(str(path), False, file_size)
    pieces: dict[str, Any] = {}
    for pending in reader.pending:
        storage = pending.storage
        if storage.key not in pieces:
            pieces[storage.key] = _piece(mapped, storage, spans)
        pending.tensor.set_(pieces[storage.key], pending.offset, pending.size, pending.stride)


def _piece(mapped: Any, storage: Storage, spans: Mapping[str, tuple[int, int]]) -> Any:
    """Return the mapped bytes of one storage, copied where they are not aligned."""
    if not storage.nbytes:
        return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
    start, length = spans[storage.key]
    if length < storage.nbytes or start + storage.nbytes > mapped.nbytes():
        raise EOFError(f"storage {storage.key} has {length} bytes, expected {storage.nbytes}")
    piece = mapped[start : start + storage.nbytes]
    return piece.clone() if start % _ALIGNMENT else piece


def _damaged(path: Path, error: BaseException) -> str:
    """Return the line for bytes that are no whole checkpoint."""
    if isinstance(error, OSError) and error.errno:
        return f"cannot read {path}: {error.strerror}"
    return (
        f"{path} is no whole PyTorch checkpoint: damaged, or cut short, as an interrupted download "
        f"is ({path.stat().st_size:,} bytes); get it again"
    )


def _no_torch_pickle(path: Path, found: object, not_made: Mapping[str, None]) -> str:
    """Return the line for a pickle that has no torch.save around it."""
    if not_made:
        return (
            f"{path} is a pickle that asks to run code ({', '.join(list(not_made)[:3])}); it was "
            f"not run. Expected tensors: write them by torch.save, best as safetensors"
        )
    return (
        f"{path} is a pickle that torch.save did not write (it holds a {type(found).__name__}); "
        f"expected a checkpoint"
    )
