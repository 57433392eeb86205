"""ONNX files as ONNX Runtime's CPU provider opens them at once: prepared, kept, healed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from quantized_fixture import TINY, example_inputs, exported, fed

from ditas_export.errors import OnnxExportError, RunnerError
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.runtime import onnxruntime_runner
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

PRODUCTS = (3 + 1 + 4 + 1) * TINY.depth
"""In the form that ONNX Runtime runs: qkv in three parts, fc1 in four."""


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("entry-*"))


@pytest.mark.parametrize("adaln_bits", [16, 4])
def test_the_kept_model_gives_the_same_bytes_with_the_same_kernels(
    tmp_path: Path, adaln_bits: int
) -> None:
    path = exported(adaln_bits=adaln_bits)
    inputs = example_inputs()
    with OnnxRuntimeRunner(path, threads=2) as runner:
        fresh = runner(fed(*inputs))
    for _ in range(2):  # made, then found
        with OnnxRuntimeRunner(path, threads=2, cache=tmp_path) as runner:
            assert torch.equal(runner(fed(*inputs)), fresh)
            assert f"{PRODUCTS} MatMulIntegerToFloat" in runner.description
    assert len(entries(tmp_path)) == 1


def prepared(entry: Path) -> onnx.ModelProto:
    return onnx.load(str(entry / "model.onnx"), load_external_data=False)


def packed(model: onnx.ModelProto) -> dict[str, int]:
    """Return where the packed weights of each tensor begin in the file beside the model."""
    return {
        tensor.name: int(entry.value.rpartition("|")[2].partition(";")[0])
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key.startswith("prepacked")
    }


@pytest.mark.parametrize("adaln_bits", [16, 4])
def test_weights_are_kept_packed_where_kernels_can_use_them(
    tmp_path: Path, adaln_bits: int
) -> None:
    with OnnxRuntimeRunner(exported(adaln_bits=adaln_bits), threads=2, cache=tmp_path):
        (entry,) = entries(tmp_path)
        offsets = packed(prepared(entry))
        if Path("/proc/self/maps").exists():
            assert str(entry / "model.data") in Path("/proc/self/maps").read_text()
    assert offsets
    # onnxruntime aligns what it packs itself to 64 bytes; its kernels crash on less.
    assert [name for name, offset in offsets.items() if offset % 64] == []


def test_int4_weights_are_expanded_once(tmp_path: Path) -> None:
    path = exported(layout="int4")
    with OnnxRuntimeRunner(path, threads=2, cache=tmp_path):
        (entry,) = entries(tmp_path)
        tensors = prepared(entry).graph.initializer
    kept = [t for t in tensors if t.name.endswith("/int8_codes") and len(t.dims) == 2]
    assert len(kept) == PRODUCTS
    assert {tensor.data_type for tensor in kept} == {onnx.TensorProto.INT8}
    assert {file.name for file in entry.iterdir()} == {"model.onnx", "model.data", "manifest.json"}


def test_a_hash_that_is_given_is_the_one_that_is_looked_for(tmp_path: Path) -> None:
    for sha256 in (None, sha256_of_onnx(exported())):
        with OnnxRuntimeRunner(exported(), threads=2, cache=tmp_path, sha256=sha256):
            pass
    assert len(entries(tmp_path)) == 1


def test_a_refused_file_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    model = onnx.load(str(exported()))
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "NoSuchOp"
    path = tmp_path / "broken.onnx"
    onnx.save(model, str(path))
    with pytest.raises(RunnerError, match=re.escape(f"refuses {path}: ")):
        OnnxRuntimeRunner(path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("[!.]*"))
    assert not list((tmp_path / "cache").glob(".partial-*"))


def test_the_norms_are_not_fused_with_the_sums_before_them(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(exported(), threads=2, cache=tmp_path):
        (entry,) = entries(tmp_path)
        kinds = [node.op_type for node in prepared(entry).graph.node]
    assert "SkipLayerNormalization" not in kinds
    assert kinds.count("LayerNormalization") == 2 * TINY.depth + 1


def without_files(entry: Path) -> None:
    """A manifest as of an entry that has no files, and files that are cut."""
    content = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps(content | {"files": {}}))
    (entry / "model.data").write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "model.onnx deleted": lambda entry: (entry / "model.onnx").unlink(),
    "model.data deleted": lambda entry: (entry / "model.data").unlink(),
    "manifest deleted": lambda entry: (entry / "manifest.json").unlink(),
    "manifest of garbage": lambda entry: (entry / "manifest.json").write_bytes(b"\xff{"),
    "manifest of another kind": lambda entry: (entry / "manifest.json").write_text('{"files": 5}'),
    "manifest of no file": lambda entry: without_files(entry),
    "model.onnx truncated": lambda entry: truncate(entry / "model.onnx"),
    "model.data truncated": lambda entry: truncate(entry / "model.data"),
    "model.data empty": lambda entry: (entry / "model.data").write_bytes(b""),
    "4 KiB of model.data changed": lambda entry: scribble(entry / "model.data"),
    "model.data a link": lambda entry: link(entry / "model.data"),
    "folder empty": lambda entry: [path.unlink() for path in entry.iterdir()],
    "folder deleted": shutil.rmtree,
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)


def link(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the one entry; never write to it."""
    cache = tmp_path_factory.mktemp("healthy") / "cache"
    with OnnxRuntimeRunner(exported(), threads=1, cache=cache):
        pass
    return cache


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_entry_that_was_damaged_is_made_anew(
    healthy: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, prepared = tmp_path / "cache", []
    shutil.copytree(healthy, cache)
    (entry,) = entries(cache)
    whole = (entry / "model.data").read_bytes()
    DAMAGES[damage](entry)
    prepare = onnxruntime_runner._prepare

    def counted(path: Path, target: Path, rest: Any, **how: Any) -> None:
        prepared.append(path)
        prepare(path, target, rest, **how)

    monkeypatch.setattr(onnxruntime_runner, "_prepare", counted)
    for _ in range(2):  # made anew, then found
        with OnnxRuntimeRunner(exported(), threads=1, cache=cache):
            assert (entry / "model.data").read_bytes() == whole
    assert prepared == [exported()]
    assert not list(cache.glob(".partial-*"))


def test_a_copied_cache_is_taken_as_it_is(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other inodes and times, the same bytes."""
    cache = tmp_path / "cache"
    shutil.copytree(healthy, cache, copy_function=shutil.copyfile)
    monkeypatch.setattr(onnxruntime_runner, "_prepare", None)
    with OnnxRuntimeRunner(exported(), threads=1, cache=cache):
        pass


def test_a_file_that_is_replaced_meanwhile_is_not_kept_as_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = exported(), exported(weight_bits=8, layout="int8", rank=0)
    path, cache = tmp_path / "out.onnx", tmp_path / "cache"
    shutil.copy(one, path)
    prepare = onnxruntime_runner._prepare

    def slowly(source: Path, target: Path, rest: Any, **how: Any) -> None:
        shutil.copy(other, tmp_path / "new.onnx")
        (tmp_path / "new.onnx").replace(path)
        prepare(source, target, rest, **how)

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime_runner, "_prepare", slowly)
        with pytest.raises(
            RunnerError, match=r"out\.onnx was replaced while it was being prepared"
        ):
            OnnxRuntimeRunner(path, threads=1, cache=cache)
    assert not entries(cache)
    inputs = example_inputs()
    with OnnxRuntimeRunner(one, threads=1) as fresh:
        expected = fresh(fed(*inputs))
    shutil.copy(one, path)
    with OnnxRuntimeRunner(path, threads=1, cache=cache) as runner:
        assert torch.equal(runner(fed(*inputs)), expected)


def test_a_disk_that_fills_up_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RunnerError("onnxruntime refuses out.onnx: protobuf failed")

    inputs = example_inputs()
    monkeypatch.setattr(onnxruntime_runner, "_optimize", fail)
    with pytest.raises(RunnerError, match="protobuf failed"):
        OnnxRuntimeRunner(exported(), threads=1, cache=tmp_path)
    usage_of = shutil.disk_usage

    def full_cache(path: Path) -> Any:
        return usage_of(path)._replace(free=1000 if tmp_path in path.parents else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", full_cache)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        runner = OnnxRuntimeRunner(exported(), threads=1, cache=tmp_path)
    with runner, OnnxRuntimeRunner(exported(), threads=1) as fresh:
        assert torch.equal(runner(fed(*inputs)), fresh(fed(*inputs)))


def test_the_versions_and_settings_are_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    def opened(**settings: Any) -> int:
        with OnnxRuntimeRunner(exported(), threads=1, cache=tmp_path, **settings):
            return len(entries(tmp_path))

    assert opened() == opened() == 1
    assert opened(session_entries={"session.disable_prepacking": "1"}) == 2
    monkeypatch.setattr(onnxruntime_runner, "_PREPARED_FORMAT", 0)
    assert opened() == 3
    monkeypatch.setattr(onnxruntime, "__version__", "1.99")
    assert opened() == 4


def test_what_the_runtime_refuses_of_an_entry_names_the_model_and_the_cure(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, source: Path, **__: Any) -> None:
        raise RunnerError(f"onnxruntime refuses {source}: {path.name}")

    cache = tmp_path / "cache"
    shutil.copytree(healthy, cache)
    monkeypatch.setattr(onnxruntime_runner, "open_session", refuse)
    expected = rf"refuses {re.escape(str(exported()))}: .*; ditas-cache verify removes what"
    with pytest.raises(RunnerError, match=expected.replace("; ditas", ": ditas")):
        OnnxRuntimeRunner(exported(), threads=1, cache=cache)


def test_a_link_is_opened_as_its_file(tmp_path: Path) -> None:
    """A hub's snapshots are links to files elsewhere."""
    link = tmp_path / "snapshot" / "out.onnx"
    link.parent.mkdir()
    link.symlink_to(exported())
    inputs = example_inputs()
    outputs = []
    for path in (exported(), link):
        with OnnxRuntimeRunner(path, threads=2, cache=tmp_path / path.parent.name) as runner:
            outputs.append(runner(fed(*inputs)))
    assert torch.equal(*outputs)


def test_tensors_beyond_the_end_of_their_file_are_one_line(tmp_path: Path) -> None:
    model = onnx.load(str(exported()))
    path = tmp_path / "out.onnx"
    onnx.save(
        model, str(path), save_as_external_data=True, location="out.data", size_threshold=4096
    )
    data = tmp_path / "out.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(OnnxExportError) as caught:
        OnnxRuntimeRunner(path, threads=2, cache=tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
