"""From a model's name to a runner: which backend takes it, and on which device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open

from ditas_export.artifact_files import sha256_of_file
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import ARTIFACT_KIND, QuantizedModel
from ditas_export.diffusion.runner import Runner
from ditas_export.errors import RunnerError
from ditas_export.families.load import load_model
from ditas_export.file_signs import ONNX_SUFFIXES, PLAN_SUFFIXES, has_suffix
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.onnx_export.file_facts import read_form, require_form_for_tensorrt
from ditas_export.onnx_export.manifest import require_own_manifest
from ditas_export.options import NO_HINTS, CheckpointHints
from ditas_export.paths import StrPath
from ditas_export.runtime.cache import Cache
from ditas_export.runtime.cache_settings import default_cache
from ditas_export.runtime.onnxruntime_runner import (
    CPU,
    CUDA,
    TENSORRT,
    TENSORRT_RTX,
    OnnxRuntimeRunner,
)
from ditas_export.runtime.openvino_runner import INSTALL, OpenVINORunner
from ditas_export.runtime.options import Runtime
from ditas_export.runtime.tensorrt_runner import TensorRTRunner
from ditas_export.runtime.torch_int8 import Int8Runner
from ditas_export.runtime.torch_runner import TorchRunner

GPU_PROVIDERS = {"tensorrt": TENSORRT, "nv-tensorrt-rtx": TENSORRT_RTX}
"""ONNX Runtime's providers for runtimes that are not on CPUs."""


CUDA_RUNS_FLOAT = (
    "onnxruntime's CUDA provider runs INT8 Q/DQ in float, slower than fp16; take an engine "
    "(ditas-build), or --runtime tensorrt"
)
"""Said once of a file on a GPU that no TensorRT runs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedModel:
    """A runner, and which weights it runs."""

    runner: Runner
    source: str
    sha256: str  # of the file, its external data included; of a checkpoint the fingerprint
    notes: tuple[str, ...] = ()  # of a checkpoint: what was chosen, left out or guessed
    vae: str | None = None  # of a pipeline: where its own VAE is


def open_runner(
    model: StrPath,
    *,
    runtime: Runtime = "auto",
    device: str = "cpu",
    threads: int | None = None,
    hints: CheckpointHints = NO_HINTS,
    cache: StrPath | None = None,
) -> OpenedModel:
    """Open a model in the backend that is asked for, or in the fastest that is installed.

    Args:
        model: an exported `.onnx`, an engine (`.plan`, `.engine`), a quantized model that
            `ditas-export --save-artifact` wrote, which PyTorch runs by INT8 products, or what
            `load_model` takes, which PyTorch runs in float32. Suffixes count in any case.
        runtime: `auto` takes OpenVINO for files on the CPU where it is installed, else ONNX
            Runtime, which takes no bf16 file there. `tensorrt` runs an engine in the product that
            built it, and an `.onnx` in ONNX Runtime's TensorRT provider; `nv-tensorrt-rtx` an
            `.onnx` in NVIDIA's plug-in for it.
        device: cpu, cuda, or cuda:N.
        threads: of the backend; None leaves the choice to it.
        hints: what a checkpoint does not say.
        cache: folder of what runtimes prepared and of models' hashes; None is the user's.

    Raises:
        RunnerError: a backend that is missing, or that cannot run this kind of model; or hints for
            what is no checkpoint.
        OnnxExportError: a file with the manifest of another beside it.
        DitasExportError: a model that cannot be read.
    """
    model = str(model)
    if runtime not in get_args(Runtime):
        raise RunnerError(f"runtime={runtime!r}; choose one of {', '.join(get_args(Runtime))}")
    is_artifact = _is_artifact(Path(model))
    if hints.given and (is_artifact or has_suffix(model, (*PLAN_SUFFIXES, *ONNX_SUFFIXES))):
        raise RunnerError(
            f"{model} carries its own configuration; leave out {', '.join(hints.given)}"
        )
    cache = Path(cache) if cache else default_cache()
    hash_file = sha256_of_file if cache is None else Cache.at(cache).hash_of_file
    if has_suffix(model, PLAN_SUFFIXES):
        return _open_plan(Path(model), runtime, device, threads, cache, hash_file)
    if has_suffix(model, ONNX_SUFFIXES):
        path = Path(model)
        open_file = _file_opener(path, runtime, device, threads, cache)
        sha256 = sha256_of_onnx(path, hash_file=hash_file)
        require_own_manifest(path, sha256)
        slow = device.startswith("cuda") and runtime not in GPU_PROVIDERS
        return OpenedModel(
            runner=open_file(sha256),
            source=str(path),
            sha256=sha256,
            notes=(CUDA_RUNS_FLOAT,) if slow else (),
        )
    if runtime not in ("auto", "torch"):
        given = f"CHECKPOINT --artifact {model}" if is_artifact else model
        raise RunnerError(
            f"{runtime} runs exported files, not {model}; run: ditas-export --model {given} "
            f"out.onnx, and sample from out.onnx"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    if is_artifact:
        return _open_artifact(Path(model), device, hash_file)
    loaded = load_model(model, hints)
    return OpenedModel(
        runner=TorchRunner(loaded.model, device=device),
        source=loaded.source,
        sha256=loaded.identity.fingerprint,
        notes=loaded.notes,
        vae=loaded.vae,
    )


def _open_plan(
    path: Path,
    runtime: Runtime,
    device: str,
    threads: int | None,
    cache: Path | None,
    hash_file: Callable[[Path], str],
) -> OpenedModel:
    """Open an engine in the product that built it."""
    if runtime not in ("auto", "tensorrt"):
        raise RunnerError(f"{runtime} does not run the engine {path}; use --runtime tensorrt")
    if not device.startswith("cuda"):
        raise RunnerError(f"{path} is an engine, and runs on GPUs; use --device cuda")
    if threads is not None:
        raise RunnerError("an engine has no threads to set; leave out --threads")
    runner = TensorRTRunner(path, device=f"cuda:{device_index(device)}", cache=cache)
    return OpenedModel(runner=runner, source=str(path), sha256=hash_file(path))


def _is_artifact(path: Path) -> bool:
    """Tell whether a file is a quantized model, by its header; whoever reads it checks the rest."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith(ARTIFACT_KIND) for key in file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _open_artifact(path: Path, device: str, hash_file: Callable[[Path], str]) -> OpenedModel:
    """Open a quantized model in PyTorch, with the activation ranges it was made for.

    Its float side is float32 on a CPU and float16 on a GPU, as in the files that are exported for
    them. A model of float activations has no integer products, and runs fake-quantized.
    """
    quantized = QuantizedModel.load(path)
    ranges = quantized.settings["ranges"]
    folded = fold_smoothing(
        quantized, dtype=torch.float16 if device.startswith("cuda") else torch.float32
    )
    runner = (
        Int8Runner(folded, ranges=ranges, device=device)
        if quantized.activation_bits == 8
        else TorchRunner(fake_quantized_model(folded, ranges=ranges), device=device)
    )
    return OpenedModel(runner=runner, source=str(path), sha256=hash_file(path))


