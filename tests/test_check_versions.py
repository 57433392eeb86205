"""scripts/check_versions.py: which versions it tries, and what it says of one that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import check_versions


def test_every_dependency_but_torch_has_a_lowest_version() -> None:
    wanted = check_versions.declared()
    assert "torch" not in wanted
    assert {"onnx", "onnxruntime", "diffusers"} < wanted.keys()
    assert wanted["onnxruntime"] == ">=1.27,!=1.29.0"
    assert check_versions.lowest(wanted["onnxruntime"]) == "==1.27"
    assert all(check_versions.lowest(each) for each in wanted.values())


def test_a_range_without_a_lowest_version_is_refused() -> None:
    with pytest.raises(ValueError, match="'<2' names no lowest version; write >="):
        check_versions.lowest("<2")


def test_a_set_that_does_not_install_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: No such version\n")
    monkeypatch.setattr(check_versions, "run", lambda *_: failed)
    assert check_versions.attempt(["x==1"]).results == {"install": "ERROR: No such version"}
