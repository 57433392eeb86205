"""What ONNX Runtime's TensorRT providers are told, as far as that goes without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from quantized_fixture import TINY, example_inputs, exported, fed, snr_db

from ditas_export.errors import RunnerError
from ditas_export.runtime import onnxruntime_runner, tensorrt_providers
from ditas_export.runtime.onnxruntime_runner import CPU, CUDA, TENSORRT, OnnxRuntimeRunner
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.rtx_provider import NAME as RTX
from ditas_export.runtime.tensorrt_providers import TENSORRT_PROVIDER, provider_options

SHAPES = [
    "latents:1x3x8x8,timesteps:1,class_labels:1",
    "latents:8x3x8x8,timesteps:8,class_labels:8",
    "latents:64x3x8x8,timesteps:64,class_labels:64",
]


@pytest.mark.parametrize(("provider", "prefix"), [(TENSORRT_PROVIDER, "trt"), (RTX, "nv")])
def test_shapes_and_a_place_for_what_is_built(provider: str, prefix: str, tmp_path: Path) -> None:
    shapes = {
        f"{prefix}_profile_{bound}_shapes": words
        for bound, words in zip(("min", "opt", "max"), SHAPES, strict=True)
    }
    assert provider_options(provider, TINY, None) == shapes
    folder = str(tmp_path)
    kept = {
        "trt": {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        },
        "nv": {"nv_runtime_cache_path": folder},
    }[prefix]
    assert provider_options(provider, TINY, tmp_path) == shapes | kept


def test_other_providers_have_no_options_of_their_own(tmp_path: Path) -> None:
    for provider in CUDA:
        assert provider_options(provider, TINY, tmp_path) == {}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have TensorRT's provider played by the CPU's; return what sessions are opened with."""
    sessions: list[Any] = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, *, providers: Any) -> None:
            sessions.append(providers)
            super().__init__(path, options, providers=list(CPU))

        def get_providers(self) -> list[str]:
            return list(TENSORRT)

    runtime = SimpleNamespace(
        **{name: getattr(onnxruntime, name) for name in dir(onnxruntime) if name[0] != "_"}
    )
    runtime.InferenceSession = Session
    runtime.__version__ = onnxruntime.__version__
    runtime.get_available_providers = lambda: list(TENSORRT)
    monkeypatch.setattr(onnxruntime_runner, "_onnxruntime", lambda: runtime)
    return sessions


def test_an_engine_has_a_folder_of_its_own_in_the_cache(
    tmp_path: Path, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder_of(path: Path) -> str:
        with OnnxRuntimeRunner(path, providers=TENSORRT, device_id=2, cache=tmp_path) as runner:
            runner(fed(*example_inputs()))
        first, second, third = opened[-1]
        assert (first[0], second, third) == (TENSORRT[0], (CUDA[0], {"device_id": 2}), CPU[0])
        assert first[1].items() >= {"device_id": 2, "trt_profile_max_shapes": SHAPES[2]}.items()
        assert Path(first[1]["trt_engine_cache_path"]).is_dir()
        return str(first[1]["trt_engine_cache_path"])

    file = exported(target="tensorrt")
    folder = folder_of(file)
    assert Path(folder).parent == tmp_path
    assert folder_of(file) == folder
    assert folder_of(exported()) != folder
    monkeypatch.setattr(onnxruntime_runner, "builder_facts", lambda device: {"gpu": "another"})
    assert folder_of(file) != folder


def test_a_batch_that_was_not_built_for_is_refused(opened: list[Any]) -> None:
    with OnnxRuntimeRunner(exported(target="tensorrt"), providers=TENSORRT) as runner:
        runner(fed(*example_inputs(batch=64)))
        with pytest.raises(RunnerError, match=r"a batch of 65 rows; .* is built for 1 to 64"):
            runner(fed(*example_inputs(batch=65)))
    assert "trt_engine_cache_path" not in opened[-1][0][1]


def test_the_gpu_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    facts = tensorrt_providers.builder_facts(3)
    assert facts["gpu"] == 3
    packages: Any = facts["packages"]
    assert packages["onnxruntime"] == onnxruntime.__version__
    assert all(name.startswith(("tensorrt", "onnxruntime")) for name in packages)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["tensorrt", "nv-tensorrt-rtx"])
def test_a_real_provider_keeps_what_it_built(tmp_path: Path, runtime: Any) -> None:
    try:
        opened = open_runner(
            str(exported(target="tensorrt")), runtime=runtime, device="cuda", cache=tmp_path
        )
    except RunnerError as error:
        pytest.skip(str(error))
    with OnnxRuntimeRunner(exported(target="tensorrt")) as reference, opened.runner as runner:
        for rows in (2, 8):
            inputs = example_inputs(batch=rows)
            assert snr_db(reference(fed(*inputs)), runner(fed(*inputs))) > 40  # rounding ties
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert kept
    again = open_runner(
        str(exported(target="tensorrt")), runtime=runtime, device="cuda", cache=tmp_path
    )
    with again.runner as runner:
        runner(fed(*example_inputs(batch=4)))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept
