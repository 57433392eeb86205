"""A model against the float model on a float trajectory: inputs, figures, diverging linears."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from polygraphy.backend.onnxrt import OnnxrtRunner
from quantized_fixture import (
    TINY,
    exported,
    exported_reference,
    fed,
    snr_db,
    tiny_dit,
    tiny_folded,
)

from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.diffusion.sampling import trajectory
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.engine.metadata import EngineMetadata, Gpu, metadata_path
from ditas_export.engine.options import BuildOptions
from ditas_export.errors import (
    DitasExportError,
    EngineError,
    OnnxExportError,
    OtherModelError,
    RunnerError,
    VerificationError,
)
from ditas_export.evaluation import compare as compare_module
from ditas_export.evaluation import polygraphy_runs
from ditas_export.evaluation.compare import Comparison, compare
from ditas_export.evaluation.inputs import StepInputs
from ditas_export.evaluation.inputs import trajectory_inputs as inputs_of_runner
from ditas_export.evaluation.linear_outputs import linear_outputs
from ditas_export.evaluation.metrics import Difference
from ditas_export.evaluation.options import CompareOptions
from ditas_export.evaluation.polygraphy_runs import Outputs, onnx_runner, opened
from ditas_export.families.registry import linear_names
from ditas_export.onnx_export.export import export_reference
from ditas_export.onnx_export.file_facts import IDENTITY_KEY
from ditas_export.onnx_export.form import FileForm
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.torch_runner import TorchRunner

LINEARS = list(linear_names(TINY))
BROKEN = "blocks.1.attn.proj"


def good() -> Path:
    """8-bit weights, no low-rank branch: every linear is within 30 dB of float."""
    return exported(weight_bits=8, layout="int8", rank=0)


def options(model: Path, **settings: Any) -> CompareOptions:
    chosen = {"reference": exported_reference(), "classes": "3,7", "steps": 3, **settings}
    return CompareOptions(model=model, **chosen)


def trajectory_inputs(chosen: CompareOptions) -> list[StepInputs]:
    with OnnxRuntimeRunner(chosen.reference) as runner:
        return list(inputs_of_runner(chosen, runner))


@pytest.fixture(scope="module")
def close() -> Comparison:
    return compare(options(good()))


@pytest.fixture(scope="module")
def broken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good`, but one linear in the middle gives half as much again."""
    model = onnx.load(str(good()))
    for tensor in model.graph.initializer:
        if tensor.name == f"{BROKEN}/row_scale":
            scaled = numpy_helper.to_array(tensor) * np.float32(1.5)
            tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
    path = tmp_path_factory.mktemp("broken") / "broken.onnx"
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def far(broken_file: Path) -> Comparison:
    return compare(options(broken_file))


