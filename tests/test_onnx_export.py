"""Whole files: numbers, names, interface, determinism, external data, nothing half-written."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from quantized_fixture import (
    TINY,
    example_inputs,
    exported,
    exported_reference,
    fed,
    quantized_tiny_dit,
    snr_db,
    tiny_dit,
    tiny_folded,
)

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.errors import ArtifactError, OnnxExportError
from ditas_export.onnx_export import export as export_module
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.external_data import external_files
from ditas_export.onnx_export.file_facts import read_config, read_form
from ditas_export.onnx_export.form import FileForm
from ditas_export.onnx_export.interface import OUTPUT_NAME
from ditas_export.onnx_export.manifest import bytes_by_part
from ditas_export.onnx_export.onnxruntime_form import to_onnxruntime_form
from ditas_export.onnx_export.skeleton import export_skeleton
from ditas_export.runtime.onnxruntime_runner import (
    ACCURATE_WEIGHT_ONLY,
    OnnxRuntimeRunner,
    matmul_kernels,
)

MODEL = tiny_dit()
FOLDED = tiny_folded()


@pytest.fixture
def int4_file() -> Path:
    return exported(layout="int4", ranges="token", rank=4)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_file_computes_the_fake_quantized_forward(int4_file: Path, batch: int) -> None:
    inputs = example_inputs(batch=batch)
    with OnnxRuntimeRunner(int4_file, threads=2) as runner:
        out = runner(fed(*inputs))
    reference = fake_quantized_model(FOLDED, ranges="token")(*inputs)
    assert out.shape == (batch, TINY.out_channels, TINY.input_size, TINY.input_size)
    # A code that flips at a rounding tie shows as some 60 dB; anything wrong as less than 30.
    assert snr_db(reference, out) > 50


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("rank", [0, 4])
def test_bias_and_gelu_stay_apart_for_onnxruntime(ranges: str, rank: int, tmp_path: Path) -> None:
    """Fused they are slower. GELU itself is one operator."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # a file for one machine only, it warns
    path = exported(layout="int8", ranges=ranges, rank=rank, target="onnxruntime")
    onnxruntime.InferenceSession(str(path), options)
    graph = onnx.load(options.optimized_model_filepath).graph
    kinds = [node.op_type for node in graph.node]
    assert {"FastGelu", "BiasGelu"}.isdisjoint(kinds)
    # With a branch, fc1 and GELU are made in parts of the hidden size.
    assert kinds.count("Gelu") == TINY.depth * (TINY.mlp_hidden_size // TINY.hidden_size) ** bool(
        rank
    )


def test_static_ranges_in_half_precision() -> None:
    folded = tiny_folded(dtype=torch.float16)
    path = exported(dtype=torch.float16, layout="int4", ranges="static", rank=4)
    latents, timesteps, labels = example_inputs()
    with OnnxRuntimeRunner(path, threads=2) as runner:
        out = runner(fed(latents, timesteps, labels))
    module = fake_quantized_model(folded, ranges="static")
    reference = module(latents.half(), timesteps, labels)
    assert out.dtype == torch.float32
    # Every float operation of both sides rounds to 2⁻¹¹, and so do the codes' inputs.
    assert snr_db(reference, out) > 40


def products_of(linear: str, target: str) -> list[str]:
    """The products with a linear's weight: with qkv's and fc1's, for each part of the output."""
    parts = {"attn.qkv": 3, "mlp.fc1": 4}.get(linear.partition(".")[2].partition(".")[2], 1)
    if target != "onnxruntime" or parts == 1:
        return [f"{linear}/MatMul"]
    return [f"{linear}/output_{index}/MatMul" for index in range(parts)]


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_forms_for_a_target_give_the_same_numbers(target: str, ranges: str) -> None:
    inputs = example_inputs()
    reference = fake_quantized_model(FOLDED, ranges=ranges, target=target)(*inputs)
    outputs = []
    # Joined inner products are INT8 on either side of their kernel.
    inner = "QLinearMatMul" if target == "onnxruntime" else "MatMulIntegerToFloat"
    for layout in ("int4", "int8"):
        path = exported(layout=layout, ranges=ranges, rank=4, target=target)
        assert read_form(path).target == target
        kernels = matmul_kernels(path)
        for name in FOLDED.linears:
            for product in products_of(name, target):
                assert kernels.pop(product) == "MatMulIntegerToFloat"
            assert kernels[f"{name}/right_MatMul"] == inner
            assert (f"{name}/left_MatMul" in kernels) == (target == "tensorrt")
            assert f"{name}/MatMul" not in kernels  # nothing is left of it
        operators = [node.op_type for node in onnx.load(str(path)).graph.node]
        assert operators.count("Attention") == (TINY.depth if target == "onnxruntime" else 0)
        assert operators.count("Softmax") == (0 if target == "onnxruntime" else TINY.depth)
        with OnnxRuntimeRunner(path, threads=2) as runner:
            outputs.append(runner(fed(*inputs)))
    assert torch.equal(*outputs)
    assert snr_db(reference, outputs[0]) > 50  # but for ties, as above


