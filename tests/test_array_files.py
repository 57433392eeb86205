"""Arrays of .npz files: what NumPy writes is read, whole and by parts; all else is one line."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npz_fixture import GOOD, NO_ARRAYS, archive, npy, saved

from ditas_export.errors import EvaluationError
from ditas_export.evaluation import array_files
from ditas_export.evaluation.array_files import open_arrays

VALUES: dict[str, Any] = {
    "uint8": np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2),
    "float16": np.linspace(-1, 1, 12).astype(np.float16).reshape(4, 3),
    "float32": np.linspace(-1, 1, 12).astype(np.float32).reshape(4, 3),
    "float64": np.linspace(-1, 1, 12).reshape(4, 3),
    "big-endian": np.linspace(-1, 1, 12).astype(">f4").reshape(4, 3),
    "Fortran's order": np.asfortranarray(np.linspace(-1, 1, 12).reshape(4, 3)),
    "one dimension": np.linspace(-1, 1, 5),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_numpy_writes_is_read(tmp_path: Path, value: Any, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", x=value, y=np.array(["not", "read"], dtype=object))
    with open_arrays(tmp_path / "a.npz", ["x", "z"]) as file:
        assert list(file.arrays) == ["x"]
        assert file.arrays["x"].shape == value.shape
        assert file.arrays["x"].dtype == value.dtype
        np.testing.assert_array_equal(file.read("x"), value)


@pytest.mark.parametrize("most", [1, 3, 4, 9])
def test_parts_are_the_whole(tmp_path: Path, most: int) -> None:
    value = VALUES["uint8"]
    with open_arrays(saved(tmp_path / "a.npz", x=value), ["x"]) as file:
        parts = list(file.batches("x", most=most))
    assert [len(part) for part in parts[:-1]] == [most] * (len(parts) - 1)
    np.testing.assert_array_equal(np.concatenate(parts), value)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_the_format(tmp_path: Path, version: tuple[int, int]) -> None:
    value = VALUES["float32"]
    path = archive(tmp_path / "a.npz", [("x.npy", npy(value, version=version))])
    with open_arrays(path, ["x"]) as file:
        np.testing.assert_array_equal(file.read("x"), value)


@pytest.mark.parametrize(("raw", "message"), NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_an_array_that_is_none(
    tmp_path: Path, raw: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "a.npz", [("x.npy", raw)])
    with pytest.raises(EvaluationError, match=message) as refused, open_arrays(path, ["x"]):
        pass
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    assert not (tmp_path / "ran").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def flipped(path: Path) -> None:
    """One bit of the numbers, which the checksum tells."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\x00\x00\x80\x3f")] ^= 1
    path.write_bytes(raw)


def shortened(path: Path) -> None:
    """Fewer bytes than both headers say."""
    raw = path.read_bytes()
    path.write_bytes(raw.replace(GOOD, GOOD[:-8]))


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut, "zip archive cut short"),
    "a flipped bit": (flipped, "Bad CRC-32"),
    "bytes missing": (shortened, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("hello there"), "text that begins 'hello there'"),
    "an .npy file": (lambda path: path.write_bytes(GOOD), "not a zip file"),
    "absent": (lambda path: path.unlink(), "No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    "a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is a device"),
}


@pytest.mark.parametrize(("change", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_damaged(
    tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    path = archive(tmp_path / "a.npz", [("x.npy", GOOD)])
    change(path)
    with pytest.raises(EvaluationError, match=message) as refused, open_arrays(path, ["x"]) as file:
        list(file.batches("x", most=2))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("most", [1, 2])
def test_a_checksum_of_packed_numbers_that_is_wrong(tmp_path: Path, most: int) -> None:
    """Which is known at their end alone."""
    value = np.random.default_rng(0).normal(size=(2, 5000))
    path = archive(tmp_path / "a.npz", [("x.npy", npy(value))], compression=zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 16] ^= 1
    path.write_bytes(raw)
    with open_arrays(path, ["x"]) as file, pytest.raises(EvaluationError, match="Bad CRC-32"):
        list(file.batches("x", most=most))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", [("x.npy", GOOD), ("x.npy", GOOD)])
    with pytest.raises(EvaluationError, match="two arrays of one name"), open_arrays(path, ["x"]):
        pass


def test_another_compression(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", [("x.npy", GOOD)], compression=zipfile.ZIP_LZMA)
    with pytest.raises(EvaluationError, match="in a way that NumPy does not use"):
        open_arrays(path, ["x"]).__enter__()


def test_an_encrypted_entry(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", [("x.npy", GOOD)])
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x03\x04") + 6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(EvaluationError, match="encrypted"), open_arrays(path, ["x"]):
        pass


def test_an_array_too_large_to_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "LARGEST_WHOLE", 23)
    path = archive(tmp_path / "a.npz", [("x.npy", GOOD)])
    with open_arrays(path, ["x"]) as file, pytest.raises(EvaluationError, match="x has 24 bytes"):
        file.read("x")


def test_errors_of_the_caller_are_its_own(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", [("x.npy", GOOD)])
    with pytest.raises(ValueError, match="mine"), open_arrays(path, ["x"]):
        raise ValueError("mine")
