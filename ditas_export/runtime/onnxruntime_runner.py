"""An exported file in ONNX Runtime, and the kernels that it really runs there."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from ditas_export.errors import RunnerError
from ditas_export.onnx_export.external_data import bytes_of, sha256_of_onnx
from ditas_export.onnx_export.interface import OUTPUT_PART
from ditas_export.paths import StrPath
from ditas_export.runtime.cache import Cache, Entry, Key
from ditas_export.runtime.exported_file import ExportedFileRunner
from ditas_export.runtime.inputs import Feed
from ditas_export.runtime.rtx_provider import NAME as RTX_PROVIDER
from ditas_export.runtime.rtx_provider import rtx_device
from ditas_export.runtime.tensorrt_providers import (
    BATCH,
    TENSORRT_PROVIDER,
    builder_facts,
    provider_options,
)
from ditas_export.temporary_files import temporary_folder

CPU = ("CPUExecutionProvider",)
CUDA = ("CUDAExecutionProvider", *CPU)
TENSORRT = (TENSORRT_PROVIDER, *CUDA)
TENSORRT_RTX = (RTX_PROVIDER, *CPU)

GPU_BUILDERS = (TENSORRT_PROVIDER, RTX_PROVIDER)
"""Providers that build an engine of a file before they run it."""

ACCURATE_WEIGHT_ONLY = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Session entry under which weight-only linears keep float activations, as every runner has it; in
a session as it is they are rounded to 8 bits."""

BARE_SESSION = {"session.qdq_matmulnbits_accuracy_level": "4"}
"""The same entry as in a session that is told nothing."""

_KEEP_PACKED = {"session.save_external_prepacked_constant_initializers": "1"}
"""Session entry under which an optimized model is written with its weights packed for the kernels
of this processor, as later sessions map them into memory. They are beside the unpacked weights,
which nothing reads then: twice the room on disk, half of it in memory."""

_PACKED = "prepacked"
"""How the external data entries of packed weights begin: "prepacked_0", whose value is
"<operator>+<hash>|<offset>;<length>;<more>", the part from "|" once for each of its blobs."""

_PACKED_ALIGNMENT = 64
"""Bytes that ONNX Runtime's allocator aligns packed weights to, as their kernels rely on. It writes
small ones anywhere, and crashes on them (onnxruntime 1.31.1)."""

_SLOWER_WHEN_FUSED = "SkipLayerNormFusion"
"""Its kernel on CPUs takes six times as long as the Add and the LayerNormalization it is made of
(1.3 ms against 0.2 ms for 512 tokens of width 1152; onnxruntime 1.31.1)."""

_PREPARED_FORMAT = 3
"""Of what `_prepare` writes; raised with every change of it, so that nothing earlier is found."""

_MODEL_NAME = "model.onnx"
"""The prepared model's name in its cache entry; its tensors lie beside it."""

_PRODUCTS = ("MatMul", "QLinearMatMul", "Gemm", "FusedMatMul")