@pytest.mark.parametrize(("mlp_ratio", "products"), [(2.5, 1), (1.0, 1), (2.0, 2)])
def test_fc1_is_cut_where_its_width_is_a_multiple_of_the_hidden_size(
    mlp_ratio: float, products: int, tmp_path: Path
) -> None:
    config = replace(TINY, mlp_ratio=mlp_ratio)
    folded = fold_smoothing(quantized_tiny_dit(tiny_dit(config)))
    path = tmp_path / "cut.onnx"
    export_onnx(folded, path, target="onnxruntime")
    kernels = matmul_kernels(path)
    fc1 = [name for name in kernels if name.startswith("blocks.1.mlp.fc1/")]
    assert len([name for name in fc1 if name.endswith("/MatMul")]) == products
    inputs = example_inputs()
    with OnnxRuntimeRunner(path, threads=2) as runner:
        out = runner(fed(*inputs))
    fake = fake_quantized_model(folded, ranges="token", target="onnxruntime")
    assert snr_db(fake(*inputs), out) > 50  # but for ties, as above


def test_an_activation_of_several_operators_is_refused() -> None:
    """As a PyTorch might export it that no one has tested."""
    skeleton = export_skeleton(TINY, FOLDED.float_parameters, dtype=torch.float32, folded=True)
    gelu = next(node for node in skeleton.graph if node.name == "blocks.1.mlp.act/Gelu")
    more = ir.Node("", "Identity", gelu.outputs)
    gelu.outputs[0].replace_all_uses_with(more.outputs[0])
    more.replace_input_with(0, gelu.outputs[0])
    skeleton.graph.insert_after(gelu, more)
    with pytest.raises(OnnxExportError, match=r"blocks\.1\.mlp\.fc1.*; export --target portable"):
        to_onnxruntime_form(skeleton, TINY, in_parts=True)


@pytest.mark.parametrize("adaln_bits", [8, 4])
def test_integer_modulation(adaln_bits: int) -> None:
    path = exported(adaln_bits=adaln_bits, rank=4)
    inputs = example_inputs()
    reference = fake_quantized_model(tiny_folded(adaln_bits=adaln_bits), ranges="token")
    with OnnxRuntimeRunner(path, threads=2, session_entries=ACCURATE_WEIGHT_ONLY) as runner:
        accurate = runner(fed(*inputs))
    with OnnxRuntimeRunner(path, threads=2) as runner:
        by_default = runner(fed(*inputs))
    assert snr_db(reference(*inputs), accurate) > 50  # but for ties, as above
    # By default the modulation's inputs are 8-bit: its error passes through every block.
    assert snr_db(reference(*inputs), by_default) > 30


@pytest.mark.parametrize(
    ("dtype", "adaln_bits"),
    [
        (torch.float32, 8),
        (torch.float16, 4),
        pytest.param(torch.float32, 4, marks=pytest.mark.slow),
        pytest.param(torch.float16, 8, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 4, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 8, marks=pytest.mark.slow),
    ],
)
def test_a_small_artefact_exports_to_the_bytes_of_a_full_one(
    tmp_path: Path, dtype: torch.dtype, adaln_bits: int
) -> None:
    full, small = tmp_path / "full", tmp_path / "small"
    quantized = quantized_tiny_dit(tiny_dit())
    quantized.save(full)
    quantize_adaln(quantized, adaln_bits).save(small)
    for artefact in (full, small):
        loaded = quantize_adaln(QuantizedModel.load(artefact), adaln_bits)
        export_onnx(fold_smoothing(loaded, dtype=dtype), artefact.with_suffix(".onnx"))
    assert full.with_suffix(".onnx").read_bytes() == small.with_suffix(".onnx").read_bytes()
    assert read_form(small.with_suffix(".onnx")).adaln_bits == adaln_bits


