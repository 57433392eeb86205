"""What a training checkpoint, a file's metadata or a caller says of a model beside its tensors.

Each becomes *facts* (`facts.py`): a field of `DiTConfig` or `Process` -> its value, and where that
stands. Two facts of one field that differ are an error that names both.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from torch import Tensor

from ditas_export.dit.facts import Fact, facts_of_values, merged
from ditas_export.dit.pickle_machine import Inert
from ditas_export.dit.process import BetaSchedule
from ditas_export.dit.record_entries import READERS
from ditas_export.errors import CheckpointError
from ditas_export.options import CheckpointHints

_NOT_OF_THE_MODEL = re.compile(
    r"optim.*|.*optimizers?|lr.*|.*lr_sched.*|data|.*dataset.*|.*dataloader.*|.*loader|ema.*|vae.*|"
    r"first_stage.*|auto_?encoder.*|.*text.*|token.*|clip.*|t5.*|.*encoder.*|cond_.*|disc.*|"
    r"teacher.*|repa.*|dino.*|eval.*|metrics?|log.*|wandb.*|trainer.*|callbacks?|param_groups|env.*",
    re.IGNORECASE,
)
"""Parts of a checkpoint that are of something else, whatever they say."""

NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
"""Objects of a pickle that are read as a dict, and hold nothing else."""

_MEAN_TYPES = {1: "previous_x", 2: "start_x", 3: "epsilon"}
"""Members of guided-diffusion's enumeration of what a model predicts, by value."""

_DEPTH = 6
_MOST_ENTRIES = 10_000
"""Bounds of what is looked into."""


def facts_of_training(content: Mapping[Any, Any], *, where: str) -> dict[str, Fact]:
    """Return what the options in a training checkpoint say.

    Args:
        content: the checkpoint, its options a Namespace, a dict or anything like them.
        where: the file, for messages.

    Raises:
        CheckpointError: something that is not followed, no value of its kind, or two that differ.
    """
    facts: dict[str, Fact] = {}
    for path, part in _records(content):
        found = facts_of_values(part, where=where, path=".".join(path) + "." if path else "")
        facts = merged(facts, found, where=where)
    return facts


def parts_with_records(content: Mapping[Any, Any]) -> set[str]:
    """Return the outer names of a checkpoint under which something is said that is read."""
    return {
        str(path[0] if path else name)
        for path, part in _records(content)
        for name in part
        if name in READERS
    }


def facts_of_metadata(metadata: Mapping[str, str], *, where: str) -> dict[str, Fact]:
    """Return what safetensors metadata say: plain keys, the fields' names, values as JSON.

    Raises:
        CheckpointError: see `facts_of_training`.
    """
    facts: dict[str, Fact] = {}
    content = {name: _json_or_text(text) for name, text in metadata.items()}
    for path, part in _records(content):
        place = "".join(f"{name}." for name in path)
        found = facts_of_values(part, where=where, path=f"metadata {place}")
        facts = merged(facts, found, where=where)
    return facts


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
    if value.name.endswith("ModelMeanType") and len(value.args) == 1:
        return _MEAN_TYPES.get(value.args[0], value.name)
    state = value.state
    if isinstance(state, tuple) and len(state) == 2:  # of an object with slots
        state = {**(state[0] or {}), **(state[1] or {})}
    state = state if isinstance(state, Mapping) else {}
    for inner in ("_content", "_val", "_fields", "_cfg_dict"):  # OmegaConf, ConfigDict, mmengine
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


def _records(
    content: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield every mapping of plain values that may say something of the model, and its path.

    Weights are no records, nor are parts that by their name are of something else. A name counts
    without what stands before its last dot, dashes as underscores: `model.num-heads`.
    """
    values: dict[str, Any] = {}
    for written, value in itertools.islice(content.items(), _MOST_ENTRIES):
        if not isinstance(written, str) or _is_table(value) or _has_tables(value):
            continue
        name = written.rpartition(".")[2].replace("-", "_")
        if name in READERS or not _NOT_OF_THE_MODEL.fullmatch(name):
            values[name] = _readable(value)
    yield path, {name: value for name, value in values.items() if name in READERS}
    for name, inner in values.items():
        is_other = _NOT_OF_THE_MODEL.fullmatch(name) or len(path) == _DEPTH
        if isinstance(inner, Mapping) and "param_groups" not in inner and not is_other:
            yield from _records(inner, (*path, name))


def _is_table(value: Any) -> bool:
    """Return whether a value is a tensor of more than a number."""
    return isinstance(value, Tensor) and value.ndim > 0


def _has_tables(value: Any) -> bool:
    """Return whether a mapping holds weights itself."""
    return isinstance(value, Mapping) and any(map(_is_table, value.values()))


def _readable(value: Any) -> Any:
    """Return an entry as plain values: JSON in text, and the words of a command line, as dicts."""
    value = plain(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return _json_or_text(value)
    if isinstance(value, list) and any(str(word).startswith("--") for word in value):
        return _of_command_line([str(word) for word in value])
    return value


def _of_command_line(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command line: `--name value`, `--name=value`, `--name` for true."""
    options: dict[str, Any] = {}
    for word, after in itertools.zip_longest(words, words[1:], fillvalue="--"):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            is_flag = not equals and after.startswith("--")
            options[name] = True if is_flag else _json_or_text(value if equals else after)
    return options


def _json_or_text(text: str) -> Any:
    """Return a metadata value, which is JSON or plain text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
