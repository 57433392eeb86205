from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditas_export.errors import ArtifactError
from ditas_export.generation.image_folder import ImageFolder
from ditas_export.generation.sampler import SampledBatch

FACTS = {"model": "tiny", "settings": {"steps": 50, "seed": 0}}


def batch(first: int, last: int, *, pictures: bool = True) -> SampledBatch:
    generator = np.random.default_rng(first)
    count = last - first
    return SampledBatch(
        indices=range(first, last),
        latents=torch.from_numpy(generator.normal(size=(count, 4, 2, 2)).astype(np.float32)),
        pixels=generator.integers(0, 256, (count, 6, 6, 1), dtype=np.uint8) if pictures else None,
    )


def test_a_finished_folder_holds_pngs_grid_and_npz(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "out", count=5, pictures=True)
    with folder.held():
        folder.prepare(FACTS)
    batches = [batch(0, 3), batch(3, 5)]
    for part in batches:
        folder.write(part)
    folder.finish(tmp_path / "out" / "samples.npz")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    images = [f"{index:06d}.png" for index in range(5)]
    assert names == [*images, "grid.png", "samples.json", "samples.npz"]
    with np.load(tmp_path / "out" / "samples.npz") as content:
        stacked = content["arr_0"]
    assert stacked.shape == (5, 6, 6, 3)
    expected = np.concatenate([part.pixels for part in batches])
    assert np.array_equal(stacked, expected.repeat(3, axis=-1))


def test_latents_are_kept_as_they_are(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, count=2, pictures=False)
    folder.prepare(FACTS)
    part = batch(0, 2, pictures=False)
    folder.write(part)
    folder.finish(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as content:
        assert np.array_equal(content["arr_0"], part.latents.numpy())
    assert not (tmp_path / "grid.png").exists()


def test_only_missing_images_are_asked_for(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, count=5, pictures=True)
    folder.prepare(FACTS)
    folder.write(batch(0, 3))
    assert not folder.lacks(range(3))
    assert folder.lacks(range(3, 5))
    folder.file(1).unlink()
    assert folder.lacks(range(3))


def test_the_same_job_is_taken_up_and_another_is_refused(tmp_path: Path) -> None:
    ImageFolder(tmp_path, count=5, pictures=True).prepare(FACTS)
    ImageFolder(tmp_path, count=5, pictures=True).prepare(FACTS)
    other = {"model": "tiny", "settings": {"steps": 25, "seed": 0}}
    with pytest.raises(ArtifactError, match=r"another run \(steps 50, now 25\); pick another"):
        ImageFolder(tmp_path, count=5, pictures=True).prepare(other)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = ImageFolder(tmp_path / "file" / "out", count=1, pictures=True)
    with pytest.raises(ArtifactError, match="cannot make the folder"), folder.held():
        pass


@pytest.mark.parametrize("name", ["000000.png", "holiday.jpg", "samples.npz"])
def test_a_folder_of_others_is_refused(tmp_path: Path, name: str) -> None:
    """Not even an image of our name is taken for ours without `samples.json`."""
    (tmp_path / name).write_bytes(b"theirs")
    with pytest.raises(ArtifactError, match=f"holds {name} and no samples.json"):
        ImageFolder(tmp_path, count=1, pictures=True).check()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"theirs"]


def test_what_a_killed_process_left_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on nowhere")
    (tmp_path / ".samples.json.partial").write_text("{")
    folder = ImageFolder(tmp_path, count=1, pictures=True)
    folder.check()
    with folder.held():
        folder.prepare(FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.json"]


def test_one_process_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, count=1, pictures=True)
    with folder.held():
        message = f"process {os.getpid()} on .* is writing .* now"
        with pytest.raises(ArtifactError, match=message), folder.held():
            pass


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_damaged_description_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"samples\.json"):
        ImageFolder(tmp_path, count=1, pictures=True).prepare(FACTS)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, count=1, pictures=True)
    folder.file(0).write_bytes(b"no png")
    with pytest.raises(ArtifactError, match=r"cannot read .*000000\.png.*delete it"):
        folder.finish(tmp_path / "all.npz")


@pytest.mark.parametrize(("mode", "size"), [("RGB", (9, 9)), ("RGBA", (8, 8)), ("P", (8, 8))])
def test_a_picture_of_another_kind_is_named(
    tmp_path: Path, mode: str, size: tuple[int, int]
) -> None:
    folder = ImageFolder(tmp_path, count=2, pictures=True)
    Image.new("RGB", (8, 8)).save(folder.file(0))
    Image.new(mode, size).save(folder.file(1))
    with pytest.raises(ArtifactError, match=r"000001\.png.*delete"):
        folder.finish(tmp_path / "all.npz")
