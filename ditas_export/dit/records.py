"""What a training checkpoint, a file's metadata or a caller says of a model beside its tensors.

Each becomes *facts* (`facts.py`): a field of `DiTConfig` or `Process` -> its value, and where that
stands. Two facts of one field that differ are an error that names both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np
from torch import Tensor

from ditas_export.dit.facts import Fact, facts_of_values, merged
from ditas_export.dit.pickle_machine import Inert
from ditas_export.dit.process import BetaSchedule
from ditas_export.dit.record_entries import READERS
from ditas_export.errors import CheckpointError
from ditas_export.options import CheckpointHints

RECORD_PARTS = {
    "args", "config", "cfg", "conf", "hparams", "hyper_parameters", "model_args",
    "model_kwargs", "model_config", "options",
}  # fmt: skip
"""Parts of a training checkpoint that say how it was trained."""

NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
"""Objects of a pickle that are read as a dict, and hold nothing else."""

_INNER_PARTS = {
    "model", "params", "network", "net", "dit", "transformer", "diffusion", "scheduler",
    "noise_scheduler", "model_args", "model_kwargs", "model_params", "init_args", "kwargs",
    "transport",
}  # fmt: skip
"""Parts of those that are looked into."""

_DEPTH = 4


def facts_of_training(content: Mapping[Any, Any], *, where: str) -> dict[str, Fact]:
    """Return what the options in a training checkpoint say.

    Args:
        content: the checkpoint, its options a Namespace, a dict or anything like them.
        where: the file, for messages.

    Raises:
        CheckpointError: something that is not followed, no value of its kind, or two that differ.
    """
    beside = {
        name: plain(value)
        for name, value in content.items()
        if name in READERS and not isinstance(value, Mapping | list | tuple | Tensor)
    }
    facts = facts_of_values(beside, where=where)
    for name in content:
        if name in RECORD_PARTS and isinstance(values := plain(content[name]), Mapping):
            for path, part in _inner(values, (str(name),)):
                found = facts_of_values(part, where=where, path=".".join(path) + ".")
                facts = merged(facts, found, where=where)
    return facts


def facts_of_metadata(metadata: Mapping[str, str], *, where: str) -> dict[str, Fact]:
    """Return what safetensors metadata say: plain keys, the fields' names, values as JSON.

    Raises:
        CheckpointError: see `facts_of_training`.
    """
    values = {name: _json_or_text(text) for name, text in metadata.items() if name in READERS}
    return facts_of_values(values, where=where, path="metadata ")


def facts_of_hints(hints: CheckpointHints) -> dict[str, Fact]:
    """Return what a caller says, each under the name of its option.

    Raises:
        CheckpointError: an impossible value.
    """
    facts = {}
    if hints.num_heads is not None:
        if hints.num_heads < 1:
            raise CheckpointError(f"--num-heads {hints.num_heads}: a DiT has at least one head")
        facts["num_heads"] = Fact(hints.num_heads, "--num-heads")
    if hints.num_classes is not None:
        if hints.num_classes < 0:
            raise CheckpointError(f"--num-classes {hints.num_classes}; expected 0 or more")
        facts["num_classes"] = Fact(hints.num_classes, "--num-classes")
    if hints.no_null_class:
        facts["null_row"] = Fact(False, "--no-null-class")
    if hints.betas is not None:
        facts |= _facts_of_betas(hints.betas)
    return facts


def _facts_of_betas(text: str) -> dict[str, Fact]:
    """Return the schedule that `--betas NAME[,START,END[,STEPS]]` names."""
    expected = (
        f"--betas {text}; expected NAME[,START,END[,STEPS]], NAME one of "
        f"{', '.join(get_args(BetaSchedule))}, START and END empty for the last"
    )
    if not isinstance(text, str):
        raise CheckpointError(expected)
    name, *rest = (part.strip() for part in text.split(","))
    if name not in get_args(BetaSchedule) or len(rest) not in (0, 2, 3):
        raise CheckpointError(expected)
    try:
        ends = [float(part) for part in rest[:2] if part]
        steps = [int(part) for part in rest[2:]]
    except ValueError:
        raise CheckpointError(expected) from None
    if len(ends) == 1 or not all(map(math.isfinite, ends)):
        raise CheckpointError(expected)
    if name == "squaredcos_cap_v2" and ends:
        raise CheckpointError(expected)
    if name == "scaled_linear" and not ends:
        raise CheckpointError(f"--betas {text}: scaled_linear has no usual ends; add START,END")
    values: dict[str, str | float] = {"beta_schedule": name}
    if ends:
        values |= {"beta_start": ends[0], "beta_end": ends[1]}
    if steps:
        values["train_timesteps"] = steps[0]
    return {field: Fact(value, "--betas") for field, value in values.items()}


def plain(value: Any, depth: int = 0) -> Any:
    """Return what a pickle's object says as plain values, the object itself where it says nothing.

    Namespaces, dataclasses and OmegaConf's containers become dicts, NumPy's numbers numbers, paths
    text.
    """
    if depth > 2 * _DEPTH:
        return None
    if isinstance(value, Mapping):
        return {name: plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, depth + 1) for inner in value]
    if not isinstance(value, Inert):
        return value
    if value.name.endswith("multiarray.scalar") and len(value.args) == 2:
        return _numpy_scalar(*value.args)
    if value.name.startswith("pathlib."):
        return "/".join(map(str, value.args))
    state = value.state if isinstance(value.state, Mapping) else {}
    for inner in ("_content", "_val"):  # OmegaConf
        if inner in state:
            return plain(state[inner], depth + 1)
    if state or value.entries:
        return {name: plain(inner, depth + 1) for name, inner in {**state, **value.entries}.items()}
    return value


def _numpy_scalar(kind: Any, raw: Any) -> Any:
    """Return a NumPy number of a pickle."""
    code = str(kind.args[0]) if isinstance(kind, Inert) and kind.args else ""
    if not re.fullmatch(r"[iufb][1248]", code) or not isinstance(raw, bytes):
        return None
    return np.frombuffer(raw, dtype=np.dtype(f"<{code}"))[0].item()


def _inner(
    values: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield a record's mappings that may say something of the model, and their paths."""
    yield path, values
    for name, inner in values.items():
        if name in _INNER_PARTS and isinstance(inner, Mapping) and len(path) < _DEPTH:
            yield from _inner(inner, (*path, name))


def _json_or_text(text: str) -> Any:
    """Return a metadata value, which is JSON or plain text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
