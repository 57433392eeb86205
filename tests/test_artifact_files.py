from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from ditas_export.artifact_files import (
    atomic_path,
    load_tensors,
    require_writable,
    save_tensors,
    sha256_of_file,
    sha256_of_tensors,
)
from ditas_export.errors import ArtifactError


def test_a_file_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_path(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def fill(path: Path, error: BaseException) -> None:
    with atomic_path(path) as partial:
        partial.write_text("new")
        raise error


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(ArtifactError, match=r"No space left on device.*nothing was left"):
        fill(path, OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fill(path, KeyboardInterrupt())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_impossible_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a folder; name a file"):
        require_writable(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist; create it first"):
        require_writable(tmp_path / "no" / "file")


def fill_the_disk(path: Path) -> None:
    with atomic_path(path) as partial:
        partial.unlink()
        partial.symlink_to("/dev/full")
        partial.write_bytes(b"x" * 10_000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No space left"):
        fill_the_disk(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 1000)
    assert sha256_of_file(path) == hashlib.sha256(b"abc" * 1000).hexdigest()
    a, b = torch.arange(3.0), torch.ones(2)
    assert sha256_of_tensors({"a": a, "b": b}) == sha256_of_tensors({"b": b, "a": a})
    assert sha256_of_tensors({"a": a}) != sha256_of_tensors({"b": a})
    assert sha256_of_tensors({"a": a}) != sha256_of_tensors({"a": a.reshape(3, 1)})
    assert sha256_of_tensors({"a": a}) != sha256_of_tensors({"a": a.bfloat16()})


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = {"x": torch.randn(3, 2), "codes": torch.tensor([-7, 7], dtype=torch.int8)}
    save_tensors(path, tensors, file_format="kind 1", header={"b": [1, 2], "a": None})
    loaded, header = load_tensors(path, file_format="kind 1")
    assert header == {"a": None, "b": [1, 2]}
    assert all(torch.equal(tensors[name], loaded[name]) for name in tensors)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others of a team read it


def test_a_file_of_another_kind_or_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tensors(path, {"x": torch.zeros(1)}, file_format="some kind 1", header={})
    with pytest.raises(ArtifactError, match=r"is a safetensors file, but no other kind 1$"):
        load_tensors(path, file_format="other kind 1")
    expected = r"file is a some kind 1, and this version .* reads some kind 2; make it again$"
    with pytest.raises(ArtifactError, match=expected) as caught:
        load_tensors(path, file_format="some kind 2")
    assert "\n" not in str(caught.value)
