"""Models through Polygraphy's runners, opened once and fed step by step; errors as one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy import config as polygraphy_config  # type: ignore[import-untyped]
from polygraphy.backend.onnxrt import OnnxrtRunner  # type: ignore[import-untyped]
from polygraphy.exception import PolygraphyException  # type: ignore[import-untyped]
from polygraphy.json import save_json  # type: ignore[import-untyped]
from polygraphy.logger import G_LOGGER  # type: ignore[import-untyped]

from ditas_export.artifact_files import atomic_path
from ditas_export.engine.make import current_gpu
from ditas_export.engine.metadata import metadata_of, require_matching
from ditas_export.engine.products import PRODUCTS, RTX
from ditas_export.errors import DitasExportError, RunnerError
from ditas_export.evaluation.linear_outputs import with_outputs
from ditas_export.runtime.inputs import Feed
from ditas_export.runtime.onnxruntime_runner import (
    ACCURATE_WEIGHT_ONLY,
    CPU,
    open_session,
    session_options,
)
from ditas_export.runtime.tensorrt_plan import load_product
from ditas_export.text_files import read_json

Outputs = Mapping[str, np.ndarray[Any, Any]]
"""Name of an output -> its value."""

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
"""Session entry: where the external data of a model in memory lie."""


IDLE_THREADS_REST = {"session.intra_op.allow_spinning": "0"}
"""Session entry for two sessions in turn: threads of the one that waits leave the cores alone."""


@contextmanager
def opened(runner: Any) -> Iterator[Callable[[Feed], Outputs]]:
    """Open a Polygraphy runner, and yield what feeds it.

    What it gives may lie in memory that the next call writes to.

    Raises:
        RunnerError: the runner cannot be opened, does not take a feed, or fails on it.
    """

    def outputs_of(feed: Feed) -> Outputs:
        with _one_line_errors():
            return dict(runner.infer(feed).items())

    with _one_line_errors():
        runner.activate()
    try:
        yield outputs_of
    finally:
        with _one_line_errors():
            runner.deactivate()


def onnx_runner(path: Path, values: Sequence[str] = ()) -> Any:
    """Return a Polygraphy runner of an exported file in ONNX Runtime, as it is verified.

    Args:
        path: the file, its external data beside it as plain files.
        values: what it is to give beside its own outputs; they change none of these.
    """
    entries = {**ACCURATE_WEIGHT_ONLY, **IDLE_THREADS_REST}
    if not values:
        options = session_options(None, entries)
        return OnnxrtRunner(lambda: open_session(path, options, CPU), name=str(path))
    entries[EXTERNAL_FOLDER] = str(path.parent.resolve())
    options = session_options(None, entries)
    onnxruntime = importlib.import_module("onnxruntime")

    def open_copy() -> Any:  # a session of its own: `open_session` opens files, not bytes
        copy = with_outputs(path, values)
        return onnxruntime.InferenceSession(copy, options, providers=list(CPU))

    return OnnxrtRunner(open_copy, name=str(path))


def plan_runner(plan: Path) -> Any:
    """Return a Polygraphy runner of an engine, with the product that built it.

    Raises:
        EngineError: no metadata beside the plan, a product that is not installed, or a plan of
            another version or GPU.
        RunnerError: a product whose libraries do not load, or no GPU.
    """
    metadata = metadata_of(plan)
    product = PRODUCTS[metadata.product]
    version = str(load_product(product).__version__)
    gpu = current_gpu()
    if gpu is None:
        raise RunnerError(
            f"{plan} runs on an NVIDIA GPU, and PyTorch finds none here; compare its ONNX file"
        )
    require_matching(metadata, plan, product=product.name, version=version, gpu=gpu)
    polygraphy_config.USE_TENSORRT_RTX = product is RTX  # read when the next line imports
    with _one_line_errors():
        backend = importlib.import_module("polygraphy.backend.trt")
    return backend.TrtRunner(backend.EngineFromBytes(plan.read_bytes()), name=str(plan))


def save_inputs(path: Path, feeds: Sequence[Feed]) -> None:
    """Write feeds for `polygraphy run --load-inputs`; atomic.

    Raises:
        ArtifactError: the file cannot be written.
    """
    with _one_line_errors(), atomic_path(path) as partial:
        save_json(list(feeds), str(partial))


_LARGEST_INPUTS = 2**32
"""Bytes of a file of inputs, which are written as text."""


def is_inputs_file(path: Path, names: Iterable[str]) -> bool:
    """Return whether `save_inputs` wrote a file: a list of feeds of these inputs."""
    try:
        found = read_json(path, most=_LARGEST_INPUTS)
    except (OSError, ValueError):
        return False
    wanted = set(names)
    feeds = found if isinstance(found, list) else []
    return bool(feeds) and all(isinstance(feed, dict) and set(feed) == wanted for feed in feeds)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Keep Polygraphy's log off the screen; its exceptions and its backends' become one line."""
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    except DitasExportError:
        raise
    except Exception as error:  # onnxruntime's and TensorRT's exceptions share no base but this
        reason = " ".join(str(error).split()) or type(error).__name__
        who = "Polygraphy" if isinstance(error, PolygraphyException) else type(error).__name__
        raise RunnerError(f"{who}: {reason}") from error
