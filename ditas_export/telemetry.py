"""The runtimes' reports to their vendors: off, unless the user chose otherwise by their own means.

ONNX Runtime decides when it is imported, OpenVINO reports that it was. So the one is told as soon
as anything of this package is imported, the other is imported here. Imports nothing that takes
time: a command cannot say anything of Ctrl-C yet.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

_REPORTER = "openvino_telemetry"
"""The package that OpenVINO reports by; it has a stand-in for those who have not installed it."""


def turn_off_onnxruntime_telemetry() -> None:
    """Set ONNX Runtime's own switch, unless the user has set it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def import_openvino() -> ModuleType:
    """Import OpenVINO without what reports its use; with it where `opt_in_out --opt_in` was run.

    Raises:
        ImportError: it is not installed.
    """
    if "openvino" in sys.modules or _user_agreed():
        return importlib.import_module("openvino")
    reporter = sys.modules.pop(_REPORTER, None)
    sys.modules[_REPORTER] = None  # type: ignore[assignment]  # as if not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_REPORTER]
        if reporter is not None:
            sys.modules[_REPORTER] = reporter


def _user_agreed() -> bool:
    """Return whether OpenVINO's own file of consent says yes."""
    try:
        if sys.platform == "win32":
            folder = os.path.join(os.environ.get("LOCALAPPDATA", ""), "Intel Corporation")
        else:
            folder = os.path.expanduser("~/intel")
        with open(os.path.join(folder, _REPORTER), encoding="utf-8") as file:
            return file.readline().strip() == "1"
    except (OSError, ValueError):  # no such file, no home, no text
        return False
