"""The JSON beside a plan, and which plans a runtime refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from quantized_fixture import TINY

from ditas_export.artifact_files import sha256_of_file
from ditas_export.engine.metadata import (
    EngineMetadata,
    Gpu,
    metadata_of,
    metadata_path,
    require_matching,
)
from ditas_export.engine.options import BatchRange, BuildOptions
from ditas_export.errors import EngineError
from ditas_export.onnx_export.form import FileForm

ADA = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9")
HOPPER = Gpu(name="NVIDIA H200", compute_capability="9.0")
FORM = FileForm(
    float_type="fp16", weight_bits=4, activation_bits=8, layout="int4", ranges="token",
    activation_codes="int8", target="tensorrt",
)  # fmt: skip
OPTIONS = BuildOptions(
    batch=BatchRange(smallest=1, usual=3, largest=4),
    workspace_gib=0.5,
    opt_level=2,
    timing_cache=Path("timings"),
)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "out.plan"
    path.write_bytes(b"a plan")
    return path


def metadata(plan: Path, **changes: Any) -> EngineMetadata:
    known = EngineMetadata(
        product="tensorrt",
        version="10.13.3.9",
        plan_sha256=sha256_of_file(plan),
        plan_bytes=6,
        onnx_name="out.onnx",
        onnx_sha256="0" * 64,
        model=TINY,
        form=FORM,
        options=OPTIONS,
        gpu=ADA,
        layers=None,
    )
    return dataclasses.replace(known, **changes)


def match(known: EngineMetadata, plan: Path, **changes: Any) -> None:
    runtime = {"product": known.product, "version": known.version, "gpu": ADA} | changes
    known.save(metadata_path(plan))
    require_matching(metadata_of(plan), plan, **runtime)


@pytest.mark.parametrize("gpu", [ADA, None])
def test_saved_is_loaded(plan: Path, gpu: Gpu | None) -> None:
    known = metadata(plan, gpu=gpu)
    assert metadata_path(plan).name == "out.plan.json"  # out.json is the ONNX file's manifest
    known.save(metadata_path(plan))
    assert EngineMetadata.load(metadata_path(plan)) == known


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("engine 1", "engine 2"),
        lambda text: text.replace('"plan_bytes": 6,', ""),
        lambda text: text.replace('"plan_bytes"', '"plan_octets"'),
        lambda text: text.replace('"product": "tensorrt"', '"product": "tensorflow"'),
        lambda text: text.replace('"10.13.3.9"', "10.13"),
        lambda text: text.replace('"10.13.3.9"', '"ten"'),
        lambda text: text.replace('"depth": 2', '"depth": "two"'),
        lambda text: text.replace('"depth": 2', '"depth": 2, "colour": 3'),
        lambda text: text.replace('"layout": "int4"', '"layout": "int5"'),
        lambda text: text.replace('"layout": "int4",', ""),
        lambda text: text.replace('"weight_bits": 4', '"weight_bits": true'),
        lambda text: text.replace('"float_type": "fp16",', ""),
        lambda text: text.replace('"refit": false', '"refit": 0'),
        lambda text: text.replace('"refit": false', '"refit": false, "colour": 3'),
        lambda text: text.replace('"opt_level": 2', '"opt_level": "2"'),
        lambda text: text.replace('"largest": 4', '"largest": 1'),
        lambda text: text.replace('"largest": 4', '"largest": 4.5'),
        lambda text: text.replace('"compute_capabilities": []', '"compute_capabilities": 8.9'),
        lambda text: text.replace('"compute_capabilities": []', '"compute_capabilities": [8]'),
        lambda text: text.replace('"timings"', "7"),
        lambda text: text.replace('"workspace_gib": 0.5', '"workspace_gib": "0.5"'),
        lambda text: text.replace('"name"', '"title"'),
    ],
)
def test_another_file_is_refused(plan: Path, damage: Any) -> None:
    path = metadata_path(plan)
    metadata(plan).save(path)
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    with pytest.raises(EngineError, match=r"out\.plan\.json does not describe an engine") as caught:
        EngineMetadata.load(path)
    assert "\n" not in str(caught.value)


def test_what_an_earlier_file_lacks_has_its_default(plan: Path) -> None:
    path = metadata_path(plan)
    metadata(plan).save(path)
    content = json.loads(path.read_text())
    content["options"] = {}
    del content["form"]["activation_codes"], content["form"]["adaln_bits"]
    path.write_text(json.dumps(content))
    found = EngineMetadata.load(path)
    assert found.options == BuildOptions()
    assert found.form == dataclasses.replace(FORM, activation_codes=None)
    match(found, plan)


def test_no_file_is_refused(plan: Path) -> None:
    with pytest.raises(EngineError, match=r"out\.plan\.json does not describe .* ditas-build"):
        EngineMetadata.load(metadata_path(plan))


def test_a_plan_runs_where_it_was_built(plan: Path) -> None:
    match(metadata(plan), plan)
    match(metadata(plan), plan, version="10.13.3")  # all that trtexec says of itself
    match(metadata(plan, gpu=None), plan, gpu=HOPPER)  # where it was built is not known


def test_another_plan_is_refused(plan: Path) -> None:
    known = metadata(plan)
    plan.write_bytes(b"another")
    with pytest.raises(EngineError, match="describes another plan"):
        match(known, plan)
    match(metadata(plan, replaces=known), plan)
    match(dataclasses.replace(known, replaces=metadata(plan)), plan)  # a build that was killed


def test_what_stands_in_a_plans_place_is_named(plan: Path) -> None:
    known = metadata(plan)
    plan.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(EngineError, match=r"another plan; .*out\.plan is a git-LFS pointer"):
        match(known, plan)
    plan.unlink()
    with pytest.raises(EngineError, match=r"out\.plan cannot be read: No such file or directory"):
        match(known, plan)


def test_another_product_is_refused(plan: Path) -> None:
    with pytest.raises(EngineError, match="built with TensorRT; TensorRT for RTX cannot run it"):
        match(metadata(plan), plan, product="rtx")


@pytest.mark.parametrize(
    ("compatible", "version", "runs"),
    [
        (False, "10.13.4.1", False),
        (True, "10.16.1.11", True),
        (True, "10.3.0", False),  # older
        (True, "11.0.0.114", False),  # another major version
        (True, "10.13.3.9", True),
    ],
)
def test_versions(plan: Path, compatible: bool, version: str, runs: bool) -> None:
    known = metadata(plan, options=dataclasses.replace(OPTIONS, version_compatible=compatible))
    if runs:
        match(known, plan, version=version)
        return
    with pytest.raises(EngineError, match=r"built with TensorRT 10\.13\.3\.9 .* not " + version):
        match(known, plan, version=version)


def test_gpus(plan: Path) -> None:
    with pytest.raises(EngineError, match=r"built on NVIDIA GeForce RTX 4090 \(8\.9\); .* H200"):
        match(metadata(plan), plan, gpu=HOPPER)
    rtx = metadata(plan, product="rtx", gpu=HOPPER)  # built on any machine, for any GPU
    match(rtx, plan)
    listed = dataclasses.replace(OPTIONS, compute_capabilities=("8.6", "8.9"))
    match(dataclasses.replace(rtx, options=listed), plan)
    with pytest.raises(EngineError, match=r"compute capability 8\.6, 8\.9; build it for .*9\.0"):
        match(dataclasses.replace(rtx, options=listed), plan, gpu=HOPPER)


def test_the_file_is_plain_json(plan: Path) -> None:
    metadata(plan).save(metadata_path(plan))
    content = json.loads(metadata_path(plan).read_text())
    assert content["format"] == "ditas-export engine 1"
    assert content["gpu"] == {"name": ADA.name, "compute_capability": "8.9"}
