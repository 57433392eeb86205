"""A folder of samples that can be taken up again: one file per image, then a grid and an .npz.

Every image is written when its batch is done, whole or not at all, and `samples.json` says what the
folder holds. So a run that was killed goes on with the images that are missing, and ranks that
share the folder need not talk about images.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditas_export.artifact_files import (
    atomic_path,
    differences,
    partial_path,
    require_writable,
    sole_process,
)
from ditas_export.errors import ArtifactError
from ditas_export.generation.pixels import (
    as_rgb,
    grid,
    read_png,
    write_npz,
    write_png,
)
from ditas_export.generation.sampler import SampledBatch
from ditas_export.text_files import TextError, read_json

FORMAT = "ditas-export samples 1"
LOCK_NAME = ".lock"
FACTS_NAME = "samples.json"
GRID_NAME = "grid.png"
NPZ_NAME = "samples.npz"
GRID_PICTURES = 64
"""The grid shows the first pictures only."""


class ImageFolder:
    """The files of one sampling job.

    Args:
        path: the folder.
        count: images in all.
        pictures: whether the images are PNGs, or latents as .npy.
    """

    def __init__(self, path: Path, *, count: int, pictures: bool) -> None:
        self.path = path
        self.count = count
        self.pictures = pictures

    def check(self) -> None:
        """Refuse a folder that holds anything but samples; nothing is touched.

        Raises:
            ArtifactError: no folder, one with files of others and no `samples.json`, or one in
                which anything but a file has the name of an image.
        """
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise ArtifactError(
                f"cannot make the folder {self.path}: a file is there; pick another"
            )
        if (self.path / FACTS_NAME).exists():
            require_writable(self.path / FACTS_NAME)
            require_writable(self.path / GRID_NAME)
            for entry in os.scandir(self.path):
                if self.has_name(entry.name) and not entry.is_file():
                    require_writable(Path(entry))  # says what it is
            return
        known = {LOCK_NAME, partial_path(self.path / FACTS_NAME).name}
        if strangers := sorted({entry.name for entry in self.path.iterdir()} - known):
            raise ArtifactError(
                f"{self.path} holds {strangers[0]} and no {FACTS_NAME}, so it is no folder of "
                f"samples; pick another, or delete it"
            )

    def has_name(self, name: str) -> bool:
        """Return whether a name in the folder is that of an image, the grid or the facts."""
        return (
            name in (FACTS_NAME, GRID_NAME) or re.fullmatch(r"\d{6,}\.(png|npy)", name) is not None
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, if it is not there, and hold it for this job.

        Raises:
            ArtifactError: it cannot be made, or another process writes to it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot make the folder {self.path}: {error.strerror}; pick another"
            ) from error
        with sole_process(self.path / LOCK_NAME, what=self.path):
            yield

    def prepare(self, facts: Mapping[str, Any]) -> None:
        """Say in a new folder what it will hold, or take up one of the same job.

        Args:
            facts: what the bytes of the images depend on, as JSON values.

        Raises:
            ArtifactError: the folder holds samples of another job.
        """
        stated = json.loads(json.dumps({"format": FORMAT, **facts}, allow_nan=False))
        facts_path = self.path / FACTS_NAME
        if not facts_path.is_file():
            with atomic_path(facts_path) as partial:
                partial.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
            return
        if changed := differences(_read_facts(facts_path), stated):
            raise ArtifactError(
                f"{self.path} holds samples of another run ({'; '.join(changed)}); pick another "
                f"folder, or delete it"
            )

    def file(self, index: int) -> Path:
        """Return the path of one image."""
        return self.path / f"{index:06d}.{'png' if self.pictures else 'npy'}"

    def lacks(self, indices: Iterable[int]) -> bool:
        """Return whether any of the images is still to be made."""
        return not all(self.file(index).is_file() for index in indices)

    def write(self, batch: SampledBatch) -> None:
        """Write the images of a batch that are not there yet.

        Raises:
            ArtifactError: a file cannot be written.
        """
        for row, index in enumerate(batch.indices):
            if self.file(index).is_file():
                continue
            if batch.pixels is not None:
                write_png(self.file(index), batch.pixels[row])
                continue
            with atomic_path(self.file(index)) as partial, partial.open("wb") as file:
                np.save(file, batch.latents[row].cpu().numpy())

    def read(self, index: int) -> np.ndarray[Any, Any]:
        """Return one image: (H, W, 1 or 3) uint8, or latents (C, h, w) float32.

        Raises:
            ArtifactError: the file is gone or damaged.
        """
        path = self.file(index)
        try:
            return read_png(path) if self.pictures else np.load(path)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot read {path}: {error}; delete it and run again") from error

    def finish(self, npz: Path) -> None:
        """Write the grid and, to `npz`, all images stacked, once every image is there.

        Pictures are stacked as (N, H, W, 3) uint8, which ADM's evaluator takes; latents as
        (N, C, h, w) float32.

        Raises:
            ArtifactError: a file cannot be read or written.
        """
        if self.pictures:
            shown = [self._alike(index) for index in range(min(self.count, GRID_PICTURES))]
            write_png(self.path / GRID_NAME, grid(shown))
        arrays = (self._stacked(index) for index in range(self.count))
        write_npz(npz, arrays, count=self.count, like=self._stacked(0))

    def _stacked(self, index: int) -> np.ndarray[Any, Any]:
        """Return an image as it stands in the .npz."""
        return as_rgb(self._alike(index)) if self.pictures else self._alike(index)

    def _alike(self, index: int) -> np.ndarray[Any, Any]:
        """Return one image; all have the shape of the first."""
        image = self.read(index)
        if index and image.shape != (first := self.read(0)).shape:
            raise ArtifactError(
                f"{self.file(index)} is {image.shape}, and {self.file(0).name} {first.shape}; "
                f"delete the one that is wrong and run again"
            )
        return image


def _read_facts(path: Path) -> dict[str, Any]:
    """Return what `samples.json` says."""
    try:
        found = read_json(path)
    except (OSError, TextError) as error:
        raise ArtifactError(f"{path} is not readable: {error}; pick another folder") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is none of ours; pick another folder")
    return found
