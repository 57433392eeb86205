"""`ditas-eval` as a user runs it: table, JSON, exit codes, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from npz_fixture import features, images, noisy, saved, stack
from typer.testing import CliRunner, Result

from ditas_export.cli.evaluate import app


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    x = images(12)
    return stack(folder / "samples.npz", noisy(x)), stack(folder / "reference.npz", x)


def test_the_table(pair: tuple[Path, Path]) -> None:
    result = run(*pair, "--resamples", 5)
    assert result.exit_code == 0, result.output
    order = [result.stdout.index(word) for word in ("PSNR, dB", "SSIM", "FID", "KID", "recall")]
    assert order == sorted(order)
    assert "12 images against 12 images; features: the bundled digit classifier" in result.stdout
    assert "no sFID: there are no spatial features of both" in result.stdout
    assert "sFID  " not in result.stdout


def test_the_json(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*pair, "--resamples", 5, "--seed", 3, "--json", tmp_path / "out.json", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["format"] == "ditas-export evaluation 1"
    assert facts["options"]["seed"] == 3
    assert facts["figures"]["precision"]["interval"] is not None
    assert set(facts["versions"]) == {"ditas-export", "torch"}


def test_without_intervals(pair: tuple[Path, Path]) -> None:
    result = run(*pair, "--resamples", 0, "--no-paired")
    assert result.exit_code == 0
    assert " to " not in result.stdout.partition("12 images")[0].partition("interval")[2]
    assert "no pairs, as asked" in result.stdout


def test_a_file_name_is_no_markup(tmp_path: Path) -> None:
    path = saved(tmp_path / "[red]a[", features=features(9, 3))
    result = run(path.with_name("[red]a[.npz"), path.with_name("[red]a[.npz"), "--resamples", 0)
    assert result.exit_code == 0, result.output
    assert "[red]a[" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "vgg"], "features='vgg'; expected one of auto, given, digits, inception"),
        (["--resamples", "-1"], "resamples=-1; expected a whole number, 0 to 10000"),
        (["--json", "/no/such/folder/a.json"], "/no/such/folder does not exist"),
        (["--features", "given", "--no-paired"], "has neither features nor mu and sigma"),
        (["--features", "inception"], "Inception's features need torch-fidelity"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    pair: tuple[Path, Path], words: list[str], message: str
) -> None:
    result = run(*pair, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line]) == 1
    assert result.stdout == ""


def test_a_file_that_is_not_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(tmp_path / "absent.npz", pair[1])
    assert result.exit_code == 2
    assert "absent.npz cannot be read: No such file or directory" in result.stderr


def test_objects_are_never_unpickled(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", arr_0=np.array([{"a": 1}], dtype=object))
    result = run(path, pair[1])
    assert result.exit_code == 2
    assert "arr_0 is no array of plain numbers" in result.stderr