def test_figures_of_a_difference() -> None:
    generator = np.random.default_rng(0)
    wanted = generator.standard_normal((5, 7)).astype(np.float32)
    found = (wanted + 0.1 * generator.standard_normal((5, 7))).astype(np.float32)
    error = found.astype(np.float64) - wanted
    halves = [
        Difference.between(torch.from_numpy(wanted[rows]), torch.from_numpy(found[rows]))
        for rows in (slice(0, 2), slice(2, 5))
    ]
    joined = halves[0] + halves[1]
    ratio = (wanted.astype(np.float64) ** 2).sum() / (error**2).sum()
    # Sums in another order: float64 rounding.
    assert joined.snr_db == pytest.approx(10 * np.log10(ratio), rel=1e-12)
    assert joined.max_abs == np.abs(error).max()
    assert joined.mean_abs == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert joined.relative == pytest.approx(np.abs(error).sum() / np.abs(wanted).sum(), rel=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_no_number_is_no_match(value: float) -> None:
    fine = Difference.between(torch.ones(3), torch.ones(3))
    assert fine.snr_db == math.inf
    odd = Difference.between(torch.ones(3), torch.tensor([1.0, value, 1.0]))
    for joined in (odd, fine + odd, odd + fine):
        assert joined.snr_db == -math.inf
        assert not math.isfinite(joined.max_abs)


def test_inputs_are_those_of_the_float_trajectory_both_halves() -> None:
    inputs = trajectory_inputs(options(good(), seed=4))
    with TorchRunner(tiny_dit()) as runner:
        steps = list(trajectory(runner, classes=(3, 7), steps=3, cfg_scale=1.5, seed=4))
    assert [entry.timestep for entry in inputs] == [step.timestep for step in steps]
    for entry, step in zip(inputs, steps, strict=True):
        assert entry.feed["class_labels"].tolist() == [3, 7, 10, 10]
        assert entry.feed["timesteps"].tolist() == [step.timestep] * 4
        halves = torch.from_numpy(entry.feed["latents"]).chunk(2)
        assert torch.equal(*halves)
        # PyTorch and ONNX Runtime round differently; three steps multiply that.
        torch.testing.assert_close(halves[0], step.latents, rtol=1e-3, atol=1e-3)


def test_without_guidance_there_is_one_half() -> None:
    for entry in trajectory_inputs(options(good(), cfg_scale=1.0)):
        assert entry.feed["class_labels"].tolist() == [3, 7]


def test_outputs_are_compared_as_the_runners_give_them(close: Comparison) -> None:
    inputs = trajectory_inputs(options(good()))
    with OnnxRuntimeRunner(good()) as quantized, TorchRunner(tiny_dit()) as floating:
        for entry, step in zip(inputs, close.steps, strict=True):
            arguments = [torch.from_numpy(value) for value in entry.feed.values()]
            expected = snr_db(floating(fed(*arguments)), quantized(fed(*arguments)))
            assert step.outputs["model_output"].snr_db == pytest.approx(expected, abs=0.1)
    assert close.total_db > 40


def test_a_file_against_itself_is_equal() -> None:
    same = compare(options(exported_reference(), threshold_db=100))
    assert same.total_db == math.inf
    assert same.matches is True
    assert all(found.max_abs == 0 for found in same.linears.values())
    assert same.to_dict()["total_snr_db"] is None
    json.dumps(same.to_dict(), allow_nan=False)


def test_linears_of_a_good_file_do_not_diverge(close: Comparison) -> None:
    """V of qkv carries proj's smoothing: were it compared, qkv would be at 15 dB or below."""
    assert list(close.linears) == LINEARS
    assert all(found.snr_db > 30 for found in close.linears.values())
    assert close.first_diverging(close.linears) is None
    assert close.matches is None


def test_the_first_diverging_linear_is_the_broken_one(far: Comparison) -> None:
    assert far.first_diverging(far.linears) == BROKEN
    assert [far.first_diverging(step.linears) for step in far.steps] == [BROKEN] * 3
    # 1.5 times the output: 6 dB. Those before it do not notice.
    assert far.linears[BROKEN].snr_db == pytest.approx(6.0, abs=0.5)
    before = LINEARS[: LINEARS.index(BROKEN)]
    assert all(far.linears[name].snr_db > 30 for name in before)
    assert far.worst_linears()[0][0] == BROKEN
    assert far.to_dict()["first_diverging_linear"] == BROKEN


def forms() -> list[tuple[Path, DiT]]:
    """Files, and the PyTorch models that they compute; ONNX Runtime's form is cut into parts."""
    form: dict[str, Any] = {"ranges": "token", "target": "onnxruntime"}
    return [
        (exported_reference(), tiny_dit()),
        (exported(rank=4, **form), fake_quantized_model(tiny_folded(rank=4), **form)),
    ]


@pytest.mark.parametrize("index", [0, 1], ids=["float", "onnxruntime"])
def test_debug_outputs_are_what_the_linears_give(index: int) -> None:
    """Against forward hooks of the PyTorch model."""
    path, model = forms()[index]
    (entry, *_) = trajectory_inputs(options(good()))
    hooked: dict[str, torch.Tensor] = {}
    for name in LINEARS:
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: hooked.update({name: output})
        )
    model(*[torch.from_numpy(value) for value in entry.feed.values()])
    names = linear_outputs(path, TINY)
    with opened(onnx_runner(path, [value for parts in names.values() for value in parts])) as run:
        given = run(entry.feed)
    for name, parts in names.items():
        assert len(parts) == (1 if not index else {"qkv": 3, "fc1": 4}.get(name[-3:], 1))
        found = torch.cat([torch.from_numpy(given[part]) for part in parts], dim=-1)
        # float32 sums in another order; codes that flip at rounding ties, and what follows of them
        assert snr_db(hooked[name], found) > (110 if not index else 40)


@pytest.mark.parametrize("index", [0, 1], ids=["float", "onnxruntime"])
def test_debug_outputs_leave_the_models_own_as_it_is(index: int) -> None:
    """Not by one bit: so one session serves for both."""
    path, _ = forms()[index]
    (entry, *_) = trajectory_inputs(options(good()))
    values = [value for parts in linear_outputs(path, TINY).values() for value in parts]
    given = []
    for asked in ([], values):
        with opened(onnx_runner(path, asked)) as run:
            given.append(run(entry.feed)["model_output"])
    assert np.array_equal(*given)


def test_float16_files_are_compared_too() -> None:
    half = compare(options(exported_reference(torch.float16), steps=2))
    assert half.total_db > 40
    assert all(found.snr_db > 40 for found in half.linears.values())


