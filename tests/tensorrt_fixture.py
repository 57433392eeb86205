"""Stand-ins for NVIDIA's runtimes and a CUDA stream, and plans for them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quantized_fixture import TINY

from ditas_export.artifact_files import sha256_of_file
from ditas_export.engine.metadata import EngineMetadata, Gpu, metadata_path
from ditas_export.engine.options import BuildOptions
from ditas_export.onnx_export.form import FileForm
from ditas_export.runtime import tensorrt_runner
from ditas_export.runtime.cuda_stream import CudaStream

TESTS = Path(__file__).parent
ADA = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9")
VERSIONS = {"tensorrt": "10.13.3.9", "rtx": "1.7.1.116"}


class HostStream:
    """Plays a CUDA stream: runs everything at once, and counts.

    What it captures is as much as a CUDA graph has: it keeps no Python object of what it replays.
    """

    gpu = ADA
    handle = 7
    faults_as_errors = CudaStream.faults_as_errors

    def __init__(self, device: str) -> None:
        assert device.startswith("cuda")
        self.device = torch.device("cpu")
        self.captured = self.replayed = self.finished = 0

    @contextmanager
    def ordered(self) -> Iterator[None]:
        yield

    def finish(self) -> None:
        self.finished += 1

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        with sys.modules["tensorrt"].capturing() as kernels:
            launch()

        def replay() -> None:
            self.replayed += 1
            for kernel in kernels:
                kernel()

        return replay


def load_fake(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location(name, TESTS / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)


Behave = Callable[[str], None]


def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behave:
    """Put the stand-ins in place; the function that comes back says what goes wrong."""
    monkeypatch.setenv("FAKE_TENSORRT_RECORD", str(tmp_path / "calls.json"))
    monkeypatch.setattr(tensorrt_runner, "CudaStream", HostStream)

    def load(behaviour: str) -> None:
        monkeypatch.setenv("FAKE_TENSORRT_BEHAVIOUR", behaviour)
        load_fake("fake_tensorrt", "tensorrt", monkeypatch)
        load_fake("fake_tensorrt_rtx", "tensorrt_rtx", monkeypatch)

    load("")
    return load


def made_plan(folder: Path, product: str = "tensorrt", **changes: Any) -> Path:
    plan = folder / "out.plan"
    plan.write_bytes(b"a plan")
    facts: dict[str, Any] = {
        "product": product,
        "version": VERSIONS[product],
        "plan_sha256": sha256_of_file(plan),
        "plan_bytes": 6,
        "onnx_name": "out.onnx",
        "onnx_sha256": "0" * 64,
        "model": TINY,
        "form": FileForm(float_type="fp32"),
        "options": BuildOptions(),
        "gpu": ADA,
        "layers": None,
    }
    EngineMetadata(**facts | changes).save(metadata_path(plan))
    return plan
