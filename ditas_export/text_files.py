"""Texts that others wrote: UTF-8, JSON and YAML, bounded in bytes and in nesting.

Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

LARGEST_JSON = 64 * 2**20
"""Bytes of a JSON text: an index of shards, a manifest."""

LARGEST_YAML = 2**20
"""Bytes of a file of options."""

DEEPEST = 32
"""Values within values."""

_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq")
)
"""Kinds of values in a file of options."""


class TextError(ValueError):
    """A text that cannot be read; the message says in one line what it is."""


def read_text(path: Path, *, most: int = LARGEST_JSON) -> str:
    """Return a file's text.

    Raises:
        OSError: no such file.
        TextError: it is no plain file, is longer than `most` bytes, or is not UTF-8.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise TextError("it is a device, a pipe or a socket; name a plain file")
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise TextError(f"it is longer than the {most:,} bytes that such a file may have")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"it is not UTF-8 text (byte {error.start}: {raw[error.start]:#04x}); save it as UTF-8"
        ) from None


def read_json(path: Path, *, most: int = LARGEST_JSON) -> Any:
    """Return the value in a JSON file of `most` bytes at most.

    Raises:
        OSError, TextError: see `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, most=most))


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        TextError: no JSON, a number of more digits than Python takes, or values too deep in others.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise TextError(f"its JSON is nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise TextError(f"it is no JSON: {' '.join(str(error).split())}") from None
    if _depth(value) > DEEPEST:
        raise TextError(f"its JSON is nested deeper than {DEEPEST} levels")
    return value


def parse_options(text: str) -> dict[str, Any]:
    """Return the `option: value` lines of a YAML text.

    Values are numbers, texts, true or false, nothing, or lists of these.

    Raises:
        TextError: no YAML, no such lines, an option twice, an alias, or a value of another kind.
    """
    try:
        _require_shallow(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise TextError(f"it is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise TextError("expected option: value lines")
    found: dict[str, Any] = {}
    for key, value in root.value:
        name = str(getattr(key, "value", key))[:80]
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _PLAIN_TAGS:
            raise TextError(f"{name!r} is no name of an option")
        if name in found:
            raise TextError(f"{name!r} is there twice; leave out one")
        found[name] = _plain_value(name, value)
    return found


def _require_shallow(text: str) -> None:
    """Refuse what grows or recurses when it is put together: aliases, and values in values."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise TextError(f"*{str(event.anchor)[:40]} is an alias; write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise TextError(f"its YAML is nested deeper than {DEEPEST} levels")


def _plain_value(name: str, node: yaml.Node) -> Any:
    """Return the value of a node of a plain kind."""
    nodes = [node, *node.value] if isinstance(node, yaml.SequenceNode) else [node]
    if odd := [each for each in nodes if each.tag not in _PLAIN_TAGS]:
        kind = odd[0].tag.rpartition(":")[2][:40]
        raise TextError(f"{name} is of kind {kind!r}; give a number, a text, or a list of them")
    if any(isinstance(each, yaml.SequenceNode) for each in nodes[1:]):
        raise TextError(f"{name} is a list within a list; give numbers or texts")
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())[:120]
        raise TextError(f"{name} has a value that cannot be read ({reason})") from None


def _depth(value: Any) -> int:
    """Return how deep values lie in others, DEEPEST + 1 at most."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        depth += 1
        level = [inner for each in level for inner in _inner(each)]
    return depth


def _inner(value: Any) -> Iterator[Any]:
    """Yield the values in a value."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