class OnnxRuntimeRunner(ExportedFileRunner):
    """Runs an exported file; the session lives until the runner is closed.

    On the CPU a portable file runs in the form of `--target onnxruntime`, written from the same
    integers.

    Args:
        path: written by `export_onnx` or `export_reference`.
        as_is: run the file's own graph all the same, as a session of its own would.
        threads: of one operator; None leaves the choice to ONNX Runtime.
        providers: execution providers, in order of preference.
        device_id: GPU of the providers that have one.
        session_entries: session configuration entries over `ACCURATE_WEIGHT_ONLY`.
        cache: folder that keeps the optimized model of the CPU provider, or the engine of
            TensorRT's, so that the next start need not make it; None makes it at every start.
        sha256: `sha256_of_onnx(path)` where the caller has it; the cache finds files by it.

    Raises:
        RunnerError: ONNX Runtime is missing, has no such provider, or refuses the file.
        OnnxExportError: the file does not say which model it holds.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        as_is: bool = False,
        threads: int | None = None,
        providers: Sequence[str] = CPU,
        device_id: int = 0,
        session_entries: Mapping[str, str] | None = None,
        cache: StrPath | None = None,
        sha256: str | None = None,
    ) -> None:
        path = Path(path)
        super().__init__(path)
        entries = ACCURATE_WEIGHT_ONLY | dict(session_entries or {})
        self._kernels: Counter[str] | None = None
        self._entry: Entry | None = None
        if cache is not None and tuple(providers) == CPU:
            self._entry = _prepared(path, Cache.at(cache), entries, sha256, as_is=as_is)
        if cache is not None and providers[0] in GPU_BUILDERS:
            self._entry = _engines(path, Cache.at(cache), providers, device_id, sha256)
        folder = None if self._entry is None else self._entry.path
        own_options = provider_options(providers[0], self._config, folder)
        self._most_rows = BATCH.largest if own_options else None
        options = session_options(threads, entries)
        if self._entry is not None and tuple(providers) == CPU:
            self._backend = _open_prepared(self._entry, options, source=path)
            with contextlib.suppress(OSError):  # the cache was deleted meanwhile; it runs on
                self._kernels = Counter(_product_kernels(self._entry.path / _MODEL_NAME).values())
        else:
            from ditas_export.runtime.fastest_form import (
                fastest_file,  # seconds, if nothing is kept
            )

            with fastest_file(path, as_is=as_is or tuple(providers) != CPU) as file:
                self._backend = open_session(
                    file, options, providers, device_id, source=path, own_options=own_options
                )
        self._providers = ", ".join(self._backend.get_providers())

    @property
    def description(self) -> str:
        """Backend, version, execution providers, and the kernels of products where known."""
        kernels = "".join(f"; {count} {kind}" for kind, count in (self._kernels or {}).items())
        return f"onnxruntime {_onnxruntime().__version__} ({self._providers}{kernels})"

    def close(self) -> None:
        """Free the session, then let go of its files in the cache."""
        super().close()
        if self._entry is not None:
            self._entry.close()

    def _run(self, session: Any, feed: Feed) -> np.ndarray[Any, Any]:
        """Run the session, which takes several threads."""
        rows = len(next(iter(feed.values())))
        if self._most_rows is not None and rows > self._most_rows:
            raise RunnerError(
                f"a batch of {rows} rows; {self._providers} is built for 1 to {self._most_rows} "
                f"(guidance doubles the images): make it smaller"
            )
        (output,) = session.run(None, feed)
        return np.asarray(output)


def matmul_kernels(path: StrPath, *, as_is: bool = True) -> dict[str, str]:
    """Return, for every matrix product of a file, the operator that ONNX Runtime's CPU runs.

    Of the file's own form, or of the one that `OnnxRuntimeRunner` runs.

    Loads the file once and reads the optimized graph: "blocks.0.attn.qkv/MatMul" ->
    "MatMulIntegerToFloat" where the INT8 kernel runs, "MatMul" where it fell back to float.

    Raises:
        RunnerError: ONNX Runtime is missing or refuses the file.
        OnnxExportError: external data that cannot be read.
        ArtifactError: the temporary folder cannot take the optimized graph.
    """
    path = Path(path)
    with temporary_folder(room=bytes_of(path)) as folder:
        optimized = folder / "optimized.onnx"
        from ditas_export.runtime.fastest_form import fastest_file

        with fastest_file(path, as_is=as_is) as file:
            _optimize(file, optimized, {}, source=path)
        return _product_kernels(optimized)


def _prepared(
    path: Path,
    cache: Cache,
    session_entries: Mapping[str, str],
    sha256: str | None,
    *,
    as_is: bool,
) -> Entry | None:
    """Return the cache's entry of a file, made now if need be; None if the cache takes nothing."""
    key = Key(
        kind="onnxruntime",
        source=path,
        sha256=sha256 or sha256_of_onnx(path, hash_file=cache.hash_of_file),
        facts={
            "format": _PREPARED_FORMAT,
            "onnxruntime": _onnxruntime().__version__,
            "entries": {**session_entries, **_KEEP_PACKED},
            "as_is": as_is,
        },
        hash_source=lambda: sha256_of_onnx(path),
    )
    return cache.entry(
        key, lambda folder: _prepare(path, folder / _MODEL_NAME, session_entries, as_is=as_is)
    )


def _engines(
    path: Path, cache: Cache, providers: Sequence[str], device_id: int, sha256: str | None
) -> Entry | None:
    """Return a folder of the cache that a provider itself fills with engines, and checks."""
    key = Key(
        kind="engines",
        source=path,
        sha256=sha256 or sha256_of_onnx(path, hash_file=cache.hash_of_file),
        facts={
            "onnxruntime": _onnxruntime().__version__,
            "providers": list(providers),
            **builder_facts(device_id),
        },
        hash_source=lambda: sha256_of_onnx(path),
    )
    return cache.entry(key, lambda _folder: None)


def _open_prepared(entry: Entry, options: Any, *, source: Path) -> Any:
    """Open a session of a prepared model, which is not optimized again."""
    options.graph_optimization_level = _onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return open_session(entry.path / _MODEL_NAME, options, CPU, source=source)
    except RunnerError as error:
        entry.close()
        raise RunnerError(
            f"{error}; it was prepared in {entry.path}: ditas-cache verify removes what is damaged"
        ) from error


