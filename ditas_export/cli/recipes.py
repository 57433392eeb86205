"""Options from YAML files: calibration recipes and build profiles, one's own or bundled."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ditas_export.errors import CalibrationError, DitasExportError, EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One kind of option file."""

    name: str
    package_folder: str  # in the wheel
    source_folder: str  # in a source checkout
    error: type[DitasExportError]


_RECIPE = _Kind(
    name="recipe", package_folder="recipes", source_folder="calib", error=CalibrationError
)
_PROFILE = _Kind(
    name="profile", package_folder="profiles", source_folder="engines", error=EngineError
)


def read_recipe(name: str, allowed: frozenset[str]) -> dict[str, Any]:
    """Return a calibration recipe's options under the names of the Python parameters.

    Raises:
        CalibrationError: neither a file nor a bundled name, not a mapping, or an option that the
            command does not have.
    """
    return _read(_RECIPE, name, allowed)


def read_profile(name: str, allowed: frozenset[str]) -> dict[str, Any]:
    """Return a build profile's options under the names of the Python parameters.

    Raises:
        EngineError: neither a file nor a bundled name, not a mapping, or an option that the
            command does not have.
    """
    return _read(_PROFILE, name, allowed)


def _read(kind: _Kind, name: str, allowed: frozenset[str]) -> dict[str, Any]:
    """Return the options in a file of a kind."""
    text, where = _text(kind, name)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise kind.error(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise kind.error(f"{where}: expected option: value lines")
    options = {str(key).replace("-", "_"): value for key, value in content.items()}
    if unknown := sorted(set(options) - allowed):
        raise kind.error(f"{where} has unknown options {unknown}; known: {sorted(allowed)}")
    return options


def _text(kind: _Kind, name: str) -> tuple[str, str]:
    """Return a file's text and where it came from: a file, or the name of a bundled one."""
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    bundled = resources.files("ditas_export") / kind.package_folder
    if not bundled.is_dir():  # a source checkout
        bundled = resources.files("ditas_export") / ".." / kind.source_folder
    entry = bundled / f"{name}.yaml"
    if entry.is_file():
        return entry.read_text(encoding="utf-8"), f"{kind.name} {name}"
    names = (item.name for item in bundled.iterdir())
    known = sorted(item.removesuffix(".yaml") for item in names if item.endswith(".yaml"))
    raise kind.error(f"no {kind.name} {name!r}: give a YAML file, or one of {', '.join(known)}")