def _file_opener(
    path: Path, runtime: Runtime, device: str, threads: int | None, cache: Path | None
) -> Callable[[str], Runner]:
    """Return what opens an exported file in a backend, given the file's hash."""
    if runtime == "torch":
        raise RunnerError(
            f"PyTorch does not run {path}; pass the checkpoint, or the quantized model that "
            f"ditas-export --save-artifact writes"
        )
    on_gpu = device.startswith("cuda")
    if runtime == "openvino" and on_gpu:
        raise RunnerError("the OpenVINO runner is for CPUs; use --device cpu, or onnxruntime")
    has_openvino = importlib.util.find_spec("openvino") is not None
    if runtime == "openvino" and not has_openvino:
        raise RunnerError(f"openvino is not installed; {INSTALL}")
    if runtime == "openvino" or (runtime == "auto" and not on_gpu and has_openvino):
        return lambda sha256: OpenVINORunner(path, threads=threads, cache=cache, sha256=sha256)
    if runtime in GPU_PROVIDERS and not on_gpu:
        raise RunnerError("TensorRT runs on GPUs; use --device cuda")
    if not (on_gpu or onnxruntime_takes(path)):
        raise RunnerError(
            f"{path} is bf16, and onnxruntime has no bfloat16 kernels on CPUs; use --runtime "
            f"openvino ({INSTALL}), or an engine of it: ditas-build {path}"
        )
    if runtime in GPU_PROVIDERS:
        require_form_for_tensorrt(path)
    providers = GPU_PROVIDERS.get(runtime, CUDA if on_gpu else CPU)
    return lambda sha256: OnnxRuntimeRunner(
        path,
        threads=threads,
        providers=providers,
        device_id=device_index(device),
        cache=cache,
        sha256=sha256,
    )


def onnxruntime_takes(path: Path) -> bool:
    """Return whether ONNX Runtime has CPU kernels for an exported file's float type."""
    return read_form(path).float_type != "bf16"


def device_index(device: str) -> int:
    """Return N of `cuda:N`, 0 without one.

    Raises:
        RunnerError: no such device.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise RunnerError(f"device={device!r}; choose cpu, cuda or cuda:N")
    return int(index or 0)
