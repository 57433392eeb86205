"""Files in bfloat16: what they compute, which runtimes take them, and what is said where none does.

ONNX Runtime has no bfloat16 kernels on CPUs, so OpenVINO and onnx's own evaluator are the judges.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from quantized_fixture import (
    example_inputs,
    exported,
    exported_reference,
    fed,
    folded_linear,
    quantized_tiny_dit,
    snr_db,
    tiny_dit,
    tiny_folded,
    write_linear,
)
from typer.testing import CliRunner

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import FakeQuantLinear, fake_quantized_model
from ditas_export.cli.export import app
from ditas_export.errors import OnnxExportError, RunnerError, VerificationError
from ditas_export.evaluation.compare import compare
from ditas_export.evaluation.options import CompareOptions
from ditas_export.onnx_export.file_facts import read_form
from ditas_export.options import ExportOptions
from ditas_export.quantization.ranges import MAX_CODE, RANGE_FLOOR, token_ranges, unit_scale
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.openvino_runner import OpenVINORunner

BF16 = torch.bfloat16
_BFLOAT16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="extra [openvino]")


@needs_openvino
@pytest.mark.parametrize(
    "form",
    [
        {"layout": "int4", "ranges": "token"},
        {"layout": "int8", "ranges": "static", "rank": 0},
        {"layout": "int8", "ranges": "token", "target": "tensorrt"},
        {"layout": "int4", "ranges": "static", "target": "tensorrt"},
        {"layout": "int4", "adaln_bits": 8},
        {"layout": "int4", "adaln_bits": 4},
        {"layout": "int4", "activation_bits": 16, "block_size": 32},
        {"layout": "int8", "weight_bits": 8},
        {"layout": "int8", "weight_bits": 8, "activation_bits": 16},
    ],
    ids=str,
)
def test_openvino_computes_the_fake_quantized_forward(form: dict[str, Any]) -> None:
    kept = ("rank", "activation_bits", "adaln_bits", "block_size", "weight_bits")
    folded = tiny_folded(dtype=BF16, **{name: form[name] for name in kept if name in form})
    latents, *rest = example_inputs(batch=3)
    model = fake_quantized_model(folded, ranges=form.get("ranges", "token"))
    with OpenVINORunner(exported(dtype=BF16, **form), threads=1) as runner:
        out = runner(fed(latents, *rest))
    # Every float operation of both sides rounds to 2⁻⁹: 42.8 to 43.6 dB were seen.
    assert snr_db(model(latents.to(BF16), *rest), out) > 38


@needs_openvino
def test_openvino_multiplies_integers() -> None:
    runner = OpenVINORunner(exported(dtype=BF16, layout="int4"), threads=1)
    kinds = [node.get_rt_info() for node in runner._backend.model.get_runtime_model().get_ops()]
    products = [
        kind["runtimePrecision"].astype(str)
        for kind in kinds
        if kind["layerType"].astype(str) == "FullyConnected"
    ]
    assert products.count("i8") == 2 * len(tiny_folded().linears)  # with the low-rank factor's


def test_a_linear_in_onnxs_own_evaluator(tmp_path: Path) -> None:
    linear = folded_linear(dtype=BF16)
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1)).to(BF16)
    for ranges in ("token", "static"):
        path = tmp_path / f"{ranges}.onnx"
        write_linear(path, linear, layout="int8", ranges=ranges, activation_bits=8,
                     splits_output=False)  # fmt: skip
        given = x.view(torch.int16).numpy().view(_BFLOAT16)
        (out,) = ReferenceEvaluator(str(path)).run(None, {"x": given})
        expected = FakeQuantLinear(linear, ranges=ranges, activation_bits=8)(x)
        # The evaluator rounds every partial sum to 2⁻⁹, torch only the whole.
        assert snr_db(expected, torch.from_numpy(out.astype(np.float32))) > 35


def test_the_constants_are_bfloat16_but_for_the_patch_embedding() -> None:
    for path in (exported(dtype=BF16, layout="int4"), exported_reference(BF16)):
        graph = onnx.load(str(path)).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        floats = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT}
        assert {name for name in floats if not name.startswith("t_embedder/")} == {
            "x_embedder.proj.weight",
            "x_embedder.proj.bias",
        }
        assert onnx.TensorProto.BFLOAT16 in types.values()
        assert read_form(path).float_type == "bf16"
        halves = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16}
        leaves = {name.rpartition("/")[2] for name in halves}
        assert leaves <= {"multipliers", "ones"}  # integers, exact in any float type


def test_the_patch_embedding_keeps_what_bfloat16_holds() -> None:
    graph = onnx.load(str(exported(dtype=BF16, layout="int4"))).graph
    stored = next(each for each in graph.initializer if each.name == "x_embedder.proj.weight")
    expected = tiny_dit().state_dict()["x_embedder.proj.weight"].to(BF16).float()
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(stored).copy()), expected)


@needs_openvino
def test_the_reference_is_the_float_model() -> None:
    inputs = example_inputs(batch=3)
    with OpenVINORunner(exported_reference(BF16), threads=1) as runner:
        assert snr_db(tiny_dit()(*inputs), runner(fed(*inputs))) > 38  # 2⁻⁹ at every operation


def test_the_grid_of_int8_is_bfloat16s_too() -> None:
    """1/127 rounds to 2⁻⁷ (1 + 2⁻⁷), 6e-5 less: the largest value still has the code 127."""
    scale = float(unit_scale(BF16))
    assert scale == 2.0**-7 * (1 + 2.0**-7)
    assert round(1 / scale) == MAX_CODE
    ranges = token_ranges(torch.zeros(2, 3, dtype=BF16))
    assert ranges.dtype == BF16
    assert float(ranges.amax()) == RANGE_FLOOR


def test_values_beyond_a_half_fit() -> None:
    """What float16 refuses: bfloat16 has float32's range."""
    quantized = quantized_tiny_dit(tiny_dit())
    name = "blocks.0.mlp.fc1"
    weight = quantized.linears[name].weight
    huge = replace(
        quantized.linears[name], weight=replace(weight, row_scale=weight.row_scale * 1e8)
    )
    quantized = replace(quantized, linears={**quantized.linears, name: huge})
    folded = fold_smoothing(quantized, dtype=BF16)
    found = folded.linears[name].weight.row_scale.float()
    torch.testing.assert_close(found, huge.weight.row_scale, rtol=2.0**-8, atol=0.0)


