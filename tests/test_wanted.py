"""Images by label and seed: the list, and that each is what it would be alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quantized_fixture import exported
from typer.testing import CliRunner

from ditas_export.cli.sample import app
from ditas_export.errors import RunnerError
from ditas_export.generation.wanted import WantedImages, read_wanted


def test_a_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# label seed\n3 17\n\n7,0  # a comment\n 10 , 5\n4\n", encoding="utf-8")
    assert read_wanted(path) == WantedImages(labels=(3, 7, 10, 4), seeds=(17, 0, 5, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"3 17\n3 -1\n", "line 2: '3 -1'; expected LABEL SEED"),
        (b"3 17 2\n", "line 1"),
        (b"three\n", "line 1: 'three'"),
        (b"3 99999999999999999999\n", "line 1: a number beyond"),
        (b"# nothing\n", "names no image"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_lists_of_another_form(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(RunnerError, match=message):
        read_wanted(path)
    with pytest.raises(RunnerError, match="cannot read"):
        read_wanted(tmp_path)


def sample(*arguments: str | Path) -> tuple[int, str]:
    model = [str(exported()), "--steps", "2", "--runtime", "onnxruntime"]
    ran = CliRunner().invoke(app, model + [str(argument) for argument in arguments])
    return ran.exit_code, ran.stderr


def test_an_image_of_a_list_is_the_first_image_of_its_seed(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("3 17\n7 17\n3 4\n", encoding="utf-8")
    code, _ = sample("--list", path, "--batch", "3", "-o", tmp_path / "listed")
    assert code == 0
    listed = np.load(tmp_path / "listed" / "samples.npz")["arr_0"]
    for index, (label, seed) in enumerate(((3, 17), (7, 17), (3, 4))):
        folder = tmp_path / f"alone{index}"
        # Three rows again: what is alone is filled up, and the sums are the same.
        code, _ = sample(
            "--classes", f"{label},0,0", "--seed", str(seed), "--batch", "3", "-o", folder
        )
        assert code == 0
        assert np.array_equal(np.load(folder / "samples.npz")["arr_0"][0], listed[index])


def test_a_list_excludes_what_it_says_itself(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("3 17\n", encoding="utf-8")
    code, said = sample("--list", path, "--seed", "0", "--images", "2", "-o", tmp_path / "out")
    assert code == 2
    assert "leave out --images and --seed" in said
    path.write_text("99 17\n", encoding="utf-8")
    code, said = sample("--list", path, "-o", tmp_path / "out")
    assert code == 2
    assert "classes [99] are out of range" in said
