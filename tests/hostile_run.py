"""Runs one command of the table in this process, and says how it was mishandled, if it was."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hostile_table import Case

from ditas_export.engine.metadata import metadata_of
from ditas_export.errors import DitasExportError

LONGEST_LINE = 2000
"""Characters of a message."""


def mishandled(case: Case, folder: Path) -> str | None:
    """Return what is wrong with the answer to a case, None where it is as it must be."""
    words = case.make(folder)
    before = _files(folder)
    code, err = _answer(words)
    new = sorted(_files(folder) - before)
    if (folder / "ran").exists():
        return "it ran code of the file"
    if case.is_sound:
        return None if code == 0 else f"sound, but code {code}: {err[:200]}"
    if code != 2:
        return f"code {code}, expected 2: {err[-200:]}"
    lines = [line for line in err.splitlines() if line.strip()]
    is_usage = bool(lines) and lines[0].startswith("Usage:")
    if "Traceback" in err or not (is_usage or (len(lines) == 1 and lines[0].startswith("error: "))):
        return f"{len(lines)} lines: {err[:200]!r}"
    if not is_usage and len(lines[0]) > LONGEST_LINE:
        return f"a line of {len(lines[0])} characters"
    return f"it left {new}" if new else None


def _files(folder: Path) -> set[str]:
    """Return the names of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _answer(words: Sequence[str]) -> tuple[Any, str]:
    """Return exit code and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            _call(list(words))
        code: Any = 0
    except SystemExit as stop:
        code = stop.code or 0
    except DitasExportError as error:
        code, _ = 2, err.write(f"error: {error}")
    except BaseException as error:
        code, _ = type(error).__name__, err.write(f"Traceback: {error!r}")
    finally:
        sys.argv = before
    return code, err.getvalue()


def _call(words: list[str]) -> None:
    """Do what a command says; a plan and a recipe are only read."""
    command, *rest = words
    if command == "plan":
        metadata_of(Path(rest[0]))
    elif command == "recipe":
        export = importlib.import_module("ditas_export.cli.export")
        options = export._merge(Path("out.onnx"), rest[0], {})
        importlib.import_module("ditas_export.pipeline").quantization_settings(options)
    else:
        module = importlib.import_module(f"ditas_export.cli.{command}")
        sys.argv = [f"ditas-{command}", *rest]
        module.main()
