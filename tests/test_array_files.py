"""Arrays of .npz files: what NumPy writes is read, whole and by parts; all else is one line."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npz_fixture import archive, npy, saved, with_header

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


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
GOOD = npy(np.ones((2, 3), dtype=np.float32))


def header(shape: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return with_header(text, bytes(24))


class Runs:
    """A pickle that leaves a trace."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


OBJECTS = npy(np.array([Runs()], dtype=object), allow_pickle=True)

REFUSED: dict[str, tuple[bytes, str]] = {
    "objects": (OBJECTS, "no array of plain numbers"),
    "a pickle": (pickle.dumps(Runs()), "no array of NumPy"),
    "named fields": (npy(np.zeros(2, dtype=[("a", "f4")])), "no array of plain numbers"),
    "texts": (npy(np.array(["a", "b"])), "no array of plain numbers"),
    "complex numbers": (npy(np.ones(3, dtype=complex)), "no array of plain numbers"),
    "dates": (npy(np.zeros(3, dtype="M8[s]")), "no array of plain numbers"),
    "truth values": (npy(np.ones(3, dtype=bool)), "no array of plain numbers"),
    "no entries": (npy(np.ones((0, 3))), r"1 to 1,099,"),
    "five dimensions": (npy(np.ones((1, 1, 1, 1, 1))), "4 dimensions at most"),
    "an expression": (header("(1+1, 3)"), "no array of plain numbers"),
    "a negative size": (header("(-2, -3)"), "no array of plain numbers"),
    "a huge size": (header("(999999999999999999, 999999999999999999)"), "the file has 24"),
    "5000 digits": (header(f"({'9' * 5000},)"), "no array of plain numbers"),
    "one more row": (header("(3, 3)"), "36 bytes, and the file has 24"),
    "one less row": (header("(1, 3)"), "12 bytes, and the file has 24"),
    "a nested header": (header("(" * 5000), "no array of plain numbers"),
    "a call": (header("(2, 3)", descr="__import__('os')"), "no array of plain numbers"),
    "an unknown order": (header("(2, 3)", order="None"), "no array of plain numbers"),
    "two headers": (with_header(FLOATS * 2, bytes(24)), "no array of plain numbers"),
    "no header": (with_header("", bytes(24)), "no array of plain numbers"),
    "a header of 1 GiB": (b"\x93NUMPY\x02\x00\x00\x00\x00\x40" + bytes(99), "header of 1,073,"),
    "a header cut short": (GOOD[:40], "bytes are missing"),
    "only the sign": (GOOD[:8], "2 bytes are missing"),
    "another version": (with_header(FLOATS, bytes(24), version=b"\x04\x00"), "no array of NumPy"),
    "no array": (b"hello", "3 bytes are missing"),
    "an empty entry": (b"", "8 bytes are missing"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), REFUSED.values(), ids=REFUSED)
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
