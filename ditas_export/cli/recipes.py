"""Calibration recipes: YAML files that fill command-line options."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ditas_export.errors import CalibrationError


def recipe_text(name: str) -> tuple[str, str]:
    """Return a recipe's text and where it came from: a file, or the name of a bundled recipe.

    Raises:
        CalibrationError: neither a file nor a bundled name.
    """
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    bundled = resources.files("ditas_export") / "recipes"
    if not bundled.is_dir():  # a source checkout
        bundled = resources.files("ditas_export") / ".." / "calib"
    entry = bundled / f"{name}.yaml"
    if entry.is_file():
        return entry.read_text(encoding="utf-8"), f"recipe {name}"
    names = sorted(item.name.removesuffix(".yaml") for item in bundled.iterdir())
    known = [item for item in names if not item.endswith(".md")]
    raise CalibrationError(f"no recipe {name!r}: give a YAML file, or one of {', '.join(known)}")


def read_recipe(name: str, allowed: frozenset[str]) -> dict[str, Any]:
    """Return a recipe's options under the names of the Python parameters.

    Raises:
        CalibrationError: not a mapping, or an option that the command does not have.
    """
    text, where = recipe_text(name)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CalibrationError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise CalibrationError(f"{where}: expected option: value lines")
    options = {str(key).replace("-", "_"): value for key, value in content.items()}
    if unknown := sorted(set(options) - allowed):
        raise CalibrationError(f"{where} has unknown options {unknown}; known: {sorted(allowed)}")
    return options
