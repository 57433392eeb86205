"""Pictures as bytes: PNG, a grid of them, and the .npz that ADM's evaluator reads."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditas_export.artifact_files import atomic_path
from ditas_export.paths import StrPath

NPZ_COMMENT = b"ditas-export samples"
"""The archive's comment, by which a file is known as made here."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""(…, H, W, 1 or 3) uint8: grey or RGB."""

GRID_GAP = 2
"""Pixels between two pictures of a grid."""

GRID_SIDE = 640
"""Grids of small pictures are enlarged, by a whole factor, until a side would pass this."""


def to_pixels(images: Tensor) -> Pixels:
    """Return clamp(127.5 x + 128, 0, 255), whole part, as published samples are saved.

    Args:
        images: (N, 1 or 3, H, W) float, -1 black, 1 white.

    Returns:
        (N, H, W, 1 or 3) uint8.
    """
    scaled = (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
    pixels: Pixels = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


def write_png(path: StrPath, pixels: Pixels) -> None:
    """Write one picture, (H, W, 1 or 3); atomic.

    Raises:
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    with atomic_path(path) as partial:
        image.save(partial, format="PNG")


def read_png(path: StrPath) -> Pixels:
    """Return what `write_png` wrote, (H, W, 1 or 3)."""
    path = Path(path)
    with Image.open(path) as image:
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"a picture of mode {image.mode}, which ditas-sample does not write")
        pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def grid(pictures: Sequence[Pixels], *, columns: int | None = None) -> Pixels:
    """Return pictures side by side on black, row by row, small ones enlarged.

    Args:
        pictures: one or more, of one shape (H, W, 1 or 3).
        columns: pictures in a row; a grid about as wide as high if None.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    height, width, channels = pictures[0].shape
    sheet = np.zeros(
        (rows * (height + GRID_GAP), columns * (width + GRID_GAP), channels), dtype=np.uint8
    )
    for index, picture in enumerate(pictures):
        top, left = (height + GRID_GAP) * (index // columns), (width + GRID_GAP) * (index % columns)
        sheet[top : top + height, left : left + width] = picture
    zoom = max(1, GRID_SIDE // max(sheet.shape[:2]))
    return sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)


def as_rgb(pixels: Pixels) -> Pixels:
    """Return a picture with three channels; grey ones three times the same."""
    return pixels if pixels.shape[-1] == 3 else pixels.repeat(3, axis=-1)


def write_npz(
    path: StrPath, arrays: Iterable[np.ndarray[Any, Any]], *, count: int, like: np.ndarray[Any, Any]
) -> None:
    """Write `count` arrays as one, `arr_0`, stacked, without holding them all; atomic.

    The same arrays give the same bytes.

    Args:
        path: the .npz file.
        arrays: all of one shape and type.
        count: how many.
        like: an array of that shape and type.

    Raises:
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    header = {
        "descr": np.lib.format.dtype_to_descr(like.dtype),
        "fortran_order": False,
        "shape": (count, *like.shape),
    }
    entry = zipfile.ZipInfo("arr_0.npy")  # its date is always 1980-01-01
    with (
        atomic_path(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        archive.open(entry, "w", force_zip64=True) as file,
    ):
        archive.comment = NPZ_COMMENT
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).tobytes())


def is_npz_file(path: StrPath) -> bool:
    """Return whether `write_npz` wrote a file."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == NPZ_COMMENT
    except (OSError, zipfile.BadZipFile):
        return False
