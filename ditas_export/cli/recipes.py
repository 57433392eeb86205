"""Options from YAML files: calibration recipes and build profiles, one's own or bundled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ditas_export.errors import CalibrationError, DitasExportError, EngineError
from ditas_export.saved_records import shown
from ditas_export.text_files import LARGEST_YAML, TextError, parse_options, read_text


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
        content = parse_options(text)
    except TextError as error:
        raise kind.error(f"{where}: {error}") from error
    options = {name.replace("-", "_"): value for name, value in content.items()}
    if len(options) < len(content):
        raise kind.error(f"{where} has an option twice, with dashes and with underscores")
    if unknown := sorted(set(options) - allowed):
        raise kind.error(
            f"{where} has unknown options {shown(unknown)}; known: {', '.join(sorted(allowed))}"
        )
    return options


def _text(kind: _Kind, name: str) -> tuple[str, str]:
    """Return a file's text and where it came from: a file, or the name of a bundled one."""
    path = Path(name)
    if _is_there(path):
        try:
            return read_text(path, most=LARGEST_YAML), str(path)
        except (OSError, TextError) as error:
            reason = getattr(error, "strerror", None) or error
            raise kind.error(f"cannot read the {kind.name} {path}: {reason}") from error
    bundled = resources.files("ditas_export") / kind.package_folder
    if not bundled.is_dir():  # a source checkout
        bundled = resources.files("ditas_export") / ".." / kind.source_folder
    entry = bundled / f"{name}.yaml"
    if re.fullmatch(r"[\w-]{1,80}", name) and entry.is_file():
        return entry.read_text(encoding="utf-8"), f"{kind.name} {name}"
    names = (item.name for item in bundled.iterdir())
    known = sorted(item.removesuffix(".yaml") for item in names if item.endswith(".yaml"))
    raise kind.error(
        f"no {kind.name} {name[:80]!r}: give a YAML file, or one of {', '.join(known)}"
    )


def _is_there(path: Path) -> bool:
    """Return whether a name is that of anything; a folder or a pipe is refused when it is read."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False