def test_onnxruntime_has_no_kernels() -> None:
    """The reason of every refusal below; if this fails, they can go."""
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(str(exported(dtype=BF16, layout="int4")))


def test_which_runtime_takes_a_file(hide_openvino: Callable[[], None]) -> None:
    name = str(exported(dtype=BF16, layout="int4"))
    message = "is bf16, and onnxruntime has no bfloat16 kernels on CPUs; use --runtime openvino"
    with pytest.raises(RunnerError, match=message):
        open_runner(name, runtime="onnxruntime")
    if HAS_OPENVINO:
        assert isinstance(open_runner(name, threads=1).runner, OpenVINORunner)
    hide_openvino()
    with pytest.raises(RunnerError, match=message):
        open_runner(name)


@pytest.mark.parametrize("which", ["reference", "model"])
def test_compare_refuses_such_files_before_any_work(which: str) -> None:
    files = {"reference": exported_reference(), "model": exported()}
    files[which] = exported_reference(BF16) if which == "reference" else exported(dtype=BF16)
    advanced: list[str] = []
    with pytest.raises(VerificationError, match=r"is bf16, .* compare an engine of it") as caught:
        compare(CompareOptions(**files), on_progress=lambda stage, *_: advanced.append(stage))
    assert str(files[which]) in str(caught.value)
    assert advanced == []


def test_a_bf16_file_for_onnxruntime_is_refused() -> None:
    with pytest.raises(OnnxExportError, match=r"no bfloat16 kernels .* --target tensorrt"):
        ExportOptions(output=Path("out.onnx"), precision="bf16", target="onnxruntime")
    for target in ("portable", "tensorrt"):
        options = ExportOptions(output=Path("out.onnx"), precision="bf16", target=target)
        assert options.float_side == "bf16"


def run_export(checkpoint: Path, output: Path, *words: object) -> tuple[int, str]:
    """Run the command on the tiny model; return its exit code and what it printed, unwrapped."""
    quick = ["--steps", 2, "--samples", 1, "--method", "linear", "--precision", "bf16"]
    arguments = ["--model", checkpoint, *quick, *words, output]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join((result.stdout + result.stderr).replace("│", " ").split())


@needs_openvino
def test_the_command_proves_the_file_in_openvino(checkpoint: Path, tmp_path: Path) -> None:
    code, printed = run_export(checkpoint, tmp_path / "out.onnx", "--target", "tensorrt")
    assert code == 0, printed
    assert "(rounding alone: " in printed
    proof = json.loads((tmp_path / "out.json").read_text())["verification"]
    assert proof["runtime"].startswith("openvino")
    assert proof["matches_fake_quantized_forward"] is True
    assert proof["match"]["match_db"] > 30
    assert proof["kernels"] == {}
    assert read_form(tmp_path / "out.onnx").float_type == "bf16"


@needs_openvino
def test_a_mismatch_is_exit_code_1(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditas_export.evaluation.ties.MOST_EXCESS_DB", -500.0)
    code, printed = run_export(checkpoint, tmp_path / "out.onnx", "--quiet")
    assert code == 1
    assert "expected -500.0 at most; do not deploy it" in printed


def test_without_a_runtime_the_command_says_that_the_file_was_not_run(
    checkpoint: Path, tmp_path: Path, hide_openvino: Callable[[], None]
) -> None:
    hide_openvino()
    code, printed = run_export(checkpoint, tmp_path / "out.onnx")
    assert code == 0, printed
    for words in ("out.onnx was not run", "ditas-export[openvino]", "ditas-build", "ditas-compare"):
        assert words in printed
    proof = json.loads((tmp_path / "out.json").read_text())["verification"]
    for name in ("matches_fake_quantized_forward", "match", "single_step_snr_db",
                 "final_latents_snr_db", "final_latents_snr_db_mean", "kernels",
                 "runtime"):  # fmt: skip
        assert proof[name] is None, name
    assert proof["fake_quantized_single_step_snr_db"] > 10
    assert len(proof["fake_quantized_final_latents_snr_db"]) == len(proof["seeds"]) >= 2


def test_the_command_refuses_onnxruntimes_target(checkpoint: Path, tmp_path: Path) -> None:
    code, printed = run_export(checkpoint, tmp_path / "out.onnx", "--target", "onnxruntime")
    assert code == 2
    assert "onnxruntime has no bfloat16 kernels on CPUs" in printed
    assert list(tmp_path.iterdir()) == []
