"""The README's own commands and snippets, as written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from ditas_export.cli import build, compare, sample
from ditas_export.cli.export import app
from ditas_export.dit.checkpoint import load_dit
from ditas_export.onnx_export.export import export_reference
from ditas_export.options import ExportOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {
    "ditas-export": app,
    "ditas-sample": sample.app,
    "ditas-build": build.app,
    "ditas-compare": compare.app,
}


def blocks(language: str = "") -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == language]


def commands(program: str) -> list[list[str]]:
    """Return the arguments of every call of a program in the README."""
    found = []
    for block in blocks():
        for line in block.splitlines():
            for command in line.split("#")[0].split("&&"):
                words = shlex.split(command)
                if words[:1] == [program]:
                    found.append(words[1:])
    return found


@pytest.fixture(scope="module")
def first_command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the first command of the README, defaults and all, in a folder of its own."""
    folder = tmp_path_factory.mktemp("readme")
    arguments = commands("ditas-export")[0]
    assert arguments == ["--w", "4", "--a", "8", "out.onnx"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder


def test_the_first_command_gives_what_the_readme_says(first_command: Path) -> None:
    manifest = json.loads((first_command / "out.json").read_text())
    assert manifest["model"]["source"]
    # 40 dB are the README's figure; seeds and processors move it by about one.
    assert manifest["verification"]["final_latents_snr_db_mean"] > 36
    assert manifest["verification"]["matches_fake_quantized_forward"] is True
    kernels = manifest["verification"]["kernels"]
    assert kernels["MatMulIntegerToFloat"] == 2 * len(manifest["linears"])  # each with its branch


def test_the_onnxruntime_snippet_runs(first_command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first_command)
    snippet = next(block for block in blocks("python") if "InferenceSession" in block)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert names["model_output"].shape == (2, 2, 16, 16)  # type: ignore[attr-defined]


def test_the_sampling_commands_make_images(
    first_command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first_command)
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(first_command / "cache"))
    for arguments in commands("ditas-sample"):
        result = CliRunner().invoke(sample.app, arguments)
        assert result.exit_code == 0, result.output
    for folder in ("samples", "float-samples"):
        assert len(list((first_command / folder).glob("0*.png"))) == 10


def test_the_accuracy_commands_run(first_command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ONNX Runtime's side: the engine needs a GPU."""
    monkeypatch.chdir(first_command)
    export_reference(load_dit("digits").model, Path("fp32.onnx"))
    of_files = [words for words in commands("ditas-compare") if "out.plan" not in words]
    for arguments in of_files:
        result = CliRunner().invoke(compare.app, arguments)
        assert result.exit_code == 0, result.output
        assert "no linear diverges" in " ".join(result.stdout.split())
    program = str(Path(sys.executable).with_name("polygraphy"))
    for arguments in commands("polygraphy"):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert "25/25 iterations" in done.stdout


def test_the_service_snippet_runs(first_command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first_command)
    snippet = next(block for block in blocks("python") if "SamplingSettings" in block)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert names["batch"].pixels.shape == (2, 16, 16, 1)  # type: ignore[attr-defined]


def test_other_commands_name_options_that_exist() -> None:
    everything = set()
    for program, command in PROGRAMS.items():
        known = _flags(command)
        everything |= known
        for arguments in commands(program):
            for word in arguments:
                if word.startswith("-"):
                    assert word in known, arguments
    for option in re.findall(r"`(--[a-z-]+)", README):
        assert option in everything, option


def _flags(command: typer.Typer) -> set[str]:
    parsed = typer.main.get_command(command)
    return {flag for parameter in parsed.params for flag in parameter.opts}


def test_the_python_snippet_names_what_exists() -> None:
    snippet = next(block for block in blocks("python") if "ExportOptions" in block)
    compile(snippet, "README.md", "exec")
    assert ExportOptions(output=Path("out.onnx"), model="digits", w=4, a=8).method == "ditas-plus"


def test_files_that_the_readme_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("recipe", sorted((ROOT / "calib").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_fill_options(recipe: Path) -> None:
    options = {key.replace("-", "_"): value for key, value in yaml.safe_load(
        recipe.read_text()).items()}  # fmt: skip
    built = ExportOptions(output=Path("out.onnx"), **options)
    assert (built.w, built.a, built.steps, built.samples) == (4, 8, 50, 12)


def test_ci_runs_the_readmes_test_command(tmp_path: Path) -> None:
    """`.ci/run` on a README whose test command only leaves a trace."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    command = next(block for block in blocks() if "pytest" in block)
    (tmp_path / "README.md").write_text(README.replace(command, "echo ran > trace\n"))
    subprocess.run(["bash", str(script)], check=True, cwd=tmp_path)
    assert (tmp_path / "trace").read_text() == "ran\n"
