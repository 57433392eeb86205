"""ONNX Runtime: the kernels that really run, batches, refusals."""

from __future__ import annotations

import importlib
from pathlib import Path

import onnxruntime
import pytest
import torch
from quantized_fixture import TINY, example_inputs, exported, exported_reference, snr_db

from ditas_export.diffusion.runner import Runner
from ditas_export.dit.sites import linear_sites
from ditas_export.errors import OnnxExportError, RunnerError
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner, matmul_kernels

LINEARS = [site.name for site in linear_sites(TINY.depth)]
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
        dynamic = runner(*example_inputs(batch=2))
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
        together = runner(*inputs)
        alone = torch.cat([runner(*(part[i : i + 1] for part in inputs)) for i in range(8)])
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
        runner(*example_inputs())


def test_inputs_that_do_not_fit_are_named(token_file: Path) -> None:
    latents, timesteps, labels = example_inputs()
    with OnnxRuntimeRunner(token_file, threads=1) as runner:
        with pytest.raises(RunnerError, match=r"latents are \(2, 3, 8, 4\).*\(N, 3, 8, 8\)"):
            runner(latents[..., :4], timesteps, labels)
        with pytest.raises(RunnerError, match=r"timesteps are \(1,\); with 2 latents"):
            runner(latents, timesteps[:1], labels)
        with pytest.raises(RunnerError, match=r"labels run from 0 to 11.*knows 0 to 10"):
            runner(latents, timesteps, torch.tensor([0, 11]))


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
