"""Tensors out of files: safetensors and PyTorch pickles, memory-mapped, never running code."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditas_export.errors import CheckpointError

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_SUFFIX = ".index.json"

_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What torch's reader raises on damaged files, as seen on truncated and random bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorFile:
    """What a checkpoint file holds."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    part: str = ""  # "ema" or "model" of a training checkpoint


def read_tensor_file(path: Path) -> TensorFile:
    """Read one checkpoint file, chosen by its suffix; `.index.json` reads the shards it lists.

    Raises:
        CheckpointError: no such file, another kind of file, a damaged one, or a pickle with code.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    kinds = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
    raise CheckpointError(
        f"{path} is no checkpoint by its name: expected a file ending in {kinds}, or a folder "
        f"written by diffusers"
    )


def _read_safetensors(path: Path) -> TensorFile:
    """Map a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return TensorFile(tensors=tensors, metadata=file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or was damaged or cut short ({error})"
        ) from error


def _read_shards(path: Path) -> TensorFile:
    """Read the shards that an index lists, from the index's own folder."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path} lists no shards: it has no 'weight_map'")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        tensors.update(read_tensor_file(path.parent / Path(name).name).tensors)
    return TensorFile(tensors=tensors)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: no such file, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _read_pickle(path: Path) -> TensorFile:
    """Map a `torch.save` file; training checkpoints keep their options in a Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of ends in an error, or is harmless
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except _UNREADABLE as error:
        raise CheckpointError(_why_unreadable(path, error)) from error
    return _state_dict(path, content)


def _why_unreadable(path: Path, error: Exception) -> str:
    """Return one line for what torch says in many."""
    if code := re.search(r"(?:GLOBAL|global) (\w+(?:\.\w+)+)", str(error)):
        return (
            f"{path} is a pickle that asks to run code ({code[1]}); it was not run. Expected "
            f"tensors only: save the state dict alone, best as safetensors"
        )
    if isinstance(error, OSError):
        return f"cannot read {path}: {error.strerror or error}"
    return f"{path} is no PyTorch checkpoint: damaged, cut short, or not written by torch.save"


def _state_dict(path: Path, content: object) -> TensorFile:
    """Return the state dict inside a pickle: the averaged weights, the raw ones, or all of it."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict")
    for part in ("ema", "model"):
        if isinstance(content.get(part), dict):
            return TensorFile(tensors=_only_tensors(path, content[part]), part=part)
    return TensorFile(tensors=_only_tensors(path, content))


def _only_tensors(path: Path, state: Mapping[object, object]) -> dict[str, Tensor]:
    """Refuse a state dict that holds anything but named tensors."""
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if odd := [str(name) for name in state if name not in tensors]:
        raise CheckpointError(
            f"{path} is no state dict: {abbreviated(odd)} hold no tensor; expected 'ema', 'model' "
            f"or the parameters themselves"
        )
    return tensors


def abbreviated(names: list[str], *, shown: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