def test_tensors_in_a_file_of_their_own(tmp_path: Path, close: Comparison) -> None:
    path = tmp_path / "big.onnx"
    onnx.save(
        onnx.load(str(good())),
        str(path),
        save_as_external_data=True,
        location="big.onnx.data",
        size_threshold=1024,
    )
    assert compare(options(path)).to_dict()["linears"] == close.to_dict()["linears"]


@pytest.mark.parametrize("linears", [True, False])
def test_both_models_are_opened_once_and_one_step_is_held(
    monkeypatch: pytest.MonkeyPatch, linears: bool, far: Comparison
) -> None:
    """Whatever the number of steps; threads of the session that waits do not spin."""
    sessions: list[str] = []
    held: list[weakref.ref[Any]] = []

    class Watched(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: Any, asked: Any, **rest: Any) -> None:
            sessions.append(asked.get_session_config_entry("session.intra_op.allow_spinning"))
            super().__init__(model, asked, **rest)

    infer = OnnxrtRunner.infer

    def watched(self: Any, *arguments: Any, **rest: Any) -> Outputs:
        alive = [each for each in held if each() is not None]
        assert len(alive) <= 1, "two models' outputs of one step at most"
        outputs: Outputs = infer(self, *arguments, **rest)
        held.append(weakref.ref(outputs["model_output"]))
        return outputs

    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    monkeypatch.setattr(OnnxrtRunner, "infer", watched)
    found = compare(dataclasses.replace(far.options, linears=linears))
    assert found.outputs == far.outputs
    assert found.linears == (far.linears if linears else {})
    assert sessions == ["0", "0"]
    assert len(held) == 2 * 3


def test_a_runtimes_own_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no room\nand a long story")

    monkeypatch.setattr(OnnxrtRunner, "infer", fail)
    with pytest.raises(RunnerError, match=r"^[^\n]*: no room[^\n]*$"):
        compare(options(good(), steps=2))


