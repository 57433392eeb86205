"""The parts of a checkpoint that may say how its model was trained, wherever they lie.

Every mapping is one, and so is what says as much: the state of an object that a pickle did not
make, JSON text, a list of command-line words. A part of another thing (an optimizer, a dataset, a
text encoder) says nothing of the model, and tensors hold no parts.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditas_export.dit.names import words_of
from ditas_export.dit.pickle_machine import Inert
from ditas_export.text_files import TextError, parse_json

_DEPTH = 10
"""Parts within parts that are looked into."""

_MOST = 10_000
"""Parts of a checkpoint that are looked into, the outer ones first."""

_LONGEST_LIST = 1000
_LONGEST_TEXT = 1_000_000

_NOT_THE_MODEL = {
    "optimizer", "optimizers", "optim", "lr", "sgd", "adam", "warmup", "scaler", "data",
    "dataset", "datasets", "datamodule", "dataloader", "loader", "vae", "autoencoder", "ae",
    "vq", "first", "text", "tokenizer", "encoder", "decoder", "cond", "condition",
    "conditioner", "discriminator", "disc", "logger", "loggers", "logging", "wandb",
    "callback", "callbacks", "clip", "t5", "teacher", "projector", "lpips", "metric",
    "metrics", "eval", "evaluation", "validation", "val", "test", "sampler", "sampling",
    "sample", "inference", "generate", "generation", "classifier", "inception", "fid", "probe",
}  # fmt: skip
"""Words in the names of parts that say something of another thing."""

_NOT_THE_MODEL_S_CLASS = {
    "optimizer", "adam", "sgd", "lr", "autoencoder", "vae", "vq", "tokenizer", "dataset",
    "datamodule", "dataloader", "discriminator", "logger", "callback", "embedder",
}  # fmt: skip
"""Words in the names of classes that say so."""

CLASS_ENTRIES = ("_target_", "target", "class_path", "_class_name")
"""Names under which a part says which class it configures."""

_CONTENTS = ("_content", "_val", "_fields", "_cfg_dict", "__dict__", "_items")
"""Where OmegaConf, ml_collections, mmengine, pydantic and W&B keep what their containers hold."""

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordPart:
    """Entries of one part, their names without dashes and dots."""

    path: Path
    entries: Mapping[str, Any]  # parts within it too
    written: Mapping[str, Path]  # the place of each entry as the checkpoint writes it

    @property
    def prefix(self) -> str:
        """What stands before an entry's name in messages."""
        return "".join(f"{name}." for name in self.path)


def record_parts(content: Mapping[Any, Any]) -> Iterator[RecordPart]:
    """Yield every part that may say something of the model, the outer ones first."""
    waiting: deque[tuple[Path, Any]] = deque([((), content)])
    seen: dict[int, Any] = {}
    while waiting and len(seen) < _MOST:
        path, part = waiting.popleft()
        entries = _entries(opened(part))
        if id(part) in seen or _is_of_another(part, entries):
            continue
        seen[id(part)] = part
        yield from _split(path, entries)
        for name, inner in entries.items():
            names = _split_name(name)
            if len(path) < _DEPTH and _holds_parts(inner) and not _is_foreign(names, path):
                waiting.append(((*path, name), inner))


