import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditas_export.generation.pixels import (
    GRID_GAP,
    GRID_SIDE,
    as_rgb,
    grid,
    read_png,
    to_pixels,
    write_npz,
    write_png,
)


@given(st.floats(-3, 3, width=32))
def test_pixels_are_the_published_conversion(value: float) -> None:
    # sample_ddp.py of DiT: torch.clamp(127.5 * samples + 128.0, 0, 255).to(torch.uint8)
    expected = int(np.clip(np.float32(127.5) * np.float32(value) + np.float32(128), 0, 255))
    assert to_pixels(torch.full((1, 1, 1, 1), value)).item() == expected


def test_channels_come_last() -> None:
    images = torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    pixels = to_pixels(images)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels[1, 2, 3, 0] == to_pixels(images[1:, :1, 2:3, 3:4]).item()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, channels), dtype=np.uint8)
    write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(read_png(tmp_path / "a.png"), pixels)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_grid_shows_every_picture_in_its_place() -> None:
    pictures = [np.full((200, 190, 3), 40 * index, dtype=np.uint8) for index in range(5)]
    sheet = grid(pictures, columns=2)
    assert sheet.shape == (3 * (200 + GRID_GAP), 2 * (190 + GRID_GAP), 3)
    assert (sheet[202:402, 192:382] == 120).all()  # the fourth: second row, second column
    assert (sheet[404:604, :190] == 160).all()
    assert (sheet[404:604, 192:] == 0).all()


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    sheet = grid([picture])
    zoom = GRID_SIDE // 10
    assert sheet.shape == (10 * zoom, 10 * zoom, 1)
    assert np.array_equal(sheet[::zoom, ::zoom][:8, :8], picture)


def test_npz_is_what_numpy_reads_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, iter(arrays), count=7, like=arrays[0])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as content:
        assert content.files == ["arr_0"]
        assert content["arr_0"].dtype == np.uint8
        assert np.array_equal(content["arr_0"], arrays)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None


def test_grey_becomes_rgb_and_rgb_stays() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    assert all(np.array_equal(as_rgb(grey)[..., channel], grey[..., 0]) for channel in range(3))
    assert as_rgb(as_rgb(grey)) is not grey
    assert np.array_equal(as_rgb(as_rgb(grey)), as_rgb(grey))
