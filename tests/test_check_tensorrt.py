"""The proof on a GPU, played on a CPU: what becomes of forms that no report explains."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from quantized_fixture import TINY, exported

from ditas_export.engine.metadata import Gpu
from ditas_export.engine.products import RTX
from ditas_export.errors import RunnerError
from ditas_export.onnx_export.file_facts import read_form
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

SCRIPTS = Path(__file__).parent.parent / "scripts"
QKV = "blocks.0.attn.qkv"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script, its GPU played by onnxruntime: a "plan" is the file it was built from."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("check_tensorrt", SCRIPTS / "check_tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)

    class Runner(OnnxRuntimeRunner):
        inspected = "{}"

        def __init__(self, plan: Path, *, cache: Path | None = None) -> None:
            super().__init__(plan)

        def layer_information(self) -> str:
            return self.inspected

    def make(onnx: Path, plan: Path, **_: Any) -> Any:
        shutil.copy(onnx, plan)
        metadata = SimpleNamespace(plan_bytes=2**20, form=read_form(onnx))
        return SimpleNamespace(report=None, unknown="the log lists no layers", metadata=metadata)

    gpu = Gpu(name="a GPU", compute_capability="8.9")
    for name, double in {
        "TensorRTRunner": Runner,
        "make_engine": make,
        "current_gpu": lambda: gpu,
        "torch_runner": lambda model, compiled: OnnxRuntimeRunner(exported()),
        "milliseconds": lambda runner, batch, runs: float(batch),
        "BATCHES": (1, 2),
    }.items():
        monkeypatch.setattr(module, name, double)
    monkeypatch.setattr(module.torch.cuda, "empty_cache", lambda: None)
    return module


def checked(script: Any, folder: Path) -> Any:
    form = script.Form(
        name="int8 token fp32",
        plan=folder / "plan",
        write=lambda path: shutil.copy(exported(layout="int8", target="tensorrt"), path),
    )
    script.check(form, RTX, TINY, folder)
    return form


def test_a_form_that_is_unknown_is_run_compared_and_timed(tmp_path: Path, script: Any) -> None:
    form = checked(script, tmp_path)
    assert (form.report, form.problem, form.is_sound) == (None, "", True)
    assert form.snr_db > 100
    times = script.timed([form], object(), tmp_path, 2, 1)
    assert times[form.name] == {1: [1.0, 1.0], 2: [2.0, 2.0]}
    cells = script.build_cells(form)
    assert cells[0] == "unknown"
    assert float(cells[-1]) > 100


def test_an_inspector_that_knows_is_read(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = {
        "Name": "product", "LayerType": "gemm", "StreamId": 0,
        "Inputs": [{"Name": "x", "Format/Datatype": "Half"}],
        "Metadata": f"[ONNX Layer: {QKV}/MatMul]",
    }  # fmt: skip
    text = json.dumps({"Layers": [layer]})
    monkeypatch.setattr(script.TensorRTRunner, "inspected", text)
    form = checked(script, tmp_path)
    assert form.report.lost == (QKV,)
    assert not form.is_sound
    assert script.build_cells(form)[0] == f"0 of 8, {4 * TINY.depth - 1} unknown"


def test_a_plan_that_does_not_run_is_not_timed(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, *inputs: object) -> None:
        raise RunnerError("a fault")

    form = checked(script, tmp_path)
    monkeypatch.setattr(script, "milliseconds", refuse)
    assert form.is_sound
    assert script.timed([form], object(), tmp_path, 2, 1) == {}
    assert (form.problem, form.is_sound) == ("a fault", False)
    monkeypatch.setattr(script.TensorRTRunner, "__call__", refuse)
    form = checked(script, tmp_path)
    assert (form.problem, form.snr_db, form.is_sound) == ("a fault", None, False)
