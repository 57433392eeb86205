"""A manifest as a report reads it: what is asked for is there, and of its type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ditas_export.errors import ArtifactError
from ditas_export.onnx_export.manifest import MANIFEST_FORMAT, MANIFEST_KIND
from ditas_export.saved_records import shown
from ditas_export.text_files import read_json

Value = TypeVar("Value")


class Facts:
    """A JSON object that others may have written; `where` says in messages which."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, dict):
            raise ArtifactError(f"{where} is {shown(values)}, expected an object; export again")
        self._values: dict[str, Any] = values
        self._where = where

    def part(self, name: str) -> Facts:
        """Return an object within."""
        return Facts(self._values.get(name), f"{self._where}, {name}")

    def items(self) -> list[tuple[str, Any]]:
        """Return all that it holds, in order."""
        return list(self._values.items())

    def parts(self) -> dict[str, Facts]:
        """Return all objects within by name; nothing else may be there."""
        return {name: self.part(name) for name in self._values}

    def text(self, name: str) -> str:
        """Return a text."""
        return self._of(name, str, "a text")

    def flag(self, name: str) -> bool:
        """Return a truth value."""
        return self._of(name, bool, "true or false")

    def number(self, name: str) -> float:
        """Return a finite number."""
        found = self.number_or_none(name)
        if found is None:
            raise self._odd(name, None, "a number")
        return found

    def number_or_none(self, name: str) -> float | None:
        """Return a finite number, None where there is no figure."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise self._odd(name, value, "a number")
        return float(value)

    def text_or_none(self, name: str) -> str | None:
        """Return a text, None where there is none."""
        return None if self._values.get(name) is None else self.text(name)

    def values(self, name: str) -> list[Any]:
        """Return a list."""
        return self._of(name, list, "a list")

    def numbers(self, name: str) -> list[float | None]:
        """Return a list of finite numbers, None for one without a figure; none where it is null."""
        if self._values.get(name) is None:
            return []
        by_index = {str(index): value for index, value in enumerate(self.values(name))}
        listed = Facts(by_index, f"{self._where}, {name}")
        return [listed.number_or_none(index) for index in by_index]

    def objects(self, name: str) -> list[Facts]:
        """Return a list of objects."""
        where = f"{self._where}, {name}"
        return [Facts(value, f"{where} {index}") for index, value in enumerate(self.values(name))]

    def _of(self, name: str, kind: type[Value], words: str) -> Value:
        """Return a value of a type."""
        value = self._values.get(name)
        if not isinstance(value, kind):
            raise self._odd(name, value, words)
        return value

    def _odd(self, name: str, value: object, words: str) -> ArtifactError:
        """Return the error about a value of another type."""
        return ArtifactError(
            f"{self._where}: {name} is {shown(value)}, expected {words}; export again"
        )


def _is_finite(value: float) -> bool:
    """Return whether a number is one that a float holds."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def manifest_facts(path: Path) -> Mapping[str, Any]:
    """Return the manifest of an export.

    Raises:
        ArtifactError: no such file, no JSON, or no manifest of this version.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path} is no readable manifest: {reason}") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind != MANIFEST_FORMAT:
        is_other = str(kind).startswith(f"{MANIFEST_KIND} ")
        raise ArtifactError(
            f"{path} is a {kind}, and this version of ditas-export reads {MANIFEST_FORMAT}; export "
            f"again"
            if is_other
            else f"{path} is no manifest; name the out.json that ditas-export wrote beside out.onnx"
        )
    assert isinstance(found, dict)  # it has a format
    return found
