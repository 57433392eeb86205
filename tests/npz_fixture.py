"""Small .npz files to judge."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ditas_export.generation.pixels import write_npz

Array = np.ndarray[Any, Any]


def images(count: int, *, seed: int = 0, side: int = 16, channels: int = 1) -> Array:
    """Smooth images, (N, H, W, C) uint8."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, side // 4, side // 4, channels), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def noisy(of: Array, *, most: int = 20, seed: int = 1) -> Array:
    """The same images, each pixel changed by `most` at most."""
    noise = np.random.default_rng(seed).integers(-most, most + 1, of.shape)
    return (of + noise).clip(0, 255).astype(np.uint8)


def features(count: int, width: int, *, seed: int = 0, shift: float = 0.0) -> Array:
    """Features (N, D) float32."""
    random = np.random.default_rng(seed)
    return (random.normal(shift, 1.0, (count, width)) + random.normal(size=(count, 1))).astype(
        np.float32
    )


def stack(path: Path, of: Array) -> Path:
    """Write images as ditas-sample does."""
    write_npz(path, list(of), count=len(of), like=of[0])
    return path


def saved(path: Path, **arrays: Array) -> Path:
    """Write arrays as NumPy does."""
    np.savez(path, **arrays)
    return path


def moments(of: Array, suffix: str = "") -> dict[str, Array]:
    """The moments of features, as ADM's reference files have them."""
    of = of.astype(np.float64)
    return {f"mu{suffix}": of.mean(0), f"sigma{suffix}": np.cov(of, rowvar=False)}


def archive(path: Path, entries: list[tuple[str, bytes]], **options: Any) -> Path:
    """Write a zip of any bytes by name."""
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, raw in entries:
            file.writestr(name, raw)
    return path


def npy(of: Array, **options: Any) -> bytes:
    """Return an array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, of, **options)
    return buffer.getvalue()


def zeros(path: Path, *, rows: int, width: int) -> Path:
    """Write float64 features that are all 0, and take next to nothing in the file."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("features.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(with_header(text))
        for _ in range(rows):
            entry.write(bytes(8 * width))
    return path


def with_header(text: str, numbers: bytes = b"", *, version: bytes = b"\x01\x00") -> bytes:
    """Return the bytes of an .npy file with any header."""
    raw = text.encode("latin-1")
    size = len(raw).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + raw + numbers


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
GOOD = npy(np.ones((2, 3), dtype=np.float32))


def header(shape: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return with_header(text, bytes(24))


class Runs:
    """A pickle that leaves a trace."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


OBJECTS = npy(np.array([Runs()], dtype=object), allow_pickle=True)

NO_ARRAYS: dict[str, tuple[bytes, str]] = {
    "objects": (OBJECTS, "no array of plain numbers"),
    "a pickle": (pickle.dumps(Runs()), "no array of NumPy"),
    "named fields": (npy(np.zeros(2, dtype=[("a", "f4")])), "no array of plain numbers"),
    "texts": (npy(np.array(["a", "b"])), "no array of plain numbers"),
    "complex numbers": (npy(np.ones(3, dtype=complex)), "no array of plain numbers"),
    "dates": (npy(np.zeros(3, dtype="M8[s]")), "no array of plain numbers"),
    "truth values": (npy(np.ones(3, dtype=bool)), "no array of plain numbers"),
    "no entries": (npy(np.ones((0, 3))), r"1 to 1,099,"),
    "five dimensions": (npy(np.ones((1, 1, 1, 1, 1))), "4 dimensions at most"),
    "an expression": (header("(1+1, 3)"), "no array of plain numbers"),
    "a negative size": (header("(-2, -3)"), "no array of plain numbers"),
    "a huge size": (header("(999999999999999999, 999999999999999999)"), "the file has 24"),
    "5000 digits": (header(f"({'9' * 5000},)"), "no array of plain numbers"),
    "one more row": (header("(3, 3)"), "36 bytes, and the file has 24"),
    "one less row": (header("(1, 3)"), "12 bytes, and the file has 24"),
    "a nested header": (header("(" * 5000), "no array of plain numbers"),
    "a call": (header("(2, 3)", descr="__import__('os')"), "no array of plain numbers"),
    "an unknown order": (header("(2, 3)", order="None"), "no array of plain numbers"),
    "two headers": (with_header(FLOATS * 2, bytes(24)), "no array of plain numbers"),
    "no header": (with_header("", bytes(24)), "no array of plain numbers"),
    "a header of 1 GiB": (b"\x93NUMPY\x02\x00\x00\x00\x00\x40" + bytes(99), "header of 1,073,"),
    "a header cut short": (GOOD[:40], "bytes are missing"),
    "only the sign": (GOOD[:8], "2 bytes are missing"),
    "another version": (with_header(FLOATS, bytes(24), version=b"\x04\x00"), "no array of NumPy"),
    "no array": (b"hello", "3 bytes are missing"),
    "an empty entry": (b"", "8 bytes are missing"),
}  # fmt: skip
"""Bytes of an .npy file that holds no array of plain numbers, and what is said of it."""