def _prepare(path: Path, target: Path, session_entries: Mapping[str, str], *, as_is: bool) -> None:
    """Write what a session of ONNX Runtime's CPU provider opens at once: nothing is left to make.

    INT4 chains are expanded here: ONNX Runtime's constant folding makes the same numbers in four
    times the time. Tensors beside the model are mapped into memory, not read into it.

    Raises:
        RunnerError: tensors that cannot be read, or a file that ONNX Runtime refuses.
        OSError: the folder is full.
    """
    from ditas_export.runtime.fastest_form import write_expanded

    with tempfile.TemporaryDirectory(prefix="expanded-", dir=target.parent) as folder:
        expanded = Path(folder) / target.name
        try:
            write_expanded(path, expanded, as_is=as_is)
        except ValueError as error:  # such as a tensor that does not begin where one may
            reason = str(error).splitlines()[0]
            raise RunnerError(f"the tensors of {path} cannot be read: {reason}") from error
        try:
            _optimize(expanded, target, {**session_entries, **_KEEP_PACKED}, source=path)
        except RunnerError as error:
            if shutil.disk_usage(target.parent).free < path.stat().st_size:  # it does not say so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
    _forget_unaligned_packing(target)


def _forget_unaligned_packing(optimized: Path) -> None:
    """Remove the mention of packed weights that cannot be used where they lie: they are small."""
    model = onnx.load(str(optimized), load_external_data=False)
    for tensor in model.graph.initializer:
        usable = [
            entry
            for entry in tensor.external_data
            if not entry.key.startswith(_PACKED)
            or all(offset % _PACKED_ALIGNMENT == 0 for offset in _packed_offsets(entry.value))
        ]
        del tensor.external_data[:]
        tensor.external_data.extend(usable)
    onnx.save(model, str(optimized))


def _packed_offsets(entry: str) -> list[int]:
    """Return where the blobs of packed weights begin in their file."""
    return [int(blob.partition(";")[0]) for blob in entry.split("|")[1:]]


def _optimize(
    path: Path, target: Path, session_entries: Mapping[str, str], *, source: Path | None = None
) -> None:
    """Write the graph that ONNX Runtime's CPU provider makes of a file.

    Args:
        path: the file.
        target: what to write; its tensors go beside it.
        session_entries: session configuration entries.
        source: the file to name in an error; None names `path`.
    """
    options = session_options(None, session_entries)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{target.stem}.data"
    )
    open_session(path, options, CPU, source=source)


def _product_kernels(optimized: Path) -> dict[str, str]:
    """Return the operator of every matrix product in an optimized graph."""
    graph = onnx.load(str(optimized), load_external_data=False).graph
    return {
        _original_name(node.name): node.op_type
        for node in graph.node
        if node.op_type.startswith(_PRODUCTS)
    }


def _original_name(name: str) -> str:
    """Return the exported node's name, without what the optimizer appended."""
    path, _, rest = name.partition("/")
    if rest.startswith(OUTPUT_PART):
        part, _, rest = rest.partition("/")
        path = f"{path}/{part}"
    return f"{path}/{rest.partition('/')[0]}"


def session_options(threads: int | None, session_entries: Mapping[str, str]) -> Any:
    """Return session options without warnings on the screen and without a fusion that costs."""
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "optimization.disable_specified_optimizers", _SLOWER_WHEN_FUSED
    )
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in session_entries.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    path: Path,
    options: Any,
    providers: Sequence[str],
    device_id: int = 0,
    *,
    source: Path | None = None,
    own_options: Mapping[str, str] | None = None,
) -> Any:
    """Open a session, or say why ONNX Runtime would not have `source`, `path` where it is None.

    `own_options` are those of the first provider, beside its device.
    """
    own: dict[str, Any] = dict(own_options or {})
    runtime = _onnxruntime()
    placed = None
    if RTX_PROVIDER in providers:  # what a session does not give to its devices, it runs on the CPU
        options.add_provider_for_devices([rtx_device(runtime, device_id)], own)
    else:
        _require_available(runtime, providers)
        placed = [
            name
            if name in CPU
            else (name, {"device_id": device_id, **(own if name == providers[0] else {})})
            for name in providers
        ]
    try:
        session = runtime.InferenceSession(str(path), options, providers=placed)
    except Exception as error:  # onnxruntime's exceptions share no base but this
        reason = str(error).strip().splitlines()[0]
        raise RunnerError(
            f"onnxruntime {runtime.__version__} refuses {source or path}: {reason}"
        ) from error
    if providers[0] not in session.get_providers():
        raise RunnerError(
            f"onnxruntime {runtime.__version__} has {providers[0]} but could not start it on this "
            f"machine; check the GPU driver and the CUDA libraries, or use --device cpu"
        )
    return session


def _require_available(runtime: ModuleType, providers: Sequence[str]) -> None:
    """Refuse providers that this build of ONNX Runtime does not have."""
    known = runtime.get_available_providers()
    if absent := [name for name in providers if name not in known]:
        raise RunnerError(
            f"this onnxruntime has no {', '.join(absent)}; it has {', '.join(known)}; for a GPU: "
            f"pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )


def _onnxruntime() -> ModuleType:
    """Import ONNX Runtime, or say how to install it."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise RunnerError(
            "onnxruntime is not installed; run: pip install onnxruntime "
            "(or onnxruntime-gpu, never both)"
        ) from error
