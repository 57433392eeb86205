"""A file whose metadata a tool left out: every command says what is missing and why."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import typer
from quantized_fixture import exported, exported_reference
from typer.testing import CliRunner

from ditas_export.cli import build, compare, sample
from ditas_export.onnx_export.file_facts import CONFIG_KEY, FORM_KEY, IDENTITY_KEY

KEYS = (CONFIG_KEY, FORM_KEY)
"""What a file needs; of the identity, files of earlier versions have none."""


@pytest.fixture(scope="module", params=[KEYS, (CONFIG_KEY,), (FORM_KEY,)], ids="+".join)
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported file without some of its metadata, or without all, as sanitizers leave it."""
    lost = {*request.param, *([IDENTITY_KEY] if request.param == KEYS else [])}
    model = onnx.load(str(exported()))
    kept = [entry for entry in model.metadata_props if entry.key not in lost]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    path = tmp_path_factory.mktemp("bare") / "bare.onnx"
    onnx.save(model, str(path))
    return path


COMMANDS: dict[str, tuple[typer.Typer, list[str]]] = {
    "sample": (sample.app, ["{bare}", "--runtime", "onnxruntime", "-o", "{folder}/samples"]),
    "compare": (compare.app, ["{reference}", "{bare}"]),
    "compare, as reference": (compare.app, ["{bare}", "{reference}"]),
    "build": (build.app, ["{bare}", "-o", "{folder}/out.plan"]),
    "dry run": (build.app, ["{bare}", "--dry-run"]),
    "commands": (build.app, ["{bare}", "--dry-run", "--trtexec"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_lost_metadata_are_one_line_and_exit_code_2(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ditas_export.engine.products.Product.is_installed", True)
    app, words = COMMANDS[name]
    places = {"bare": bare, "folder": tmp_path, "reference": exported_reference()}
    result = CliRunner().invoke(app, [word.format(**places) for word in words])
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert f"{bare} has no metadata entry ditas_export." in error
    assert "a tool that rewrote it left the metadata out" in error
    assert not (tmp_path / "out.plan").exists()