def test_weight_only_linears() -> None:
    settings = {"activation_bits": 16, "block_size": 32}
    folded, path = tiny_folded(**settings), exported(**settings)
    inputs = example_inputs()
    reference = fake_quantized_model(folded, ranges="token")(*inputs)
    with OnnxRuntimeRunner(path, threads=2, session_entries=ACCURATE_WEIGHT_ONLY) as runner:
        assert snr_db(reference, runner(fed(*inputs))) > 70
    with OnnxRuntimeRunner(path, threads=2) as runner:
        assert snr_db(reference, runner(fed(*inputs))) > 30
    assert read_form(path).ranges is None


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 100), (torch.float16, 50)])
def test_the_reference_is_the_float_model(dtype: torch.dtype, bound: float) -> None:
    path = exported_reference(dtype)
    inputs = example_inputs(batch=3)
    with OnnxRuntimeRunner(path, threads=2) as runner:
        assert snr_db(MODEL(*inputs), runner(fed(*inputs))) > bound
    assert read_form(path) == FileForm(float_type="fp32" if bound == 100 else "fp16")


def test_the_interface_and_the_description(int4_file: Path) -> None:
    model = onnx.load(str(int4_file))
    assert [value.name for value in model.graph.input] == ["latents", "timesteps", "class_labels"]
    assert [value.name for value in model.graph.output] == [OUTPUT_NAME]
    assert read_config(int4_file) == TINY
    assert read_form(int4_file) == FileForm(
        weight_bits=4,
        activation_bits=8,
        adaln_bits=16,
        layout="int4",
        ranges="token",
        activation_codes="int8",
        float_type="fp32",
        target="portable",
    )


FORM = {"layout": "int4", "ranges": "token"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (FORM | {"rank": 4, "target": "onnxruntime"}, "uint8"),
        (FORM | {"rank": 0, "target": "onnxruntime"}, "int8"),
        (FORM | {"rank": 4, "target": "onnxruntime", "dtype": torch.float16}, "int8"),
        (FORM | {"rank": 4, "target": "tensorrt"}, "int8"),
        (FORM | {"rank": 4}, "int8"),
        ({"activation_bits": 16, "block_size": 32}, None),
    ],
)
def test_the_description_says_what_the_activations_are(
    settings: dict[str, Any], expected: str | None
) -> None:
    """And it is what the quantizers' zero points are."""
    path = exported(**settings)
    assert read_form(path).activation_codes == expected
    zeros = {
        value.dtype.name.lower()
        for name, value in ir.load(path).graph.initializers.items()
        if name.endswith("input_zero_point") and value.dtype is not None
    }
    assert zeros == ({expected} if expected else set())


def test_names_follow_the_modules(int4_file: Path) -> None:
    model = onnx.load(str(int4_file))
    modules = {name for name, _ in MODEL.named_modules()} | {"pos_embed"}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    for name in (*names, *(tensor.name for tensor in model.graph.initializer)):
        path = name.partition("/")[0]
        assert path in modules or path.rpartition(".")[0] in modules or "/" not in name, name


def test_no_float_weight_of_a_quantized_linear_is_stored(int4_file: Path) -> None:
    model = ir.load(int4_file)
    sizes = bytes_by_part(model, TINY)
    codes = sum(linear.weight.codes.numel() for linear in FOLDED.linears.values())
    assert sizes["codes"] == codes // 2
    floats = sum(tensor.numel() for tensor in FOLDED.float_parameters.values())
    biases = sum(linear.bias.numel() for linear in FOLDED.linears.values())
    left = sum(4 * linear.weight.codes.shape[0] for linear in FOLDED.linears.values())
    rest = sum(sizes.values()) - sizes["codes"]
    # What is left over: scales, the INT8 factors, and the graph's small constants.
    assert rest < 4 * (floats + biases + left) + 40_000


