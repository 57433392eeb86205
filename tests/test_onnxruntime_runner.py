"""ONNX Runtime: the kernels that really run, batches, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from quantized_fixture import (
    TINY,
    example_inputs,
    exported,
    exported_reference,
    fed,
    snr_db,
    tiny_folded,
)

from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.diffusion.runner import Runner
from ditas_export.errors import OnnxExportError, RunnerError
from ditas_export.families.registry import linear_names
from ditas_export.runtime.inputs import feed_of
from ditas_export.runtime.onnxruntime_runner import (
    BARE_SESSION,
    OnnxRuntimeRunner,
    matmul_kernels,
)
from ditas_export.runtime.openvino_runner import OpenVINORunner

LINEARS = list(linear_names(TINY))
FORMS = [
    (layout, ranges, rank)
    for layout in ("int4", "int8")
    for ranges in ("token", "static")
    for rank in (0, 4)
]


@pytest.fixture
def token_file() -> Path:
    return exported(layout="int4", ranges="token", rank=4)


def form_file(form: tuple[str, str, int]) -> Path:
    layout, ranges, rank = form
    return exported(layout=layout, ranges=ranges, rank=rank)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_every_block_linear_runs_the_integer_kernel(
    form: tuple[str, str, int],
) -> None:
    kernels = matmul_kernels(form_file(form))
    branches = ["MatMul", "right_MatMul"] if form[2] else ["MatMul"]
    found = {f"{name}/{part}": kernels[f"{name}/{part}"] for name in LINEARS for part in branches}
    assert set(found.values()) == {"MatMulIntegerToFloat"}, found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_a_fixed_batch_neither_fails_nor_leaves_the_integer_kernel(
    form: tuple[str, str, int], tmp_path: Path
) -> None:
    import onnx

    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("N", 2)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(form_file(form)), options, providers=["CPUExecutionProvider"]
    )
    feed = dict(
        zip(
            ("latents", "timesteps", "class_labels"),
            (tensor.numpy() for tensor in example_inputs(batch=2)),
            strict=True,
        )
    )
    with OnnxRuntimeRunner(form_file(form), threads=2) as runner:
        dynamic = runner(fed(*example_inputs(batch=2)))
    fixed = torch.from_numpy(session.run(None, feed)[0])
    # The same kernels but for the last linear's; a rounding tie may flip where sums differ.
    assert snr_db(dynamic, fixed) > 50
    optimized = onnx.load(str(tmp_path / "optimized.onnx")).graph
    kinds = [node.op_type for node in optimized.node]
    assert kinds.count("MatMulIntegerToFloat") == len(LINEARS) * (2 if form[2] else 1)


def test_plain_sessions_at_default_options_open_the_files() -> None:
    for form in FORMS:
        onnxruntime.InferenceSession(str(form_file(form)))


def test_an_image_does_not_depend_on_its_batch_mates(token_file: Path) -> None:
    inputs = example_inputs(batch=8)
    with OnnxRuntimeRunner(token_file, threads=2) as runner:
        together = runner(fed(*inputs))
        alone = torch.cat([runner(fed(*(part[i : i + 1] for part in inputs))) for i in range(8)])
    assert snr_db(together, alone) > 60


def test_the_runner_says_what_it_is(token_file: Path) -> None:
    runner: Runner = OnnxRuntimeRunner(token_file)
    with runner:
        assert runner.config == TINY
        assert onnxruntime.__version__ in runner.description
        assert "CPUExecutionProvider" in runner.description


def test_a_float_file_runs_float_kernels() -> None:
    kernels = matmul_kernels(exported_reference())
    assert {kernels[f"{name}/MatMul"] for name in LINEARS} == {"MatMul"}


def test_a_closed_runner_is_refused(token_file: Path) -> None:
    with OnnxRuntimeRunner(token_file) as runner:
        pass
    with pytest.raises(RunnerError, match="closed"):
        runner(fed(*example_inputs()))


def test_inputs_that_do_not_fit_are_named(token_file: Path) -> None:
    latents, timesteps, labels = example_inputs()
    with OnnxRuntimeRunner(token_file, threads=1) as runner:
        with pytest.raises(RunnerError, match=r"latents are \(2, 3, 8, 4\).*\(N, 3, 8, 8\)"):
            runner(fed(latents[..., :4], timesteps, labels))
        with pytest.raises(RunnerError, match=r"timesteps are \(1,\); with 2 latents"):
            runner(fed(latents, timesteps[:1], labels))
        with pytest.raises(RunnerError, match=r"labels run from 0 to 11.*knows 0 to 10"):
            runner(fed(latents, timesteps, torch.tensor([0, 11])))


def test_a_provider_that_is_not_there(token_file: Path) -> None:
    with pytest.raises(RunnerError, match=r"has no NoSuchProvider; it has .*CPU"):
        OnnxRuntimeRunner(token_file, providers=("NoSuchProvider",))


def test_a_file_that_onnxruntime_refuses(token_file: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(token_file))
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "NoSuchOp"
    path = tmp_path / "broken.onnx"
    onnx.save(model, str(path))
    with pytest.raises(RunnerError, match=f"onnxruntime {onnxruntime.__version__} refuses"):
        OnnxRuntimeRunner(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(OnnxExportError, match="no readable ONNX file"):
        OnnxRuntimeRunner(tmp_path / "absent.onnx")


def test_without_onnxruntime(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(RunnerError, match="pip install onnxruntime"):
        OnnxRuntimeRunner(token_file)


WEIGHT_ONLY: list[dict[str, Any]] = [
    {"adaln_bits": 8},
    {"adaln_bits": 4},
    {"activation_bits": 16, "block_size": 32},
    {"activation_bits": 16, "weight_bits": 8, "rank": 0, "layout": "int8"},
]


@pytest.mark.parametrize("settings", WEIGHT_ONLY, ids=str)
def test_weight_only_linears_read_floats_in_every_runner(settings: dict[str, Any]) -> None:
    """What is proved is what runs; a session that is told nothing rounds their inputs to 8 bits."""
    path = exported(**settings)
    of_model = {name: value for name, value in settings.items() if name != "layout"}
    inputs = example_inputs(batch=3)
    folded = tiny_folded(**of_model)
    own = fake_quantized_model(folded, ranges="token")(*inputs)
    expected = fake_quantized_model(folded, ranges="token", target="onnxruntime")(*inputs)
    with OnnxRuntimeRunner(path, threads=1) as runner:
        found = runner(fed(*inputs))
    with OnnxRuntimeRunner(path, threads=1, as_is=True) as runner:
        as_is = runner(fed(*inputs))
    with OnnxRuntimeRunner(path, threads=1, as_is=True, session_entries=BARE_SESSION) as runner:
        bare = runner(fed(*inputs))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    told_nothing = session.run(None, feed_of(runner.config, fed(*inputs)))[0]
    assert snr_db(expected, found) > 64  # a rounding tie of the block linears; 57 to 60 below
    assert snr_db(own, as_is) > 64
    assert snr_db(own, bare) < 62
    assert snr_db(bare, torch.from_numpy(told_nothing)) > 100  # threads sum in another order
    if importlib.util.find_spec("openvino"):
        with OpenVINORunner(path, threads=1) as runner:
            assert snr_db(expected, runner(fed(*inputs))) > 64