def test_links_to_data_elsewhere_are_followed(tmp_path: Path, close: Comparison) -> None:
    """As in a hub's snapshot: both files are links, and ONNX Runtime itself takes no such data."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    model = onnx.load(str(good()))
    data = {"save_as_external_data": True, "location": "big.onnx.data", "size_threshold": 1024}
    onnx.save(model, str(blobs / "big.onnx"), **data)
    for number, name in enumerate(("big.onnx", "big.onnx.data")):
        (blobs / name).rename(blobs / f"{number}")
        (snapshot / name).symlink_to(f"../blobs/{number}")
    found = compare(options(snapshot / "big.onnx"))
    assert found.to_dict()["linears"] == close.to_dict()["linears"]


def test_the_linears_can_be_left_out() -> None:
    comparison = compare(options(good(), linears=False, steps=2))
    assert comparison.linears == {}
    assert comparison.first_diverging(comparison.linears) is None


def test_files_of_two_models(tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    export_reference(tiny_dit(replace(TINY, num_classes=4)), other)
    with pytest.raises(OtherModelError) as caught:
        compare(options(other))
    message = str(caught.value)
    assert message.startswith(f"{other}, compared with {exported_reference()}, was made from")
    assert "num_classes 4, now 10; tensors_sha256 " in message
    assert message.endswith("Write the reference of the same model with ditas-export --reference")


def test_files_of_the_same_shape_and_other_weights(tmp_path: Path) -> None:
    """Where they record them; the configurations alone are the same."""
    other = tmp_path / "other.onnx"
    export_reference(tiny_dit(seed=1), other)
    with pytest.raises(OtherModelError, match=r"another model: tensors_sha256 \w+…, now \w+…\. W"):
        compare(options(other))
    without_identity(other)
    assert compare(options(other, steps=2, linears=False)).total_db < 20


def test_files_of_two_shapes_of_an_earlier_version(tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    export_reference(tiny_dit(replace(TINY, num_classes=4)), other)
    without_identity(other)
    with pytest.raises(
        VerificationError, match=r"another model than .*: num_classes 4, now 10\. W"
    ):
        compare(options(other))


def without_identity(path: Path) -> None:
    """Take the record of the weights out of a file, as files of earlier versions have none."""
    model = onnx.load(str(path))
    kept = [entry for entry in model.metadata_props if entry.key != IDENTITY_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, str(path))


def test_an_engine_of_another_shape(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, product="rtx", config=replace(TINY, num_classes=4))
    with pytest.raises(
        VerificationError, match=r"another model than .*: num_classes 4, now 10\. W"
    ):
        compare(options(plan))


def test_suffixes_count_in_any_case(tmp_path: Path) -> None:
    """What is no plan by its name is taken for ONNX, and read as such."""
    for name in ("OUT.PLAN", "out.Engine"):
        with pytest.raises(EngineError, match="does not describe an engine"):
            compare(options(tmp_path / name))


def test_files_without_named_linears(tmp_path: Path) -> None:
    model = onnx.load(str(good()))
    for node in model.graph.node:
        node.name = ""
    path = tmp_path / "nameless.onnx"
    onnx.save(model, str(path))
    with pytest.raises(OnnxExportError, match=r"no nodes named blocks\.0\.attn\.qkv/.*--no-linear"):
        compare(options(path))


@pytest.mark.parametrize("name", ["linear_db", "threshold_db"])
def test_thresholds_are_finite(name: str) -> None:
    with pytest.raises(VerificationError, match="expected a finite number"):
        options(good(), **{name: math.nan})


def write_plan(
    folder: Path, *, product: str, content: bytes = b"plan", config: DiTConfig = TINY
) -> Path:
    """Write something with the metadata of an engine of the tiny model."""
    plan = folder / "out.plan"
    plan.write_bytes(content)
    EngineMetadata(
        product=product,
        version=_installed_rtx(),
        plan_sha256=hashlib.sha256(content).hexdigest(),
        plan_bytes=len(content),
        onnx_name="out.onnx",
        onnx_sha256="",
        model=config,
        form=FileForm(float_type="fp32"),
        options=BuildOptions(),
        gpu=None,
        layers=None,
    ).save(metadata_path(plan))
    return plan


def _installed_rtx() -> str:
    return str(pytest.importorskip("tensorrt_rtx", reason="extra [rtx]").__version__)


def test_a_plan_is_compared_by_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, close: Comparison
) -> None:
    """A stand-in runs the quantized file in place of the engine."""
    plan = write_plan(tmp_path, product="rtx")
    monkeypatch.setattr(
        compare_module, "plan_runner", lambda _: polygraphy_runs.onnx_runner(good())
    )
    comparison = compare(options(plan))
    assert comparison.outputs == close.outputs
    assert comparison.linears == {}


def test_a_plan_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygraphy_runs, "current_gpu", lambda: None)
    with pytest.raises(RunnerError, match=r"runs on an NVIDIA GPU, and PyTorch finds none here"):
        compare(options(write_plan(tmp_path, product="rtx")))


def test_a_plan_needs_its_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(tmp_path, product="tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EngineError, match="TensorRT is not installed; run: pip install"):
        compare(options(plan))


def test_a_plan_without_metadata(tmp_path: Path) -> None:
    (tmp_path / "out.plan").write_bytes(b"plan")
    with pytest.raises(EngineError, match="does not describe an engine"):
        compare(options(tmp_path / "out.plan"))


def test_polygraphys_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `TrtRunner` of TensorRT for RTX, on a plan that is none."""
    monkeypatch.setattr(
        polygraphy_runs, "current_gpu", lambda: Gpu(name="some GPU", compute_capability="8.9")
    )
    with pytest.raises(RunnerError, match=r"^Polygraphy: [^\n]*deserialize[^\n]*$"):
        compare(options(write_plan(tmp_path, product="rtx"), steps=2))


def broken(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Write the good file with a change that its metadata do not tell."""
    model = onnx.load(str(good()))
    change(model)
    onnx.save(model, str(path))
    return path


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "NoSuchOperator"


def renamed_input(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["images" if name == "latents" else name for name in node.input]
    (value,) = [value for value in model.graph.input if value.name == "latents"]
    value.name = "images"


def other_rows(model: onnx.ModelProto) -> None:
    """Takes one row, whatever is fed."""
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1


def renamed_output(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if "model_output" in node.output)
    node.output[0] = model.graph.output[0].name = "eps"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (unknown_operator, RunnerError, "onnxruntime .* refuses .*NoSuchOperator"),
        (renamed_input, OnnxExportError, "inputs are images, timesteps, class_labels, expected"),
        (other_rows, RunnerError, "Polygraphy: .* incompatible shape"),
        (renamed_output, OnnxExportError, "outputs are eps, expected model_output"),
    ],
)
def test_a_file_that_onnxruntime_does_not_take_is_one_line(
    tmp_path: Path,
    change: Callable[[onnx.ModelProto], None],
    error: type[DitasExportError],
    message: str,
) -> None:
    path = broken(tmp_path / "broken.onnx", change)
    with pytest.raises(error, match=message) as caught:
        compare(options(path, steps=2, linears=False))
    assert "\n" not in str(caught.value)


def test_the_runner_is_polygraphys() -> None:
    assert isinstance(polygraphy_runs.onnx_runner(good()), OnnxrtRunner)
