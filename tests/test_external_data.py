"""One hash for an ONNX file and the files that its tensors lie in."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from onnx import TensorProto, helper, numpy_helper
from quantized_fixture import example_inputs, exported, exported_reference, fed, snr_db
from typer.testing import CliRunner

from ditas_export.artifact_files import sha256_of_file
from ditas_export.cli import build, compare, sample
from ditas_export.errors import DitasExportError, OnnxExportError
from ditas_export.onnx_export.expand import expand
from ditas_export.onnx_export.external_data import (
    external_files,
    load_mapped,
    require_external_data,
    sha256_of_onnx,
)
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner, matmul_kernels
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.openvino_runner import OpenVINORunner
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


OUTSIDE = [
    "/etc/hostname",
    "../outside.data",
    "below/../../outside.data",
    "below/../a.data",
    "..",
    ".",
    "",
    "C:\\outside.data",
    "C:outside.data",
    "\\\\server\\share\\a.data",
    "below\\..\\..\\outside.data",
]
"""Locations that are not a name beside the model or below, as some system reads them."""


def in_an_initializer(tensor: TensorProto) -> onnx.GraphProto:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_graph(
        [helper.make_node("Identity", [tensor.name], ["y"])], "g", [], [y], [tensor]
    )


def in_a_constant(tensor: TensorProto) -> onnx.GraphProto:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "g", [], [y])


def in_a_branch(tensor: TensorProto) -> onnx.GraphProto:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    branch = in_an_initializer(tensor)
    condition = numpy_helper.from_array(np.array(True), "condition")
    chosen = helper.make_node(
        "If", ["condition"], ["y"], then_branch=branch, else_branch=in_a_constant(tensor)
    )
    return helper.make_graph([chosen], "g", [], [y], [condition])


PLACES = (in_an_initializer, in_a_constant, in_a_branch)


def write_location(path: Path, location: str, place: Callable[..., onnx.GraphProto]) -> None:
    tensor = numpy_helper.from_array(np.ones(4, dtype=np.float32), "a")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for entry, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=entry, value=value)
    path.write_bytes(helper.make_model(place(tensor)).SerializeToString())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", OUTSIDE)
def test_a_location_is_a_name_beside_the_model(
    tmp_path: Path, location: str, place: Callable[..., onnx.GraphProto]
) -> None:
    """Whether anything is there or not; nothing is read."""
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    for data in (tmp_path / "outside.data", folder / "a.data"):
        data.write_bytes(bytes(16))
    path = folder / "out.onnx"
    write_location(path, location, place)
    for read in (sha256_of_onnx, require_external_data, load_mapped, external_files):
        with pytest.raises(OnnxExportError) as caught:
            read(path)
        assert f"{path} keeps tensors in {location!r}, which is not a file" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_a_name_below_the_model_and_links_to_anywhere_are_read(
    tmp_path: Path, place: Callable[..., onnx.GraphProto]
) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    (folder / "below").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "blob").write_bytes(bytes(16))
    (folder / "below" / "link..data").symlink_to(elsewhere / "blob")
    (folder / "other").symlink_to(elsewhere)
    (folder / "hard.data").hardlink_to(elsewhere / "blob")
    path = folder / "out.onnx"
    for location in ("below/link..data", "other/blob", "hard.data"):
        write_location(path, location, place)
        assert external_files(path) == [folder / location]
        assert len(sha256_of_onnx(path)) == 64


@pytest.mark.parametrize("kind", ["device", "pipe", "link to a device", "link to nothing"])
def test_data_end_at_a_plain_file(tmp_path: Path, kind: str) -> None:
    """At once: a device would be read without end, a pipe waited for."""
    path, data = tmp_path / "out.onnx", tmp_path / "a.data"
    write_location(path, data.name, in_an_initializer)
    if kind == "pipe":
        os.mkfifo(data)
    else:
        data.symlink_to({"link to nothing": "nothing"}.get(kind, "/dev/zero"))
    expected = "cannot be read" if kind == "link to nothing" else "is a device, a pipe or a socket"
    for read in (sha256_of_onnx, require_external_data, load_mapped):
        with pytest.raises(OnnxExportError, match=expected):
            read(path)


def test_a_model_that_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "out.onnx"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(OnnxExportError, match="no readable ONNX file: it is a device"):
            sha256_of_onnx(path)


def linked(large: Path, folder: Path) -> Path:
    """Return a copy whose data are a link out of its folder: runtimes themselves refuse that."""
    folder.mkdir()
    path = folder / large.name
    shutil.copy(large, path)
    data = f"{large.name}.data"
    (folder / data).symlink_to(large.with_name(data))
    return path


def test_every_reader_follows_a_link_to_data_elsewhere(large: Path, tmp_path: Path) -> None:
    path, inputs = linked(large, tmp_path / "snapshot"), example_inputs()
    assert sha256_of_onnx(path) == sha256_of_onnx(large)
    with OnnxRuntimeRunner(large, threads=1) as runner:
        expected = runner(fed(*inputs))
    for cache in (None, tmp_path / "cache"):
        with OnnxRuntimeRunner(path, threads=1, cache=cache) as runner:
            assert torch.equal(runner(fed(*inputs)), expected)
    if importlib.util.find_spec("openvino") is not None:
        for cache in (None, tmp_path / "cache"):
            with OpenVINORunner(path, threads=1, cache=cache) as runner:
                assert snr_db(expected, runner(fed(*inputs))) > 100  # float32 sums in another order
    assert matmul_kernels(path) == matmul_kernels(large)


def test_what_is_expanded_from_data_elsewhere_stands_alone(tmp_path: Path) -> None:
    source = tmp_path / "blobs" / "int4.onnx"
    source.parent.mkdir()
    onnx.save(
        onnx.load(str(exported(layout="int4"))),
        str(source),
        save_as_external_data=True,
        location="int4.onnx.data",
        size_threshold=1024,
    )
    targets = []
    for path in (exported(layout="int4"), linked(source, tmp_path / "snapshot")):
        targets.append(tmp_path / f"{path.parent.name}-expanded.onnx")
        expand(path, targets[-1])
        assert external_files(targets[-1]) == []
    assert targets[0].read_bytes() == targets[1].read_bytes()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": "8"}, "has 8 bytes from 0 on for its tensor 'a', which takes 16"),
        ({"length": "-1"}, "has -1 bytes"),
        ({"offset": "-4"}, "has 16 bytes from -4 on"),
        ({"location": "out.onnx", "offset": "100000"}, "out.onnx"),
        ({"Location": "a.data", "location": None}, "does not say whether its tensor 'a' lies in"),
    ],
)
def test_tensors_are_as_long_as_they_say(
    tmp_path: Path, entries: dict[str, str | None], message: str
) -> None:
    path = tmp_path / "out.onnx"
    write_sum(path, "a.data")
    (tmp_path / "a.data").write_bytes(bytes(64))
    model = onnx.load(str(path), load_external_data=False)
    (tensor,) = (each for each in model.graph.initializer if each.name == "a")
    told = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in told.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    for read in (sha256_of_onnx, require_external_data, load_mapped):
        with pytest.raises(OnnxExportError, match=re.escape(message)):
            read(path)
