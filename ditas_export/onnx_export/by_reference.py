"""An ONNX file read without the bytes of its tensors, which stay where they are."""

from __future__ import annotations

import mmap
from pathlib import Path

import onnx

from ditas_export.errors import OnnxExportError
from ditas_export.file_signs import why_unreadable

RAW_DATA = (7, 5, 9)
"""Field numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data."""

KEPT_BYTES = 1024
"""Tensors up to this size stay in the model: shapes, axes, scalars."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf; see https://protobuf.dev/programming-guides/encoding."""


def load_by_reference(path: Path) -> onnx.ModelProto:
    """Return a file's model; its large tensors are external data that lie in the file itself.

    Takes milliseconds and no memory where `onnx.load` takes seconds and twice the file's size.
    Tensors that the file keeps elsewhere stay there; locations are relative to its folder.

    Raises:
        OSError: no such file.
        ValueError: no plain file, an empty or truncated one, or not protobuf.
        google.protobuf.message.DecodeError: protobuf, but no ONNX.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("it is a device, a pipe or a socket")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model = onnx.ModelProto()
        model.ParseFromString(_cut(data, 0, len(data), RAW_DATA, path.name))
        return model


def read_by_reference(path: Path) -> onnx.ModelProto:
    """Return an ONNX file's model without the bytes of its tensors, or say what the file is.

    Raises:
        OnnxExportError: see `load_by_reference`.
    """
    try:
        return load_by_reference(path)
    except Exception as error:  # protobuf's DecodeError has no stable home
        reason = why_unreadable(path, error)
        raise OnnxExportError(f"{path} is no readable ONNX file: {reason}") from error


def _cut(data: mmap.mmap, start: int, end: int, fields: tuple[int, ...], location: str) -> bytes:
    """Return the message at [start, end), the field at the end of `fields` replaced by references.

    A message is a list of fields, and later fields add to earlier ones, so that the serialized
    reference can stand where the bytes were.
    """
    kept = bytearray()
    at = start
    while at < end:
        begin = at
        tag, at = _read_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        body, at = _field_body(data, at, wire_type)
        if at > end:
            raise ValueError(f"{location} is truncated: a field at byte {begin} passes its end")
        if number != fields[0] or wire_type != _LENGTH:
            kept += data[begin:at]
        elif len(fields) > 1:
            inner = _cut(data, body, at, fields[1:], location)
            kept += _varint(tag) + _varint(len(inner)) + inner
        elif at - body <= KEPT_BYTES:
            kept += data[begin:at]
        else:
            kept += _reference(location, body, at - body)
    return bytes(kept)


def _field_body(data: mmap.mmap, at: int, wire_type: int) -> tuple[int, int]:
    """Return where the body of a field after its tag begins and ends."""
    if wire_type == _VARINT:
        return at, _read_varint(data, at)[1]
    if wire_type == _LENGTH:
        length, body = _read_varint(data, at)
        return body, body + length
    if wire_type in (_FIXED32, _FIXED64):
        return at, at + (4 if wire_type == _FIXED32 else 8)
    raise ValueError(f"no protobuf: wire type {wire_type} before byte {at}")


def _reference(location: str, offset: int, length: int) -> bytes:
    """Return the fields of a TensorProto whose bytes lie in a file."""
    tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return bytes(tensor.SerializeToString())


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return the number of 7-bit digits, lowest first, that begins at a byte, and what follows."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("truncated: the file ends within a number")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    """Return a number in 7-bit digits, lowest first."""
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
