"""A folder of models that runtimes have optimized or compiled once, found again by hash."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ditas_export.errors import RunnerError

MODEL_NAME = "model.onnx"
"""The optimized model's name inside its entry; its tensors may lie beside it."""


def default_cache() -> Path:
    """Return the user's cache folder: $DITAS_EXPORT_CACHE, or the system's place for caches."""
    if chosen := os.environ.get("DITAS_EXPORT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditas-export"


def optimized_model(
    sha256: str, cache: Path, facts: Mapping[str, object], optimize: Callable[[Path], None]
) -> Path:
    """Return the optimized form of a file, made now or found from an earlier run.

    Args:
        sha256: of the file, its external data included.
        cache: folder of entries, created if need be; anything in it can be deleted at any time.
        facts: what the optimized form depends on beside the file: versions, options, processor.
        optimize: writes the optimized model to the path that it is given.

    Raises:
        RunnerError: the folder cannot be written.
        Exception: what `optimize` raises; nothing is left behind.
    """
    entry = _entry(sha256, cache, facts)
    if (entry / MODEL_NAME).is_file():
        return entry / MODEL_NAME
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        optimize(staged / MODEL_NAME)
        if not (entry / MODEL_NAME).is_file():  # another process may have been first
            staged.rename(entry)
    except OSError as error:
        if not (entry / MODEL_NAME).is_file():
            raise RunnerError(
                f"could not keep the optimized model in {cache}: {error.strerror}; "
                f"set DITAS_EXPORT_CACHE to another folder"
            ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return entry / MODEL_NAME


def compiled_folder(sha256: str, cache: Path, facts: Mapping[str, object]) -> Path:
    """Return the folder in which a runtime itself keeps what it compiled of a file.

    Args:
        sha256: of the file, its external data included.
        cache: folder of entries, created if need be; anything in it can be deleted at any time.
        facts: what the compiled form depends on and the runtime does not look at.

    Raises:
        RunnerError: the folder cannot be written.
    """
    entry = _entry(sha256, cache, facts)
    with _writing(cache):
        entry.mkdir(parents=True, exist_ok=True)
    return entry


def _entry(sha256: str, cache: Path, facts: Mapping[str, object]) -> Path:
    """Return the place of what was made of a file under these facts."""
    key = hashlib.sha256(json.dumps([sha256, facts], sort_keys=True).encode()).hexdigest()
    return cache / key[:32]


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Say what to do where the cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunnerError(
            f"cannot keep the optimized model in {cache} ({error.strerror}); "
            f"set DITAS_EXPORT_CACHE to a folder that can be written"
        ) from error


def machine_facts() -> list[str]:
    """Return what compiled kernels depend on: architecture and instruction sets."""
    return [platform.machine(), platform.processor(), _processor_flags()]


def _processor_flags() -> str:
    """Return what decides which kernels fit the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
