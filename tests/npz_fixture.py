"""Small .npz files to judge."""

from __future__ import annotations

import io
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


def with_header(text: str, numbers: bytes = b"", *, version: bytes = b"\x01\x00") -> bytes:
    """Return the bytes of an .npy file with any header."""
    raw = text.encode("latin-1")
    size = len(raw).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + raw + numbers
