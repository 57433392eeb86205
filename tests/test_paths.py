"""Every public entry takes a string where it takes a `Path`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_vae
from quantized_fixture import (
    TINY,
    example_inputs,
    exported,
    exported_reference,
    fed,
    quantized_tiny_dit,
    tiny_dit,
    tiny_folded,
)
from tensorrt_fixture import made_plan, stand_ins

from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.calibration_settings import CalibrationSettings
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import CalibrationStates, collect_states
from ditas_export.engine.metadata import EngineMetadata, is_plan_file, metadata_of, metadata_path
from ditas_export.engine.options import BuildOptions
from ditas_export.evaluation.options import CompareOptions, EvaluateOptions
from ditas_export.evaluation.verify import VerificationSettings, verify_file
from ditas_export.families.identity import identity_of
from ditas_export.families.load import load_model
from ditas_export.generation import pixels
from ditas_export.generation.options import SampleOptions
from ditas_export.onnx_export import export as exports
from ditas_export.onnx_export import file_facts
from ditas_export.onnx_export.expand import expand
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.onnx_export.manifest import read_manifest, require_own_manifest
from ditas_export.onnx_export.relower import relower
from ditas_export.options import ExportOptions
from ditas_export.runtime.cache import Cache
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner, matmul_kernels
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.tensorrt_runner import TensorRTRunner
from ditas_export.vae.decoder import OnnxVaeDecoder, open_decoder
from ditas_export.vae.export import export_vae_decoder
from ditas_export.vae.shape import is_decoder_file, read_vae_shape

OPTIONS: dict[type, dict[str, Any]] = {
    ExportOptions: {},
    SampleOptions: {"model": Path("folder/out.onnx")},
    CompareOptions: {},
    EvaluateOptions: {},
    BuildOptions: {},
}


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_options_make_paths_of_strings_and_names_of_paths(kind: type) -> None:
    types = typing.get_type_hints(kind)
    paths = [name for name, hint in types.items() if hint in (Path, Path | None)]
    assert paths
    options = kind(**{name: f"folder/{name}" for name in paths}, **OPTIONS[kind])
    assert [getattr(options, name) for name in paths] == [Path(f"folder/{name}") for name in paths]
    assert all(getattr(options, name) == str(value) for name, value in OPTIONS[kind].items())
    assert dataclasses.replace(options) == options


READERS: dict[str, Callable[[Any], Any]] = {
    "read_config": file_facts.read_config,
    "read_identity": file_facts.read_identity,
    "read_form": file_facts.read_form,
    "is_quantized_file": file_facts.is_quantized_file,
    "is_float_file": file_facts.is_float_file,
    "require_form_for_tensorrt": file_facts.require_form_for_tensorrt,
    "file_metadata": file_facts.file_metadata,
    "sha256_of_onnx": sha256_of_onnx,
    "read_manifest": read_manifest,
    "require_own_manifest": require_own_manifest,
    "matmul_kernels": matmul_kernels,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_read_of_a_file(read: Callable[[Any], Any]) -> None:
    assert read(str(exported())) == read(exported())


@pytest.mark.parametrize("runner", [OnnxRuntimeRunner, OpenVINORunner])
def test_runners_and_their_cache(runner: Any, tmp_path: Path) -> None:
    if runner is OpenVINORunner:
        pytest.importorskip("openvino")
    with runner(str(exported()), cache=str(tmp_path)) as opened:
        assert opened(fed(*example_inputs())).shape == (2, 6, 8, 8)
    assert Cache.at(str(tmp_path)).entries()


def test_open_runner(tmp_path: Path) -> None:
    for model in (exported_reference(), str(exported_reference())):
        opened = open_runner(model, runtime="onnxruntime", cache=str(tmp_path))
        opened.runner.close()
        assert opened.source == str(exported_reference())


def test_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path, monkeypatch)
    plan = made_plan(tmp_path)
    beside = metadata_path(str(plan))
    assert beside == metadata_path(plan)
    assert is_plan_file(str(plan))
    metadata = EngineMetadata.load(str(beside))
    assert metadata == metadata_of(str(plan))
    metadata.save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == beside.read_bytes()
    with TensorRTRunner(str(plan), cache=str(tmp_path / "cache")) as runner:
        assert runner(fed(*example_inputs())).shape == (2, 6, 8, 8)


def test_exported_files(tmp_path: Path) -> None:
    def at(name: str) -> str:
        return str(tmp_path / name)

    exports.export_onnx(tiny_folded(), at("out.onnx"))
    exports.export_reference(tiny_dit(), at("fp32.onnx"))
    expand(at("out.onnx"), at("int8.onnx"))
    relower(at("out.onnx"), at("ort.onnx"), "onnxruntime")
    settings = VerificationSettings(seeds=(0,), classes=(1,), steps=2)
    fake = fake_quantized_model(tiny_folded(), ranges="token")
    assert verify_file(tiny_dit(), fake, at("out.onnx"), settings).matches
    random_vae().save_pretrained(at("vae"))
    export_vae_decoder(at("vae"), at("vae_decoder.onnx"))
    assert is_decoder_file(at("vae_decoder.onnx"))
    assert read_vae_shape(at("vae_decoder.onnx")) == read_vae_shape(tmp_path / "vae_decoder.onnx")
    OnnxVaeDecoder(at("vae_decoder.onnx"))
    config = dataclasses.replace(TINY, in_channels=4)
    assert open_decoder(tmp_path / "vae_decoder.onnx", config=config, device="cpu") is not None


def test_states_and_artefacts(tmp_path: Path, checkpoint: Path) -> None:
    path, progress = str(tmp_path / "kept.safetensors"), str(tmp_path / "progress")
    Path(progress).mkdir()
    model = load_model(str(checkpoint)).model
    identity = identity_of(model)
    settings = CalibrationSettings(steps=2, classes=(3, 7))
    states = collect_states(model, settings, identity=identity, progress=progress)
    states.save(path)
    assert CalibrationStates.load(path, identity=identity).settings == settings
    method = QuantizationSettings(method="linear", rank=0)
    assert quantize_model(model, states, method, progress=progress).linears
    quantized_tiny_dit(model).save(path)
    assert QuantizedModel.load(path).identity == identity


def test_pictures(tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 1), dtype=np.uint8)
    png, npz = str(tmp_path / "one.png"), str(tmp_path / "all.npz")
    pixels.write_png(png, picture)
    assert (pixels.read_png(png) == picture).all()
    pixels.write_npz(npz, [picture], count=1, like=picture)
    assert pixels.is_npz_file(npz)
