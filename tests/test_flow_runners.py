"""Where a flow's time is a float and its steps are Euler's: runners, files, states, jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from quantized_fixture import TINY, exported, exported_reference, fed, quantized_tiny_dit, tiny_dit
from tensorrt_fixture import made_plan, stand_ins
from torch import Tensor
from typer.testing import CliRunner

from ditas_export.calibration.calibration_settings import CalibrationSettings
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.states import CalibrationStates, collect_states, walk_states
from ditas_export.cli.compare import app as compare_app
from ditas_export.cli.sample import app
from ditas_export.diffusion.options import FlowSampler
from ditas_export.diffusion.sampling import sample, trajectory
from ditas_export.dit.model import DiT
from ditas_export.errors import ArtifactError, OnnxExportError, RunnerError
from ditas_export.evaluation.held_out import VerificationSettings, sample_held_out
from ditas_export.evaluation.inputs import trajectory_inputs
from ditas_export.evaluation.options import CompareOptions
from ditas_export.families.identity import identity_of
from ditas_export.generation import job
from ditas_export.generation.sampler import Sampler, SamplingSettings
from ditas_export.kept_parts import KeptParts
from ditas_export.onnx_export.contract import check_contract
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.file_facts import CONFIG_KEY
from ditas_export.onnx_export.interface import why_unlike
from ditas_export.process import FlowProcess
from ditas_export.runtime.diffusers_adapter import OnnxDiTTransformer2DModel
from ditas_export.runtime.inputs import feed_of
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.open_runner import OpenedModel
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.tensorrt_runner import TensorRTRunner
from ditas_export.runtime.torch_runner import TorchRunner

SIT = replace(TINY, learn_sigma=False, process=FlowProcess())
REPA = replace(SIT, process=FlowProcess(time_ends_at="noise", velocity_towards="noise"))
LATENTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES, LABELS = torch.tensor([0.25, 1.0]), torch.tensor([3, 10])


@pytest.fixture(scope="module")
def model() -> DiT:
    return tiny_dit(SIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_a_runner_takes_floats(model: DiT, dtype: torch.dtype) -> None:
    with TorchRunner(model) as runner:
        found = runner(fed(LATENTS, TIMES.to(dtype), LABELS))
    torch.testing.assert_close(found, model(LATENTS, TIMES, LABELS), rtol=1e-4, atol=1e-5)
    assert tuple(found.shape) == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        (torch.tensor([0, 1]), "timesteps are torch.int64; the model takes floats from 0 to 1"),
        (torch.tensor([True, False]), "timesteps are torch.bool; the model takes floats"),
        (torch.tensor([0.5, 1.001]), r"run from 0.5 to 1.001; the model knows 0 to 1, of the flow"),
        (torch.tensor([-0.25, 0.5]), r"run from -0.25 to 0.5"),
        (torch.tensor([torch.nan, 0.5]), "run from nan to nan"),
        (torch.tensor([0.5]), r"timesteps are \(1,\); with 2 latents"),
    ],
)
def test_times_that_are_none_of_a_flow(model: DiT, timesteps: Tensor, message: str) -> None:
    with TorchRunner(model) as runner, pytest.raises(RunnerError, match=message):
        runner(fed(LATENTS, timesteps, LABELS))


def test_a_file_is_fed_floats() -> None:
    feed = feed_of(SIT, fed(LATENTS, TIMES.double(), LABELS))
    assert [feed[name].dtype for name in feed] == [np.float32, np.float32, np.int64]
    assert feed_of(TINY, fed(LATENTS, torch.tensor([5, 7]), LABELS))["timesteps"].dtype == np.int64


def test_an_engine_is_fed_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path, monkeypatch)("flow")
    with TensorRTRunner(made_plan(tmp_path, model=SIT)) as runner:
        for times in (TIMES, TIMES / 2):
            expected = LATENTS + times[:, None, None, None] / 1000
            torch.testing.assert_close(runner(fed(LATENTS, times, LABELS)), expected)


def test_a_graph_is_held_against_its_process() -> None:
    graph = onnx.load(str(exported_reference())).graph
    of_steps = replace(SIT, learn_sigma=True, process=TINY.process)
    assert why_unlike(graph, of_steps) is None
    assert why_unlike(graph, SIT) == "timesteps is of type INT64, expected FLOAT"
    graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    assert why_unlike(graph, of_steps) == "timesteps is of type FLOAT, expected INT64"
    assert "timesteps" not in str(why_unlike(graph, SIT))


def test_the_contract_follows_the_record() -> None:
    def broken(model: ir.Model) -> str:
        try:
            check_contract(model)
        except OnnxExportError as error:
            return str(error)
        return ""

    model = ir.load(exported())
    model.metadata_props[CONFIG_KEY] = json.dumps(SIT.to_dict())
    assert "interface: inputs and output: found" in broken(model)
    model.graph.inputs[1].dtype = ir.DataType.FLOAT
    assert "interface" not in broken(model)


def test_the_adapter_refuses_a_flow(model: DiT) -> None:
    with (
        TorchRunner(model) as runner,
        pytest.raises(RunnerError, match=r"predicts the velocity .* pipeline samples diffusions"),
    ):
        OnnxDiTTransformer2DModel(runner=runner)


@pytest.mark.parametrize(("config", "times"), [(SIT, [0, 1 / 3, 2 / 3]), (REPA, [1, 2 / 3, 1 / 3])])
def test_states_are_what_euler_steps_feed(tmp_path: Path, config: Any, times: list[float]) -> None:
    model = tiny_dit(config)
    settings = CalibrationSettings(steps=3, classes=(3, 7, 1))
    states = collect_states(model, settings, identity=identity_of(model))
    assert states.timesteps.dtype == torch.float32
    torch.testing.assert_close(states.timesteps, torch.tensor(times, dtype=torch.float32))
    with TorchRunner(model) as runner:
        steps = list(trajectory(runner, classes=(3, 7, 1), steps=3, cfg_scale=1.5))
    assert states.timesteps.tolist() == [float(np.float32(step.timestep)) for step in steps]
    for kept, step in zip(states.latents, steps, strict=True):
        torch.testing.assert_close(kept, step.latents, rtol=1e-5, atol=1e-5)  # batches of 2
    states.save(tmp_path / "states")
    again = CalibrationStates.load(tmp_path / "states", identity=states.identity)
    assert torch.equal(again.timesteps, states.timesteps)
    fed = walk_states(states, count=4)
    assert fed.timesteps.dtype == torch.float32
    tiny_dit(config)(*fed.values())


@pytest.mark.parametrize(("config", "word"), [(SIT, "ascend"), (REPA, "descend")])
def test_states_in_another_order_are_refused(config: Any, word: str) -> None:
    model = tiny_dit(config)
    settings = CalibrationSettings(steps=3, classes=(3,))
    states = collect_states(model, settings, identity=identity_of(model))
    for odd in (states.timesteps.flip(0), states.timesteps + 1):
        with pytest.raises(ArtifactError, match=f"time steps do not {word} within 0 to 1"):
            replace(states, timesteps=odd)
    with pytest.raises(ArtifactError, match=r"expected \(3,\) torch.float32"):
        replace(states, timesteps=states.timesteps.long())


def test_held_out_probes_are_on_the_flow(model: DiT) -> None:
    settings = VerificationSettings(seeds=(0, 1), classes=(1, 2), steps=5)
    kept = KeptParts()
    sample_held_out(model, settings, kept)
    times = kept.parts["float-0"].tensors["timesteps"]
    assert times.dtype == torch.float32
    torch.testing.assert_close(times[:, 0], torch.arange(5) / 5)


def test_compared_inputs_are_on_the_flow(model: DiT) -> None:
    options = CompareOptions(
        reference=Path("a.onnx"), model=Path("b.onnx"), classes="3,7", steps=4, cfg_scale=2.0
    )
    with TorchRunner(model) as runner:
        inputs = list(trajectory_inputs(options, runner))
    assert [entry.timestep for entry in inputs] == [0.0, 0.25, 0.5, 0.75]
    for entry in inputs:
        assert entry.feed["timesteps"].dtype == np.float32
        assert entry.feed["timesteps"].tolist() == [entry.timestep] * 4


def test_a_sampler_says_what_it_samples(model: DiT) -> None:
    with TorchRunner(model) as runner:
        plain = Sampler(runner, SamplingSettings(classes=(3,), steps=2))
        asked = SamplingSettings(
            classes=(3,), steps=2, sampler="heun", shift=3.0, guidance_interval=(0.2, 0.8)
        )
        full = Sampler(runner, asked)
        seen: list[float] = []
        full.run(0, on_step=lambda _index, time, _latents: seen.append(time))
    assert plain.settings.to_dict() == {
        "classes": [3],
        "steps": 2,
        "sampler": "euler",
        "cfg_scale": 4.0,
        "cfg_channels": "3",
        "seed": 0,
        "batch": 8,
    }
    assert full.settings.to_dict() == plain.settings.to_dict() | {
        "sampler": "heun",
        "shift": 3.0,
        "guidance_interval": [0.2, 0.8],
    }
    assert seen == [0.0, pytest.approx(0.25)]  # σ = 0.5 shifted to 0.75


def test_the_command_samples_a_flow(
    model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_flow(*_: object, **__: object) -> OpenedModel:
        return OpenedModel(runner=TorchRunner(model), source="a flow", sha256="0" * 64)

    monkeypatch.setattr(job, "open_runner", open_flow)
    words = ["a-flow", "-o", str(tmp_path / "out"), "--classes", "3,7", "--steps", "4"]
    words += ["--sampler", "heun", "--shift", "3", "--guidance-interval", "0.2,0.8"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert facts["settings"]["sampler"] == "heun"
    assert facts["settings"]["shift"] == 3.0
    assert facts["settings"]["guidance_interval"] == [0.2, 0.8]
    with TorchRunner(model) as runner:
        settings = SamplingSettings(
            classes=(3, 7), steps=4, sampler="heun", shift=3.0, guidance_interval=(0.2, 0.8)
        )
        pixels = Sampler(runner, settings).run(0).pixels
    with np.load(tmp_path / "out" / "samples.npz") as content:
        assert np.array_equal(content["arr_0"], pixels)
    again = CliRunner().invoke(app, [*words[:-4], "--shift", "2"])
    assert again.exit_code == 2
    assert "shift" in again.output


def test_guided_and_plain_steps_share_a_runner_of_any_batch(model: DiT) -> None:
    with TorchRunner(model) as runner:
        always = sample(runner, classes=[3], steps=4, guidance_interval=(0.0, 1.0))
        never = sample(runner, classes=[3], steps=4, cfg_scale=1.0)
        part = sample(runner, classes=[3], steps=4, guidance_interval=(0.6, 0.9))
        full = sample(runner, classes=[3], steps=4)
    assert torch.equal(always, full)
    assert not torch.allclose(part, never)
    assert not torch.allclose(part, full)


@pytest.fixture(scope="module")
def files(model: DiT, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The float file and the quantized one."""
    folder = tmp_path_factory.mktemp("flow")
    export_reference(model, folder / "fp32.onnx")
    export_onnx(fold_smoothing(quantized_tiny_dit(model)), folder / "out.onnx", layout="int8")
    return folder / "fp32.onnx", folder / "out.onnx"


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_a_file_samples_as_the_model(
    model: DiT, files: tuple[Path, Path], sampler: FlowSampler
) -> None:
    asked: dict[str, Any] = {"classes": [3, 7], "steps": 5, "sampler": sampler, "cfg_scale": 2.0}
    with TorchRunner(model) as runner:
        wanted = sample(runner, **asked, guidance_interval=(0.3, 0.9))
    with OnnxRuntimeRunner(files[0], threads=1) as runner:
        found = sample(runner, **asked, guidance_interval=(0.3, 0.9))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_openvino_is_fed_floats(model: DiT, files: tuple[Path, Path]) -> None:
    pytest.importorskip("openvino")
    with OpenVINORunner(files[0], threads=1) as runner:
        found = runner(fed(LATENTS, TIMES, LABELS))
    torch.testing.assert_close(found, model(LATENTS, TIMES, LABELS), rtol=1e-3, atol=1e-4)


def test_files_are_compared_along_the_flow(files: tuple[Path, Path], tmp_path: Path) -> None:
    words = [str(files[0]), str(files[1]), "--steps", "3", "--classes", "3,7"]
    result = CliRunner().invoke(compare_app, [*words, "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    assert "0.333333" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    times = [step["timestep"] for step in report["steps"]]
    assert times == pytest.approx([0, 1 / 3, 2 / 3])


def test_the_adapter_refuses_the_file_of_a_flow(files: tuple[Path, Path]) -> None:
    with pytest.raises(RunnerError, match="pipeline samples diffusions"):
        OnnxDiTTransformer2DModel(files[1])
