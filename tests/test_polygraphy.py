"""NVIDIA's polygraphy command line on exported files, each tool as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from quantized_fixture import TINY, example_inputs, exported, exported_reference, fed
from typer.testing import CliRunner

from ditas_export.cli.compare import app
from ditas_export.onnx_export.file_facts import read_config
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="extra [rtx]"
)

FILES = {"int4": exported, "reference": exported_reference}


def polygraphy(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command, with TensorRT for RTX where it asks for TensorRT."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("polygraphy")), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )


def passed(*words: str | Path) -> str:
    done = polygraphy(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_rtx
def test_convert_builds_an_engine(tmp_path: Path) -> None:
    """A strongly typed one: the file decides every precision, not Polygraphy."""
    plan = tmp_path / "out.plan"
    shapes = [
        word
        for edge, rows in (("min", 1), ("opt", 2), ("max", 8))
        for word in (
            f"--trt-{edge}-shapes",
            f"latents:[{rows},3,8,8]",
            f"timesteps:[{rows}]",
            f"class_labels:[{rows}]",
        )
    ]
    log = passed("convert", exported(), "--convert-to", "trt", "-o", plan, *shapes)
    assert "STRONGLY_TYPED" in log
    assert plan.stat().st_size > 0


@needs_rtx
@pytest.mark.parametrize("kind", FILES)
def test_the_parser_takes_the_whole_graph(kind: str, tmp_path: Path) -> None:
    log = passed("inspect", "capability", FILES[kind](), "-o", tmp_path / "parts")
    assert "Graph is fully supported by TensorRT" in log
    assert not (tmp_path / "parts").exists()  # where the parts that are not supported would lie


def test_inspect_model_shows_the_interface() -> None:
    shown = passed("inspect", "model", exported())
    assert "ONNX Opset: 21" in shown
    for value in (
        "latents [dtype=float32, shape=('N', 3, 8, 8)]",
        "timesteps [dtype=int64, shape=('N',)]",
        "class_labels [dtype=int64, shape=('N',)]",
        "model_output [dtype=float32, shape=('N', 6, 8, 8)]",
    ):
        assert value in shown


@pytest.mark.parametrize("layout", ["int4", "int8"])
def test_a_sanitized_file_gives_the_same(layout: str, tmp_path: Path) -> None:
    original, clean = exported(layout=layout), tmp_path / "clean.onnx"  # type: ignore[arg-type]
    passed("surgeon", "sanitize", original, "-o", clean)
    assert read_config(clean) == TINY
    outputs = []
    for path in (original, clean):
        with OnnxRuntimeRunner(path, threads=1) as runner:
            outputs.append(runner(fed(*example_inputs())))
    assert torch.equal(*outputs)


def test_folding_constants_leaves_the_weights_quantized(tmp_path: Path) -> None:
    folded = tmp_path / "folded.onnx"
    passed("surgeon", "sanitize", exported(), "-o", folded, "--fold-constants", "--cleanup")
    kinds = [
        [node.op_type for node in onnx.load(str(path)).graph.node] for path in (exported(), folded)
    ]
    assert sorted(kinds[0]) == sorted(kinds[1])


def test_run_compares_on_the_inputs_that_compare_writes(tmp_path: Path) -> None:
    """As in the README; `ditas-compare` and Polygraphy's own SNR agree at every time step."""
    model = exported(weight_bits=8, layout="int8", rank=0)
    inputs, outputs = tmp_path / "inputs.json", tmp_path / "outputs.json"
    words = [exported_reference(), model, "--steps", 3, "--gen-inputs", inputs, "--no-linears"]
    result = CliRunner().invoke(app, [*map(str, words), "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    onnxrt = ["--onnxrt", "--load-inputs", inputs]
    passed("run", exported_reference(), *onnxrt, "--save-outputs", outputs)
    against = ["run", model, *onnxrt, "--load-outputs", outputs, "--compare", "snr"]
    log = passed(*against, "--snr-threshold", "40")
    assert "3/3 iterations" in log
    assert _polygraphys_snr(log) == pytest.approx(_our_snr(tmp_path / "out.json"), abs=0.05)
    assert polygraphy(*against, "--snr-threshold", "70").returncode == 1


def _polygraphys_snr(log: str) -> list[float]:
    lines = [line for line in log.splitlines() if " SNR: " in line]
    return [float(line.split("SNR: ")[1].split()[0]) for line in lines]


def _our_snr(path: Path) -> list[float]:
    steps = json.loads(path.read_text())["steps"]
    return [step["outputs"]["model_output"]["snr_db"] for step in steps]