def opened(value: Any) -> Any:
    """Return what a part holds, one level deep: a mapping or a list; anything else as it is."""
    if isinstance(value, Inert):
        return _opened_object(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and len(value) < _LONGEST_TEXT:
        found = json_or_text(value)
        return found if isinstance(found, Mapping | list) else value
    if isinstance(value, list | tuple) and _are_words(value):
        return _of_words(value)
    return value


def plain(value: Any, depth: int = 0) -> Any:
    """Return an entry as plain values, an object that says nothing as it is.

    NumPy's numbers and tensors of one number become numbers, arrays lists, paths and members of
    enums by name text, and what OmegaConf wraps is unwrapped.
    """
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 and not value.is_meta else value
    if isinstance(value, Inert) and (table := _numpy_table(value)) is not None:
        return table.tolist()
    value = opened(value)
    if isinstance(value, Mapping) and depth < _DEPTH:
        return {name: plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple) and depth < _DEPTH:
        return [plain(inner, depth + 1) for inner in value]
    return value


def table_of(value: Any) -> Tensor | None:
    """Return a table of numbers, a tensor, a NumPy array or a list; None where it is none."""
    if isinstance(value, Inert):
        value = _numpy_table(value)
    if isinstance(value, list | tuple) and all(type(each) is float for each in value):
        value = torch.tensor(value, dtype=torch.float64)
    is_table = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 1
    return value if is_table else None


def json_or_text(text: str) -> Any:
    """Return what text says as JSON, the text itself where it is none."""
    try:
        return parse_json(text)
    except TextError:
        return text


def _entries(part: Any) -> dict[str, Any]:
    """Return what a part holds by name; a list's by number, and nothing that is private."""
    if isinstance(part, list | tuple) and len(part) <= _LONGEST_LIST:
        return {str(number): inner for number, inner in enumerate(part)}
    if not isinstance(part, Mapping):
        return {}
    names = {name: str(name) for name in part}
    return {
        name: part[key]
        for key, name in names.items()
        if not name.startswith("_") or name in CLASS_ENTRIES
    }


def _split(path: Path, entries: Mapping[str, Any]) -> Iterator[RecordPart]:
    """Yield the entries of a part, those with dotted names as of parts within it."""
    found: dict[Path, RecordPart] = {}
    for name, value in entries.items():
        *outer, last = _split_name(name)
        if not outer or not _is_foreign(outer, path):
            here = (*path, *outer)
            part = found.setdefault(here, RecordPart(path=here, entries={}, written={}))
            part.entries[last] = value  # type: ignore[index]
            part.written[last] = (*path, name)  # type: ignore[index]
    yield from found.values()


def _split_name(name: str) -> list[str]:
    """Return the parts of a dotted name, with underscores for dashes."""
    return name.lstrip("-").replace("-", "_").split(".")


def _is_foreign(names: Sequence[str], path: Path) -> bool:
    """Return whether a part's name says that it is of another thing.

    At the top `ema` is the model itself, further in what averages it.
    """
    words = {word for name in names for word in words_of(name)}
    return bool(words & _NOT_THE_MODEL) or (bool(path) and words == {"ema"})


def _is_of_another(part: Any, entries: Mapping[str, Any]) -> bool:
    """Return whether what a part holds says that it is an optimizer or the like."""
    if "param_groups" in entries or {"last_epoch", "base_lrs"} <= entries.keys():
        return True
    classes = [entries.get(name) for name in CLASS_ENTRIES]
    classes.append(part.name if isinstance(part, Inert) else None)
    lasts = (each.rpartition(".")[2] for each in classes if isinstance(each, str))
    return any(set(words_of(last)) & _NOT_THE_MODEL_S_CLASS for last in lasts)


def _holds_parts(value: Any) -> bool:
    """Return whether a value is a part, or a list in which parts are."""
    if not isinstance(value, Mapping | Inert | str | list | tuple):
        return False
    inner = opened(value)
    if isinstance(inner, list | tuple) and len(inner) <= _LONGEST_LIST:
        return any(isinstance(each, Mapping | Inert | list | tuple) for each in inner)
    return isinstance(inner, Mapping)


def _opened_object(value: Inert) -> Any:
    """Return what an object of a pickle says of itself: its state, entries, items or arguments."""
    if value.name.endswith("multiarray.scalar") and len(value.args) == 2:
        return _numpy_scalar(*value.args)
    if value.name.startswith("pathlib."):
        return "/".join(map(str, value.args))
    if value.name == "builtins.getattr" and len(value.args) == 2:  # a member of an enum, by name
        return value.args[1]
    states = value.state if isinstance(value.state, tuple) else (value.state,)
    for inner in _CONTENTS:
        if isinstance(value.state, Mapping) and inner in value.state:
            return opened(value.state[inner])
    found: dict[Any, Any] = {}
    for each in (*value.args, *states, value.entries):
        found |= _dict_of(each)
    if found or value.state is not None:
        return found or value
    if value.items:
        return value.items
    is_text = len(value.args) == 1 and isinstance(value.args[0], str)
    return value.args[0] if is_text else value


def _dict_of(value: Any) -> Mapping[Any, Any]:
    """Return a dict, of a class of its own or not; an empty one of anything else."""
    if isinstance(value, Inert):
        value = value.entries or (value.args[0] if len(value.args) == 1 else None)
    return value if isinstance(value, Mapping) else {}


def _numpy_scalar(kind: Any, raw: Any) -> Any:
    """Return a NumPy number of a pickle."""
    found = _numpy_numbers(kind, raw)
    return None if found is None or found.size != 1 else found[0].item()


def _numpy_table(value: Inert) -> Tensor | None:
    """Return a NumPy array of one dimension of a pickle, of either protocol."""
    state = value.state if isinstance(value.state, tuple) else ()
    if value.name.endswith("multiarray._reconstruct") and len(state) == 5:
        shape, kind, raw = state[1], state[2], state[4]
    elif value.name.endswith("numeric._frombuffer") and len(value.args) == 4:
        raw, kind, shape = value.args[:3]
    else:
        return None
    found = _numpy_numbers(kind, raw)
    return None if found is None or shape != (found.size,) else torch.from_numpy(found.copy())


def _numpy_numbers(kind: Any, raw: Any) -> Any:
    """Return the numbers in a buffer of an element type; None where either is of no kind."""
    code = str(kind.args[0]) if isinstance(kind, Inert) and kind.args else ""
    if not re.fullmatch(r"[iufb][1248]", code) or not isinstance(raw, bytes | bytearray):
        return None
    dtype = np.dtype(f"<{code}")
    return None if len(raw) % dtype.itemsize else np.frombuffer(raw, dtype=dtype)


def _are_words(values: Sequence[Any]) -> bool:
    """Return whether a list is one of command-line words."""
    return (
        len(values) <= _LONGEST_LIST
        and all(isinstance(each, str) for each in values)
        and any(re.match(r"--\w|[\w.]+=", each) for each in values)
    )


def _of_words(words: Sequence[str]) -> dict[str, Any]:
    """Return the options in command-line words, `--name value`, `--name=value` or `name=value`."""
    found: dict[str, list[Any]] = {}
    name = ""
    for word in words:
        told, sign, value = word.partition("=")
        if word.startswith("--") or sign:
            name = told.lstrip("-+")
            found[name] = [_of_word(value)] if sign else []
        elif name:
            found[name].append(_of_word(word))
    return {
        name: values[0] if len(values) == 1 else values or True for name, values in found.items()
    }


def _of_word(word: str) -> Any:
    """Return the value of a command-line word, Python's names for JSON's allowed."""
    return json_or_text({"True": "true", "False": "false", "None": "null"}.get(word, word))
