"""What is refused before anything is sampled: for each case the sampler is never called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from quantized_fixture import TINY, quantized_tiny_dit, save_checkpoint, tiny_dit

from ditas_export import pipeline
from ditas_export.calibration.calibrate import QuantizationSettings
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import CalibrationSettings, CalibrationStates, collect_states
from ditas_export.conditions.labels import ClassLabels
from ditas_export.distributed import Ranks
from ditas_export.errors import DitasExportError, OnnxExportError
from ditas_export.families.identity import identity_of
from ditas_export.options import ExportOptions
from ditas_export.pipeline import export
from ditas_export.preflight import check_artifact, check_calibration, check_states


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mock]:
    """The sampler of a calibration, which must not be reached."""
    spy = Mock(side_effect=AssertionError("it samples"))
    monkeypatch.setattr(pipeline, "collect_states", spy)
    yield spy
    spy.assert_not_called()


def options(folder: Path, checkpoint: Path, **changes: Any) -> ExportOptions:
    small = {"steps": 4, "samples": 2, "walk_tokens": 100, "device": "cpu"}
    return ExportOptions(
        **{"output": folder / "out.onnx", "model": str(checkpoint), **small, **changes}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 97}, r"rank=97, but blocks\.0\.attn\.qkv has 288 outputs of 96 inputs; use 96"),
        ({"block_size": 64}, "does not divide 96 inputs"),
        ({"steps": 1}, "steps=1"),
        ({"steps": 1001}, "takes 2 to 1000 steps, not 1001"),
        ({"classes": "10"}, "names class 10; this model has 0 to 9"),
        ({"samples": 0}, "samples=0"),
        ({"cfg_scale": 0.5}, "guidance starts at 1"),
        ({"method": "best"}, "no method"),
        ({"adaln": 4, "model": "narrow"}, "adaLN weights in 4 bits"),
        ({"precision": "fp16", "model": "large"}, r"final_layer\.linear\.bias .*1e\+05.*fp16|bf16"),
        ({"target": "tensorrt", "model": "large"}, r"final_layer\.linear\.bias"),
        ({"reference": Path("/no/such/fp32.onnx")}, "does not exist; create it first"),
        ({"calibration": Path("/no/such/states")}, "no readable"),
        ({"artifact": Path("/no/such/model")}, "no readable"),
        ({"vae": "/no/such/vae"}, "/no/such/vae"),
    ],
    ids=str,
)
def test_it_is_refused_before_sampling(
    sampler: Mock, checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    models = {"narrow": replace(TINY, hidden_size=48), "large": TINY}
    if (named := changes.get("model")) is not None:
        model = tiny_dit(models[named])
        if named == "large":
            model.final_layer.linear.bias[0] = 1e5  # type: ignore[union-attr, index, operator]
        checkpoint = tmp_path / "model.safetensors"
        save_checkpoint(checkpoint, model)
        changes = {name: value for name, value in changes.items() if name != "model"}
    outputs = tmp_path / "out"
    outputs.mkdir()
    with pytest.raises(DitasExportError, match=message) as caught:
        export(options(outputs, checkpoint, **changes))
    assert "\n" not in str(caught.value)
    assert list(outputs.iterdir()) == []


def test_more_processes_than_batches_are_refused_before_sampling() -> None:
    """16 rows of the walk are one batch, which two cannot share."""
    calibration = CalibrationSettings(steps=4, classes=(1, 2))
    settings = QuantizationSettings()
    check_calibration(calibration, settings, TINY, Ranks(rank=0, world_size=1))
    with pytest.raises(DitasExportError, match=r"2 processes for 16 rows.*launch at most 1"):
        check_calibration(calibration, settings, TINY, Ranks(rank=0, world_size=2))


@pytest.fixture(scope="module")
def states() -> CalibrationStates:
    model = tiny_dit()
    settings = CalibrationSettings(steps=4, classes=(3, 7))
    return collect_states(model, settings, identity=identity_of(model))


SAME: dict[str, Any] = {
    "steps": 4,
    "samples": 2,
    "classes": "3,7",
    "seed": 0,
    "cfg_scale": 1.5,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 5, "--steps 5, but it was made with 4"),
        ("samples", 3, "--samples 3, but it was made with 2"),
        ("classes", "3,8", "--classes 3,8, but it was made with 3,7"),
        ("classes", "random", "--classes random, but it was made with 3,7"),
        ("seed", 1, "--seed 1, but it was made with 0"),
        ("cfg_scale", 4.0, "--cfg-scale 4.0, but it was made with 1.5"),
    ],
)
def test_options_that_contradict_states_name_both_values(
    states: CalibrationStates, name: str, value: Any, message: str
) -> None:
    path, output = Path("kept"), Path("out.onnx")
    check_states(path, ExportOptions(output=output), states.settings, ClassLabels(TINY))
    check_states(path, ExportOptions(output=output, **SAME), states.settings, ClassLabels(TINY))
    with pytest.raises(DitasExportError, match=message):
        check_states(
            path, ExportOptions(output=output, **{name: value}), states.settings, ClassLabels(TINY)
        )


@pytest.fixture(scope="module")
def artifact(states: CalibrationStates) -> QuantizedModel:
    settings = QuantizationSettings(method="ditas", rank=4, walk_tokens=100)
    made_with = settings.to_dict() | {"calibration": states.settings.to_dict()}
    return replace(quantized_tiny_dit(tiny_dit(), rank=4), settings=made_with)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("w", 8, "--w 8, but it was made with 4"),
        ("a", 16, "--a 16, but it was made with 8"),
        ("rank", 16, "--rank 16, but it was made with 4"),
        ("method", "linear", "--method linear, but it was made with ditas"),
        ("block_size", 32, "--block-size 32, but it was made with 48"),
        ("alpha_grid", (0.5,), "--alpha-grid 0.5, but it was made with 0.0,0.05"),
        ("walk_tokens", 200, "--walk-tokens 200, but it was made with 100"),
        ("fast", True, "--walk-tokens 19200, but it was made with 100"),
        ("steps", 5, "--steps 5, but it was made with 4"),
        ("samples", 3, "--samples 3, but it was made with 2"),
        ("classes", "3,8", "--classes 3,8, but it was made with 3,7"),
        ("seed", 1, "--seed 1, but it was made with 0"),
        ("cfg_scale", 4.0, "--cfg-scale 4.0, but it was made with 1.5"),
    ],
)
def test_options_that_contradict_an_artifact_name_both_values(
    artifact: QuantizedModel, name: str, value: Any, message: str
) -> None:
    path, output = Path("kept"), Path("out.onnx")
    check_artifact(path, ExportOptions(output=output), artifact, ClassLabels(TINY))
    same = {"w": 4, "a": 8, "rank": 4, "method": "ditas", "block_size": 48, "walk_tokens": 100}
    check_artifact(path, ExportOptions(output=output, **same, **SAME), artifact, ClassLabels(TINY))
    with pytest.raises(DitasExportError, match=message):
        check_artifact(
            path, ExportOptions(output=output, **{name: value}), artifact, ClassLabels(TINY)
        )


@pytest.mark.parametrize("kept", ["artifact", "calibration"])
def test_a_contradiction_is_refused_by_the_command(
    sampler: Mock,
    states: CalibrationStates,
    artifact: QuantizedModel,
    checkpoint: Path,
    tmp_path: Path,
    kept: str,
) -> None:
    path = tmp_path / "kept"
    {"artifact": artifact, "calibration": states}[kept].save(path)
    with pytest.raises(DitasExportError, match="--steps 9, but it was made with 4"):
        export(ExportOptions(
            output=tmp_path / "out.onnx", model=str(checkpoint), steps=9, **{kept: path}
        ))  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_an_artifact_that_does_not_say_how_it_was_calibrated(artifact: QuantizedModel) -> None:
    silent = replace(artifact, settings={"ranges": "token"})
    with pytest.raises(DitasExportError, match="does not say how it was calibrated"):
        check_artifact(
            Path("kept"), ExportOptions(output=Path("out.onnx")), silent, ClassLabels(TINY)
        )


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_seeds_that_no_generator_takes_are_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(OnnxExportError, match=f"seed={seed}; expected a whole number, 0 to"):
        ExportOptions(output=tmp_path / "out.onnx", seed=seed)