def test_the_same_model_gives_the_same_bytes(int4_file: Path, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; import sys\n"
        "from quantized_fixture import tiny_folded\n"
        "from ditas_export.onnx_export.export import export_onnx\n"
        "export_onnx(tiny_folded(), Path(sys.argv[1]))\n"
    )
    path = tmp_path / "again.onnx"
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", script, str(path)],
        check=True,
        env={"PYTHONPATH": f"{here.parent}:{here}", "PYTHONHASHSEED": "7"},
    )
    assert path.read_bytes() == int4_file.read_bytes()


def test_big_models_keep_their_tensors_beside_them(
    int4_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "LARGEST_INLINE_BYTES", 100_000)
    path = tmp_path / "big.onnx"
    export_onnx(FOLDED, path)
    (data,) = external_files(path)
    assert re.fullmatch(r"big\.onnx\.[0-9a-f]{16}\.data", data.name)
    assert set(tmp_path.iterdir()) == {path, data}
    assert path.stat().st_size < int4_file.stat().st_size / 2
    outputs = []
    for file in (path, int4_file):
        with OnnxRuntimeRunner(file, threads=2) as runner:
            outputs.append(runner(fed(*example_inputs())))
    assert torch.equal(*outputs)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: ir.Model) -> None:
        raise OnnxExportError("broken rule")

    monkeypatch.setattr(export_module, "check_contract", refuse)
    with pytest.raises(OnnxExportError, match="broken rule"):
        export_onnx(FOLDED, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_an_invalid_graph_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(graph: ir.Graph) -> None:
        next(node for node in graph if node.op_type == "Softmax").op_type = "NoSuchOperator"

    monkeypatch.setattr(export_module, "_order_initializers", damage)
    with pytest.raises(OnnxExportError, match="no valid ONNX"):
        export_onnx(FOLDED, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_unwritable_targets(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a folder"):
        export_reference(MODEL, tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        export_reference(MODEL, tmp_path / "no" / "out.onnx")


def test_other_float_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxExportError, match=r"fp32, fp16 or bf16, not torch\.float64"):
        export_reference(tiny_dit().double(), tmp_path / "out.onnx")


def test_files_of_another_origin_have_no_description(tmp_path: Path) -> None:
    path = tmp_path / "plain.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(path))
    with pytest.raises(OnnxExportError, match=r"no metadata entry ditas_export\.config"):
        read_config(path)
    with pytest.raises(OnnxExportError, match=r"no metadata entry ditas_export\.form"):
        read_form(path)
    with pytest.raises(OnnxExportError, match="no readable ONNX file"):
        read_config(tmp_path / "absent.onnx")


def test_polygraphy_finds_no_fault(int4_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "lint.json"
    command = ["check", "lint", str(int4_file), "-o", str(report), "--providers", "cpu"]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("polygraphy")), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert '"exception"' not in report.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_causal": True}, "causal order"),
        ({"is_causal": True, "dropout_p": 0.5}, "dropout and causal order"),
    ],
)
def test_attention_that_would_be_left_out_is_refused(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: attend(q, k, v, **arguments),
    )
    with pytest.raises(Exception, match="convert") as caught:
        export_skeleton(TINY, FOLDED.float_parameters, dtype=torch.float32, folded=True)
    causes, error = [], caught.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any(f"attention has {message}" in cause for cause in causes)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": 2.0},
        {"attn_mask": torch.linspace(-9, 0, TINY.num_tokens**2).reshape(TINY.num_tokens, -1)},
        {"attn_mask": torch.eye(TINY.num_tokens).bool()},
    ],
    ids=["scale", "bias", "mask"],
)
def test_scale_and_mask_of_attention_are_exported(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    model, path = tiny_dit(), tmp_path / "scaled.onnx"
    inputs = example_inputs(TINY, batch=2)
    plain = model(*inputs)
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: attend(q, k, v, **arguments),
    )
    export_reference(model, path)
    expected = model(*inputs)
    assert snr_db(plain, expected) < 60
    with OnnxRuntimeRunner(path) as runner:
        assert snr_db(expected, runner(fed(*inputs))) > 100  # float32
