from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from quantized_fixture import save_checkpoint, tiny_dit
from typer.testing import CliRunner

from ditas_export import __version__
from ditas_export.cli.export import app

QUICK = ["--steps", "2", "--samples", "1", "--method", "linear"]


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_version() -> None:
    assert run("--version") == (0, f"ditas-export {__version__}\n", "")


def test_the_table_says_what_matters(checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = run("--model", checkpoint, *QUICK, tmp_path / "out.onnx")
    assert code == 0
    flat = " ".join(out.split())
    for wanted in ("bits per weight, all in", "worst linears", "MatMulIntegerToFloat", "dB"):
        assert wanted in flat
    assert "final_layer.linear" in flat
    assert out.splitlines()[-1] == f"next: ditas-sample {tmp_path / 'out.onnx'} -o samples"


def test_json_prints_the_manifest_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = run("--model", checkpoint, *QUICK, "--json", tmp_path / "out.onnx")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out.json").read_text())


def test_quiet_prints_nothing(checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = run("--model", checkpoint, *QUICK, "--quiet", tmp_path / "out.onnx")
    assert (code, out.strip(), err.strip()) == (0, "", "")


def test_the_command_line_wins_over_the_recipe(checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: tas\nsteps: 2\nsamples: 1\nrank: auto\nalpha-grid: [0.5]\nranges: static\n"
    )
    code, out, _ = run(
        "--model", checkpoint, "--recipe", recipe, "--method", "linear", "--json",
        tmp_path / "out.onnx",
    )  # fmt: skip
    assert code == 0
    manifest = json.loads(out)
    assert manifest["settings"]["method"] == "linear"
    assert manifest["settings"]["calibration"]["steps"] == 2
    assert manifest["file"]["ranges"] == "static"


@pytest.mark.parametrize(("flags", "tokens"), [([], 19_200), (["--no-fast"], 76_800)], ids=str)
def test_a_recipe_may_be_fast(
    checkpoint: Path, tmp_path: Path, flags: list[str], tokens: int
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fast: true\nsteps: 2\nsamples: 1\nmethod: linear\n")
    code, out, _ = run(
        "--model", checkpoint, "--recipe", recipe, *flags, "--json", tmp_path / "out.onnx"
    )
    assert code == 0
    assert json.loads(out)["settings"]["walk_tokens"] == tokens


def test_tokens_given_win_over_fast(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--fast", "--walk-tokens", "100", "--json"]
    code, out, _ = run("--model", checkpoint, *QUICK, *flags, tmp_path / "out.onnx")
    assert code == 0
    assert json.loads(out)["settings"]["walk_tokens"] == 100


def test_the_help_says_what_fast_chooses() -> None:
    code, out, _ = run("--help")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    assert "--no-fast" in words
    assert "(default: 76800, with --fast 19200)" in words


def test_a_mismatch_is_exit_code_1(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditas_export.evaluation.ties.MOST_EXCESS_DB", -500.0)
    code, _, err = run("--model", checkpoint, *QUICK, "--quiet", tmp_path / "out.onnx")
    assert code == 1
    assert "expected -500.0 at most; do not deploy it" in " ".join(err.split())


@pytest.mark.parametrize("scale", ["0.5", "-1", "nan"])
@pytest.mark.parametrize("in_recipe", [False, True])
def test_a_guidance_scale_that_means_nothing_is_refused_before_sampling(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str, in_recipe: bool
) -> None:
    monkeypatch.setattr("ditas_export.pipeline.collect_states", None)  # never called
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"cfg-scale: {'.nan' if scale == 'nan' else scale}\n")
    words = ["--recipe", recipe] if in_recipe else ["--cfg-scale", scale]
    code, _, err = run("--model", checkpoint, *QUICK, *words, tmp_path / "out.onnx")
    assert code == 2
    expected = "expected a finite number" if scale == "nan" else "guidance starts at 1, which means"
    assert f"cfg_scale={scale}" in err
    assert expected in err
    assert list(tmp_path.iterdir()) == [recipe]


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def bad_models(folder: Path, checkpoint: Path) -> dict[str, Path]:
    whole = checkpoint.read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "code.pt").write_bytes(pickle.dumps({"model": _Evil()}))
    odd = tiny_dit()
    odd.blocks[0].attn.qkv.weight = torch.nn.Parameter(torch.zeros(3, 3))
    save_checkpoint(folder / "shape.safetensors", odd)
    nan = tiny_dit()
    nan.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    save_checkpoint(folder / "nan.safetensors", nan)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")
    return {
        "truncated": folder / "truncated.safetensors",
        "code": folder / "code.pt",
        "shape": folder / "shape.safetensors",
        "nan": folder / "nan.safetensors",
        "half a diffusers folder": folder / "transformer",
        "missing": folder / "no-such.safetensors",
    }


@pytest.mark.parametrize(
    "kind", ["truncated", "code", "shape", "nan", "half a diffusers folder", "missing"]
)
def test_bad_models_are_one_line_and_exit_code_2(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    path = bad_models(models, checkpoint)[kind]
    outputs = tmp_path / "out"
    outputs.mkdir()
    code, out, err = run("--model", path, outputs / "out.onnx")
    assert code == 2
    assert err.strip().startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert "code ran" not in out + err
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "no-such"], "no recipe 'no-such': give a YAML file, or one of"),
        (["--rank", "many"], "rank='many'; expected a whole number"),
        (["--alpha-grid", "a,b"], "expected a number, 0 to 1"),
        (["--method", "best"], "no method 'best'"),
        (["--w", "5"], "weight bits are 4 or 8, not 5"),
        (["--layout", "int5"], "layout"),
        (["--ranges", "row"], "ranges"),
        (["--precision", "fp8"], "precision"),
        (["--target", "gpu"], "target='gpu'; expected one of portable, onnxruntime, tensorrt"),
        (["--adaln", "2"], "adaln"),
        (["--device", "tpu"], "device"),
    ],
    ids=str,
)
def test_bad_options_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    code, _, err = run("--model", checkpoint, *QUICK, *arguments, tmp_path / "out.onnx")
    assert code == 2
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_other_bits_than_a_small_artifact_holds_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "small.ditas.safetensors"
    form = ["--adaln", "4", "--precision", "fp16", "--save-artifact", kept]
    code, _, _ = run("--model", checkpoint, *QUICK, *form, tmp_path / "out.onnx")
    assert code == 0
    again = tmp_path / "again.onnx"
    code, _, err = run("--model", checkpoint, "--artifact", kept, "--adaln", "8", again)
    assert code == 2
    message = "keeps its modulation weights in 4 bits, and 8 were asked for; leave out --adaln, or"
    assert message in " ".join(err.split())
    assert not again.exists()


def test_bad_recipes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, message in (
        ("bits: 4\n", r"unknown options ['bits']"),
        ("- a\n", "expected option: value lines"),
        ("a: [\n", "is no YAML"),
        ("walk-tokens: 40k\n", "walk_tokens='40k'; expected a whole number"),
        ("w: four\n", "w='four'; expected a whole number"),
        ("fast: maybe\n", "fast='maybe'; expected true or false"),
        ("cfg-scale: none\n", "cfg_scale='none'; expected a number"),
        ("cfg-scale: true\n", "cfg_scale=True; expected a number"),
    ):
        recipe.write_text(text)
        code, _, err = run("--recipe", recipe, tmp_path / "out.onnx")
        assert code == 2
        assert message in " ".join(err.split())
