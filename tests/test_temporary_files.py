"""A full temporary folder is named, whoever fails for it, and it is left empty."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from quantized_fixture import exported

from ditas_export.errors import ArtifactError, RunnerError
from ditas_export.runtime.onnxruntime_runner import matmul_kernels
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.temporary_files import temporary_folder

MIB = 2**20


@pytest.fixture
def free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mock]:
    """How much room the temporary folder has, as `.return_value.free`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    usage = Mock(return_value=Mock(free=MIB))
    monkeypatch.setattr(shutil, "disk_usage", usage)
    yield usage
    assert list(tmp_path.iterdir()) == []


def full(folder: Path, expected: str) -> str:
    """The refusal."""
    return (
        f"the temporary folder {folder} has 1.0 MiB free, expected {expected}; make room there, or "
        f"set TMPDIR to a folder with room"
    )


def test_a_folder_without_room_is_refused_at_once(tmp_path: Path, free: Mock) -> None:
    with pytest.raises(ArtifactError) as caught, temporary_folder(room=2 * MIB):
        pytest.fail("the folder was given")
    assert str(caught.value) == full(tmp_path, "2.0")


def test_what_fails_in_a_full_folder_failed_for_that(tmp_path: Path, free: Mock) -> None:
    free.return_value.free = 8 * MIB

    def fill(folder: Path) -> None:
        (folder / "part").write_bytes(bytes(2 * MIB))
        free.return_value.free = MIB
        raise RunnerError("the runtime: unknown error")

    with pytest.raises(ArtifactError) as caught, temporary_folder(room=4 * MIB) as folder:
        fill(folder)
    assert str(caught.value) == full(tmp_path, "2.0")
    assert isinstance(caught.value.__context__, RunnerError)


def test_what_fails_where_there_is_room_says_why_itself(free: Mock) -> None:
    with pytest.raises(RunnerError, match="no such operator"), temporary_folder(room=100):
        raise RunnerError("no such operator")


def test_no_temporary_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tempfile, "TemporaryDirectory", Mock(side_effect=FileNotFoundError(2, "no"))
    )
    message = r"no temporary file can be written: \[Errno 2\] no; set TMPDIR to a folder with room"
    with pytest.raises(ArtifactError, match=message), temporary_folder(room=100):
        pytest.fail("a folder was given")


def test_neither_a_runtime_nor_the_cache_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = exported()
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=100)))
    with pytest.raises(ArtifactError, match="the temporary folder"):
        matmul_kernels(file)
    with pytest.raises(ArtifactError, match="the temporary folder"):
        OpenVINORunner(file, cache=tmp_path)
