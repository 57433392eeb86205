"""Files that are not what they were taken for, named as what they are, by every reader."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized_fixture import exported_reference, quantized_tiny_dit, tiny_dit
from safetensors.torch import save

from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.engine.metadata import EngineMetadata, metadata_path
from ditas_export.errors import ArtifactError, DitasExportError, EngineError, OnnxExportError
from ditas_export.file_signs import PLAN_SUFFIXES, describe_impostor, has_suffix
from ditas_export.onnx_export.external_data import external_files
from ditas_export.onnx_export.file_facts import file_metadata


def cut_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 4000)
    return content.getvalue()[:-100]


SAFETENSORS = save({"a": torch.arange(4096, dtype=torch.float32)})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7000000\n"
SIGNS = {
    "pointer": (POINTER, "a git-LFS pointer, .* run git lfs pull"),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html><title>Sign in</title>", "an HTML or XML page"),
    "bare page": (b"<HTML><body>404", "an HTML or XML page"),
    "store's error": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "an HTML or XML page"),
    "empty": (b"", "empty; copy or download it again"),
    "gzip": (gzip.compress(b"model" * 99), "compressed by gzip; decompress"),
    "xz": (lzma.compress(b"model" * 99), "compressed by xz; decompress"),
    "bzip2": (bz2.compress(b"model" * 99), "compressed by bzip2; decompress"),
    "cut zip": (cut_zip(), "a zip archive cut short"),
    "json": (b' {"error": "gated repo"}', "JSON text"),
    "answer": (b"Entry not found", "a text that begins 'Entry not found', as a server answers"),
    "long answer": ("ä".encode() * 600 + b"a", "a text that begins 'ä{40}…'"),  # cut in a letter
    "annex": (b"/annex/objects/SHA256E-s12--aa.pt\n", "a git-annex pointer"),
    "preallocated": (bytes(5000), "all zeros where it begins, as an unfinished download is"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c\x00\x04", "compressed by 7-Zip"),
    "cut safetensors": (SAFETENSORS[:-1], "a safetensors file cut short .16,455 of 16,456 bytes"),
    "cut header": (SAFETENSORS[:40], "a safetensors file cut short .40 of 72 bytes"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "metadata of .onnx": file_metadata,
    "tensors of .onnx": external_files,
    "artefact": QuantizedModel.load,
    "metadata of a plan": EngineMetadata.load,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("sign", SIGNS)
def test_every_reader_names_what_a_file_is(tmp_path: Path, reader: str, sign: str) -> None:
    content, expected = SIGNS[sign]
    path = tmp_path / "taken.for.something"
    path.write_bytes(content)
    if (reader, sign) == ("metadata of a plan", "json"):  # JSON is what it is: of another kind
        expected = "does not describe an engine"
    if reader == "metadata of a plan" and "answer" in sign:  # JSON is a text, too
        expected = "does not describe an engine"
    with pytest.raises(DitasExportError, match=expected) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_a_folder_and_a_file_that_is_not_there(
    tmp_path: Path, reader: str
) -> None:
    for path, expected in ((tmp_path, "it is a folder"), (tmp_path / "no", "No such file or")):
        with pytest.raises(DitasExportError, match=expected):
            READERS[reader](path)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_a_sound_file_of_another_kind_is_named_beside_the_readers_reason(
    tmp_path: Path, suffix: str
) -> None:
    whole = io.BytesIO()
    torch.save({"a": torch.ones(99)}, whole)
    path = tmp_path / f"model{suffix}"
    read = file_metadata if suffix == ".onnx" else QuantizedModel.load
    for content, kind in ((whole.getvalue(), "a zip archive"), (b"\x80\x02}q\x00.", "a pickle")):
        path.write_bytes(content)
        with pytest.raises(DitasExportError, match=rf"it is {kind}, as PyTorch's [^(]*\([^)]+\)"):
            read(path)
    path.write_bytes(SAFETENSORS)
    if suffix == ".onnx":
        with pytest.raises(DitasExportError, match=r"it is a safetensors file \(no protobuf"):
            read(path)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    path.symlink_to(tmp_path / "blob")
    with pytest.raises(OnnxExportError, match=r"a link to .*blob, which is not there"):
        file_metadata(path)


def test_a_plan_that_lies_alone_is_named(tmp_path: Path) -> None:
    plan = tmp_path / "out.plan"
    for content, expected in (
        (POINTER, r"out\.plan is a git-LFS pointer"),
        (SAFETENSORS, r"out\.plan is a safetensors file"),
        (b"ftrt\x00\x01", "it is not there; it belongs beside the plan"),
    ):
        plan.write_bytes(content)
        with pytest.raises(EngineError, match=expected):
            EngineMetadata.load(metadata_path(plan))


def test_sound_files_have_no_sign(tmp_path: Path) -> None:
    quantized = tmp_path / "kept.safetensors"
    quantized_tiny_dit(tiny_dit()).save(quantized)
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a", "b")
    # A header of 60 or 123 bytes begins with "<" or "{"; safetensors gives its length first.
    short = tmp_path / "short.safetensors"
    header = json.dumps({"__metadata__": {"a": "b"}}).encode()
    for length in (ord("<"), ord("{")):
        short.write_bytes(length.to_bytes(8, "little") + header.ljust(length))
        assert describe_impostor(short) is None
    for path in (exported_reference(), quantized, whole, tmp_path / "nowhere"):
        assert describe_impostor(path) is None
    page = tmp_path / "plan.json"
    page.write_text("{")
    assert describe_impostor(page, expects_json=True) is None


def test_a_damaged_artefact_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"\x01\x00\x00\x00\x00\x00\x00\x00\xff")
    with pytest.raises(ArtifactError, match=r"is no readable ditas-export quantized DiT \d+ file"):
        QuantizedModel.load(path)


def test_suffixes_count_in_any_case() -> None:
    for name in ("a.plan", "A.PLAN", Path("x/b.Engine"), "c.engine"):
        assert has_suffix(name, PLAN_SUFFIXES)
    for name in ("a.plan.json", "plan", "a.onnx"):
        assert not has_suffix(name, PLAN_SUFFIXES)
