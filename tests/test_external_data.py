"""One hash for an ONNX file and the files that its tensors lie in."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from quantized_fixture import exported_reference
from typer.testing import CliRunner

from ditas_export.artifact_files import sha256_of_file
from ditas_export.cli import build, compare, sample
from ditas_export.errors import DitasExportError, OnnxExportError
from ditas_export.onnx_export.expand import expand
from ditas_export.onnx_export.external_data import (
    external_files,
    require_external_data,
    sha256_of_onnx,
)
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.options import Runtime


def write_sum(path: Path, *locations: str) -> None:
    """Write the sum of two constants, each inside the file or, by name, beside it."""
    tensors = [
        numpy_helper.from_array(np.full(4, value, dtype=np.float32), name)
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    for tensor, location in zip(tensors, locations, strict=False):
        onnx.external_data_helper.set_external_data(tensor, location)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "sum", [], [y], tensors)
    onnx.save(helper.make_model(graph), str(path))


def test_a_file_of_its_own_has_the_hash_of_its_bytes(tmp_path: Path) -> None:
    write_sum(tmp_path / "sum.onnx")
    assert external_files(tmp_path / "sum.onnx") == []
    assert sha256_of_onnx(tmp_path / "sum.onnx") == sha256_of_file(tmp_path / "sum.onnx")


def test_every_file_beside_it_counts(tmp_path: Path) -> None:
    path, files = tmp_path / "sum.onnx", [tmp_path / "a.data", tmp_path / "b.data"]
    write_sum(path, "b.data", "a.data")
    assert external_files(path) == files
    lines = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, *files)]
    found = sha256_of_onnx(path)
    assert found == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    for file in files:
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert sha256_of_onnx(path) != found, file
        file.write_bytes(kept)
    write_sum(tmp_path / "one.onnx", "both.data", "both.data")
    assert external_files(tmp_path / "one.onnx") == [tmp_path / "both.data"]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sum.onnx"
    write_sum(path, "a.data")
    (tmp_path / "a.data").unlink()
    with pytest.raises(OnnxExportError) as caught:
        sha256_of_onnx(path)
    assert str(caught.value) == (
        f"{path} keeps tensors in {tmp_path / 'a.data'}, which cannot be read (No such file or "
        f"directory); put that file beside it, or export again"
    )
    path.write_bytes(b"no model")
    with pytest.raises(OnnxExportError, match=r"sum\.onnx is no readable ONNX file"):
        external_files(path)


@pytest.mark.parametrize("with_lengths", [True, False])
def test_data_cut_short_are_named(tmp_path: Path, with_lengths: bool) -> None:
    path, data = tmp_path / "sum.onnx", tmp_path / "both.data"
    write_sum(path, data.name, data.name)
    if not with_lengths:  # the standard leaves them free: the tensor's own size counts
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            kept = [entry for entry in tensor.external_data if entry.key != "length"]
            del tensor.external_data[:]
            tensor.external_data.extend(kept)
        path.write_bytes(model.SerializeToString())
    wanted = data.stat().st_size
    assert external_files(path) == [data]
    data.write_bytes(data.read_bytes()[:-1])
    expected = (
        f"{path} keeps tensors in {data}, which has {wanted - 1} bytes where {wanted} are "
        f"expected: it was cut short; copy it again"
    )
    with pytest.raises(OnnxExportError) as caught:
        require_external_data(path)
    assert str(caught.value) == expected


def test_data_that_are_something_else_are_named(tmp_path: Path) -> None:
    path, data = tmp_path / "sum.onnx", tmp_path / "a.data"
    write_sum(path, data.name)
    data.write_bytes(b"\1" * 15)
    with pytest.raises(OnnxExportError, match="15 bytes where 16 are expected: it was cut short"):
        require_external_data(path)
    data.write_bytes(b"")
    with pytest.raises(OnnxExportError, match="0 bytes where 16 are expected: it is empty"):
        require_external_data(path)
    data.unlink()
    data.mkdir()
    with pytest.raises(OnnxExportError, match=r"a\.data, which cannot be read \(it is a fol"):
        require_external_data(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny float model with its tensors beside it."""
    path = tmp_path_factory.mktemp("large") / "large.onnx"
    model = onnx.load(str(exported_reference()))
    onnx.save(model, str(path), save_as_external_data=True, location="large.onnx.data")
    return path


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda data: data.write_bytes(data.read_bytes()[:-1]), "cut short; copy it again"),
    "pointer": (
        lambda data: data.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "it is a git-LFS pointer",
    ),
    "missing": (Path.unlink, "No such file or directory); put that file beside it"),
    "folder": (lambda data: (data.unlink(), data.mkdir()), "it is a folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_command_and_runner_names_damaged_data(
    large: Path, tmp_path: Path, damage: str
) -> None:
    path, data = tmp_path / large.name, tmp_path / f"{large.name}.data"
    shutil.copy(large, path)
    shutil.copy(large.with_name(data.name), data)
    spoil, expected = DAMAGES[damage]
    spoil(data)
    calls: dict[str, tuple[typer.Typer, list[object]]] = {
        "sample": (sample.app, [path, "-o", tmp_path / "samples"]),
        "compare": (compare.app, [exported_reference(), path]),
        "compare, as reference": (compare.app, [path, exported_reference()]),
        "build": (build.app, [path, "--dry-run"]),
        "commands": (build.app, [path, "--dry-run", "--trtexec"]),
    }
    for name, (app, words) in calls.items():
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2, name
        assert expected in result.stderr
        assert str(data) in result.stderr
        assert sum(line.startswith("error:") for line in result.stderr.splitlines()) == 1
    readers: list[Callable[[], object]] = [
        lambda: OnnxRuntimeRunner(path),
        lambda: expand(path, tmp_path / "expanded.onnx"),
    ]
    for read in readers:
        with pytest.raises(OnnxExportError, match=re.escape(expected)):
            read()


def test_changed_data_are_another_model_to_sample_from(tmp_path: Path) -> None:
    path, data = tmp_path / "large.onnx", tmp_path / "large.onnx.data"
    model = onnx.load(str(exported_reference()))
    onnx.save(model, str(path), save_as_external_data=True, location=data.name)
    before = open_runner(str(path), runtime="onnxruntime", cache=tmp_path / "cache")
    assert before.sha256 == sha256_of_onnx(path)
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = open_runner(str(path), runtime="onnxruntime", cache=tmp_path / "cache")
    assert after.sha256 != before.sha256
    after.runner.close()
    before.runner.close()


@pytest.mark.parametrize("runtime", ["auto", "onnxruntime", "openvino"])
def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, runtime: Runtime) -> None:
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    for path in (tmp_path / "missing.onnx", folder):
        with pytest.raises(OnnxExportError, match="is no readable ONNX file"):
            sha256_of_onnx(path)
        with pytest.raises(DitasExportError) as caught:
            open_runner(str(path), runtime=runtime)
        assert str(path) in str(caught.value)
