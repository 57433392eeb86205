"""An exported file in OpenVINO, on the CPU, in float32 around its INT8 products."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np

from ditas_export.errors import RunnerError
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.paths import StrPath
from ditas_export.runtime.cache import Cache, Entry, Key
from ditas_export.runtime.exported_file import ExportedFileRunner
from ditas_export.runtime.inputs import Feed
from ditas_export.telemetry import import_openvino

INSTALL = 'run: pip install "ditas-export[openvino]"'

FLOAT_ACTIVATIONS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Setting under which weight-only linears keep float activations, as in the other backends; by
itself OpenVINO rounds them to 8 bits."""

_COMPILED_FORMAT = 3
"""Of what is compiled; raised with every change of the graph that OpenVINO is given."""

_BLOB_NAME = "model.blob"
"""The compiled model's name in its cache entry."""

_INSTRUCTIONS = "ONEDNN_MAX_CPU_ISA"
"""Environment variable that keeps OpenVINO's kernels to fewer instructions than there are."""

_PRODUCTS = ("FullyConnected", "MatMul")
"""OpenVINO's kernels of matrix products."""

_FLOATS = {"f32", "f16", "bf16"}
"""Types as OpenVINO names them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Compiled:
    """A compiled model, and the memory that it lives in where it was mapped from a file."""

    model: Any
    mapped: Any = None


class OpenVINORunner(ExportedFileRunner):
    """Runs an exported file until it is closed.

    OpenVINO may compute in BF16 where the processor can; float32 is asked for here, so that the
    results are those of the other backends. A file in bfloat16 keeps its type all the same, where
    the processor has it; `description` tells what was compiled.

    A portable file runs in the form of `--target onnxruntime`, which OpenVINO runs faster too.

    Args:
        path: written by `export_onnx` or `export_reference`.
        as_is: run the file's own graph all the same.
        threads: of inference; None leaves the choice to OpenVINO.
        precision: to ask for in the float parts, "f32", or "bf16" for speed.
        cache: folder that keeps the compiled model, so that the next start need not compile; None
            compiles at every start.
        sha256: `sha256_of_onnx(path)` where the caller has it; the cache finds files by it.

    Raises:
        RunnerError: OpenVINO is missing or refuses the file.
        OnnxExportError: the file does not say which model it holds.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        as_is: bool = False,
        threads: int | None = None,
        precision: str = "f32",
        cache: StrPath | None = None,
        sha256: str | None = None,
    ) -> None:
        path = Path(path)
        super().__init__(path)
        numeric = {"INFERENCE_PRECISION_HINT": precision} | FLOAT_ACTIVATIONS
        settings: dict[str, Any] = dict(numeric)
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._version = str(_openvino().__version__)
        self._entry = (
            None
            if cache is None
            else _compiled(path, Cache.at(cache), numeric, sha256, as_is=as_is)
        )
        self._backend = (
            _Compiled(model=_compile(path, settings, as_is=as_is))
            if self._entry is None
            else _import(self._entry, settings, source=path)
        )
        self._products = _float_products(self._backend.model)
        self._idle: SimpleQueue[Any] = SimpleQueue()

    @property
    def description(self) -> str:
        """Backend, version, device, and the types of the float products."""
        return f"openvino {self._version.partition('-')[0]} ({', '.join(['CPU', *self._products])})"

    def _run(self, session: _Compiled, feed: Feed) -> np.ndarray[Any, Any]:
        """Run an inference request of this call alone, one that is idle or a new one.

        Its output buffer is used again, so it is copied before the request is given back.
        """
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = session.model.create_infer_request()
        (output,) = request.infer(feed).values()
        copied = np.array(output)
        self._idle.put(request)
        return copied

    def close(self) -> None:
        """Let go of the compiled model and its requests, then of its file in the cache."""
        super().close()
        self._idle = SimpleQueue()
        if self._entry is not None:
            self._entry.close()


def _compiled(
    path: Path, cache: Cache, numeric: Mapping[str, str], sha256: str | None, *, as_is: bool
) -> Entry | None:
    """Return the cache's entry of a file, made now if need be; None if the cache takes nothing.

    How many threads compute is for whoever opens it to say.
    """
    key = Key(
        kind="openvino",
        source=path,
        sha256=sha256 or sha256_of_onnx(path, hash_file=cache.hash_of_file),
        facts={
            "format": _COMPILED_FORMAT,
            "as_is": as_is,
            "openvino": _openvino().__version__,
            "settings": dict(numeric),
            "instructions": os.environ.get(_INSTRUCTIONS, ""),
        },
        hash_source=lambda: sha256_of_onnx(path),
    )

    def make(folder: Path) -> None:
        compiled = _compile(path, numeric, as_is=as_is)
        (folder / _BLOB_NAME).write_bytes(compiled.export_model().getbuffer())

    return cache.entry(key, make)


def _compile(path: Path, settings: Mapping[str, Any], *, as_is: bool) -> Any:
    """Return the compiled model of a file."""
    from ditas_export.runtime.fastest_form import fastest_file  # seconds, if nothing is kept

    with fastest_file(path, as_is=as_is) as file, _refusals(path):
        return _openvino().Core().compile_model(str(file), "CPU", dict(settings))


def _import(entry: Entry, settings: Mapping[str, Any], *, source: Path) -> _Compiled:
    """Return the compiled model of an entry, mapped."""
    openvino = _openvino()
    # Copy on write: OpenVINO takes no memory that cannot be written, and writes to none.
    mapped = np.memmap(entry.path / _BLOB_NAME, dtype=np.uint8, mode="c")
    tensor = openvino.Tensor(mapped, shared_memory=True)
    try:
        with _refusals(source):
            model = openvino.Core().import_model(tensor, "CPU", dict(settings))
        return _Compiled(model=model, mapped=tensor)
    except RunnerError as error:
        entry.close()
        raise RunnerError(
            f"{error}; it was compiled in {entry.path}: ditas-cache verify removes what is damaged"
        ) from error


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Say in one line that OpenVINO does not take a file, and why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        version = _openvino().__version__
        raise RunnerError(f"openvino {version} refuses {path}: {reason}") from error


def _float_products(model: Any) -> list[str]:
    """Return the float types in which a compiled model multiplies matrices: f32, bf16.

    The precision that was asked for is a hint: the file and the processor have a say.
    """
    kernels = [node.get_rt_info() for node in model.get_runtime_model().get_ops()]
    types = {
        kernel["runtimePrecision"].astype(str)
        for kernel in kernels
        if kernel["layerType"].astype(str) in _PRODUCTS
    }
    return sorted(types & _FLOATS)


def _openvino() -> ModuleType:
    """Import OpenVINO, or say how to install it."""
    try:
        return import_openvino()
    except ImportError as error:
        raise RunnerError(f"openvino is not installed; {INSTALL}") from error
