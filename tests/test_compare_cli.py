"""`ditas-compare` as a user runs it: table, JSON, exit codes, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from polygraphy.json import load_json
from quantized_fixture import exported, exported_reference
from typer.testing import CliRunner, Result

from ditas_export.cli.compare import app
from ditas_export.evaluation.inputs import trajectory_inputs
from ditas_export.evaluation.options import CompareOptions
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

QUICK = ["--classes", "3,7", "--steps", "2"]


def run(*words: object) -> Result:
    arguments = [exported_reference(), *words]
    return CliRunner().invoke(app, [str(word) for word in arguments])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """The tiny model, whose low-rank branches are noise: its linears are far from float."""
    folder = tmp_path_factory.mktemp("compare")
    words = ["--json", folder / "out.json", "--gen-inputs", folder / "inputs.json"]
    result = run(exported(), *QUICK, *words)
    assert result.exit_code == 0, result.output
    return result, folder


def test_the_tables(done: tuple[Result, Path]) -> None:
    words = done[0].stdout.split()
    assert {"999", "total", "blocks.0.attn.qkv"} <= set(words)
    printed = " ".join(words)
    assert "first diverging linear: blocks.0.attn.qkv" in printed
    assert "worst linears, all time steps" in printed


def test_the_json(done: tuple[Result, Path]) -> None:
    facts = json.loads((done[1] / "out.json").read_text())
    assert [step["timestep"] for step in facts["steps"]] == [999, 0]
    assert facts["first_diverging_linear"] == "blocks.0.attn.qkv"
    assert facts["total_snr_db"] == facts["outputs"]["model_output"]["snr_db"]
    assert facts["matches"] is None
    assert facts["not_finite_timestep"] is None
    assert facts["options"]["steps"] == 2


def test_polygraphy_reads_the_inputs(done: tuple[Result, Path]) -> None:
    options = CompareOptions(
        reference=exported_reference(), model=exported(), classes="3,7", steps=2
    )
    written = load_json(str(done[1] / "inputs.json"))
    with OnnxRuntimeRunner(options.reference) as runner:
        inputs = list(trajectory_inputs(options, runner))
    for feed, entry in zip(written, inputs, strict=True):
        assert list(feed) == ["latents", "timesteps", "class_labels"]
        for name, value in entry.feed.items():
            assert feed[name].dtype == value.dtype
            np.testing.assert_array_equal(feed[name], value)


def test_the_exit_code_holds_the_total_against_the_threshold(done: tuple[Result, Path]) -> None:
    total = json.loads((done[1] / "out.json").read_text())["total_snr_db"]
    below = run(exported(), *QUICK, "--no-linears", "--threshold-db", total - 0.1, "--quiet")
    assert (below.exit_code, below.output) == (0, "")
    above = run(exported(), *QUICK, "--no-linears", "--threshold-db", total + 0.1)
    assert above.exit_code == 1
    assert "misses" in above.stdout


def test_an_overflow_is_named(tmp_path: Path) -> None:
    """Of a parameter, as rounding to float16 leaves it."""
    model = onnx.load(str(exported()))
    (bias,) = [each for each in model.graph.initializer if each.name == "final_layer.linear/bias"]
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] = np.inf
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    half = tmp_path / "half.onnx"
    onnx.save(model, str(half))
    words = [half, *QUICK, "--no-linears", "--json", tmp_path / "out.json"]
    result = run(*words, "--threshold-db", 20)
    assert result.exit_code == 1, result.output
    printed = " ".join(result.stdout.split())
    assert (
        "puts out NaN or infinity, first at time step 999; what computes in float16 overflows"
        in printed
    )
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["not_finite_timestep"] == 999
    assert facts["total_snr_db"] is None
    assert facts["outputs"]["model_output"]["max_abs"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "cat"], "write 3,7 or 0-9 or random"),
        (["--classes", "10"], "names class 10; this model has 0 to 9"),
        (["--steps", "1"], "takes 2 to 1000 steps"),
        (["--images", "0"], "images=0; expected a whole number, 1 to"),
        (["--cfg-scale", "nan"], "expected a finite number"),
        (["--cfg-scale", "0.5"], "cfg_scale=0.5: guidance starts at 1, which means none; use 1"),
        (["--threshold-db", "nan"], "threshold_db=nan; expected a finite number"),
        (["--json", "/no/such/folder/a.json"], "/no/such/folder does not exist"),
        (["--gen-inputs", "/no/such/folder/a.json"], "/no/such/folder does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    result = run(exported(), *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["absent.onnx", "absent.plan"])
def test_a_model_that_is_not_there(tmp_path: Path, name: str) -> None:
    result = run(tmp_path / name)
    assert result.exit_code == 2
    assert name in result.stderr
