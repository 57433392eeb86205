"""What a job may replace: nothing that it reads, and only files of its own kind made here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_fixture import TINY, exported, exported_reference, quantized_tiny_dit, tiny_dit
from safetensors.torch import save_file
from typer.testing import CliRunner

from ditas_export.artifact_files import atomic_path, save_tensors, sole_process
from ditas_export.cli import build, compare, sample
from ditas_export.engine.make import job_files as build_files
from ditas_export.engine.metadata import EngineMetadata, is_plan_file, metadata_path
from ditas_export.engine.options import BuildOptions
from ditas_export.errors import ArtifactError
from ditas_export.evaluation.compare import job_files as compare_files
from ditas_export.evaluation.evaluate import job_files as evaluate_files
from ditas_export.evaluation.options import CompareOptions, EvaluateOptions
from ditas_export.generation.job import _check_files
from ditas_export.generation.options import SampleOptions
from ditas_export.job_files import JobFiles, Output, same_file
from ditas_export.onnx_export.form import FileForm
from ditas_export.options import ExportOptions
from ditas_export.preflight import check_files

Make = Callable[[Path], None]


def options(folder: Path, **changes: Any) -> ExportOptions:
    return ExportOptions(**{"output": folder / "out.onnx", "model": "other/model", **changes})


def write(text: str) -> Make:
    return lambda path: path.write_text(text) and None


def copy(source: Path) -> Make:
    return lambda path: path.write_bytes(source.read_bytes()) and None


def states(kind: str) -> Make:
    return lambda path: save_tensors(path, {}, file_format=kind, header={})


@cache
def quantized_bytes() -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        quantized_tiny_dit(tiny_dit()).save(Path(file.name))
        return Path(file.name).read_bytes()


FOREIGN: dict[str, Make] = {
    "text": write("notes"),
    "nothing": lambda path: path.touch(),
    "JSON": write('{"format": "somebody else\'s 1"}'),
    "JSON list": write("[]"),
    "tensors": lambda path: save_file({}, path),
    "an exported model": lambda path: copy(exported())(path),
    "a float model": lambda path: copy(exported_reference())(path),
    "a quantized model": lambda path: path.write_bytes(quantized_bytes()) and None,
    "states": states("ditas-export calibration states 2"),
    "manifest": write('{"format": "ditas-export manifest 1"}'),
}

OUTPUTS: dict[str, tuple[str, str, set[str]]] = {
    "output": ("out.onnx", "", {"an exported model"}),
    "manifest": ("out.json", "", {"manifest"}),
    "rejected": ("out.rejected.onnx", "", {"an exported model"}),
    "save_calibration": ("kept.states", "save_calibration", {"states"}),
    "save_artifact": ("kept.model", "save_artifact", {"a quantized model"}),
    "reference": ("fp32.onnx", "reference", {"a float model"}),
    "vae": ("vae_decoder.onnx", "", set()),
}


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_export_replaces_its_own_kind_only(tmp_path: Path, output: str, content: str) -> None:
    name, option, own = OUTPUTS[output]
    path = tmp_path / name
    FOREIGN[content](path)
    before = path.read_bytes()
    asked = options(tmp_path, vae="hub/vae", **({option: path} if option else {}))
    if content in own:
        check_files(asked)
    else:
        with pytest.raises(ArtifactError, match=r"is there already.*delete it, or name another"):
            check_files(asked)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "kind", ["ditas-export calibration states 1", "ditas-export calibration states 2"]
)
def test_an_earlier_version_of_the_kind_is_ours(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "kept"
    states(kind)(path)
    check_files(options(tmp_path, save_calibration=path))


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


@pytest.mark.parametrize("reach", [None, link, os.link])
@pytest.mark.parametrize("given", ["model", "calibration", "artifact"])
def test_no_output_is_an_input(tmp_path: Path, given: str, reach: Any) -> None:
    """By its own name, through a symbolic and through a hard link."""
    path, output = tmp_path / "input", tmp_path / "output"
    path.write_bytes(quantized_bytes())
    if reach is None:
        output = path
    elif reach is link:
        link(output, path)
    else:
        os.link(path, output)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=f"it is the input --{given}; name another"):
        check_files(options(tmp_path, save_artifact=output, **{given: path}))
    assert path.read_bytes() == before


def test_two_outputs_have_two_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    asked = options(
        tmp_path,
        save_artifact=tmp_path / "folder" / "a",
        save_calibration=tmp_path / "link" / "a",
    )
    with pytest.raises(ArtifactError, match="two outputs have one name"):
        check_files(asked)
    with pytest.raises(ArtifactError, match="two outputs have one name"):
        check_files(options(tmp_path, output=tmp_path / "out.json"))


def test_the_working_folder_holds_no_file_of_the_job(tmp_path: Path) -> None:
    inside = tmp_path / "out.onnx.work" / "states"
    for name in ("calibration", "save_calibration", "reference"):
        inside.parent.mkdir(exist_ok=True)
        if name == "calibration":
            inside.touch()
        with pytest.raises(ArtifactError, match="which is removed when the job is done"):
            check_files(options(tmp_path, **{name: inside}))
        inside.unlink(missing_ok=True)


def test_a_working_folder_of_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out.onnx.work"
    folder.mkdir()
    (folder / "solved-0123456789abcdef").mkdir()
    check_files(options(tmp_path))
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="is no folder of unfinished work"):
        check_files(options(tmp_path))
    assert (folder / "thesis.tex").read_text() == "years of work"
    (folder / "thesis.tex").rename(folder / "solved-0123456789abcdef" / "thesis.tex")
    with pytest.raises(ArtifactError, match=r"out\.onnx\.work is there already, and is no folder"):
        check_files(options(tmp_path))
    shutil.rmtree(folder)
    (tmp_path / ".out.onnx.work.done").mkdir()
    (tmp_path / ".out.onnx.work.done" / "thesis.tex").touch()
    with pytest.raises(ArtifactError, match=r"\.done is there already, and is no folder of unfini"):
        check_files(options(tmp_path))


@pytest.mark.parametrize("name", ["out.onnx.work", ".out.onnx.work.done", ".out.onnx.partial"])
def test_no_output_has_a_name_that_the_job_writes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="is the name of something that the job itself writes"):
        check_files(options(tmp_path, save_artifact=tmp_path / name))


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("states", "ditas-export calibration states 1"),
        ("states", "ditas-export sampled batches 2"),
        ("progress", "ditas-export calibration progress 4"),
    ],
)
def test_what_an_earlier_version_left_half_done_is_refused(
    tmp_path: Path, suffix: str, kind: str
) -> None:
    states(kind)(tmp_path / f"out.onnx.{suffix}")
    with pytest.raises(ArtifactError, match=r"interrupted run of an earlier version.*delete it"):
        check_files(options(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a device, pipe or socket"),
        (os.mkdir, "is a folder; name a file"),
        (lambda path: path.symlink_to("nowhere"), "links to nothing"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "fp32.onnx")
    with pytest.raises(ArtifactError, match=message):
        check_files(options(tmp_path, reference=tmp_path / "fp32.onnx"))


def test_devices_long_names_and_missing_folders_are_refused(tmp_path: Path) -> None:
    for path, message in (
        (Path("/dev/null"), "is a device"),
        (tmp_path / ("a" * 240 + ".onnx"), "is too long; use 231 bytes at most"),
        (tmp_path / ("a" * 300 + ".onnx"), "is too long; use 231 bytes at most"),
        (tmp_path / "no" / "such.onnx", "does not exist; create it first"),
        (exported() / "out.onnx", "is no folder; name another"),
    ):
        with pytest.raises(ArtifactError, match=message):
            check_files(options(tmp_path, reference=path))


@pytest.mark.parametrize("name", ["my.pt", "my.safetensors", "MY.CKPT", "my"])
def test_a_checkpoint_for_an_output_is_asked_about(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"weights")
    with pytest.raises(ArtifactError, match=rf"did you mean --model {path}\?"):
        check_files(ExportOptions(output=path))
    path.unlink()
    if path.suffix:
        with pytest.raises(ArtifactError, match=r"has the name of a checkpoint; did you mean"):
            check_files(ExportOptions(output=path))


def test_a_hub_id_for_an_output_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = options(tmp_path, output=Path("facebook/DiT-XL-2-256"), model="digits")
    with pytest.raises(ArtifactError, match="did you mean --model facebook/DiT-XL-2-256"):
        check_files(asked)


def test_requests_that_exclude_each_other(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for others, message in (
        ({"calibration": file}, "needs no --calibration"),
        ({"save_calibration": tmp_path / "new"}, "leave out --save-calibration"),
    ):
        with pytest.raises(ArtifactError, match=message):
            check_files(options(tmp_path, artifact=file, **others))


def metadata(plan: Path, **changes: Any) -> None:
    EngineMetadata(
        product="rtx", version="1.7.1.116", plan_bytes=6, onnx_name="m.onnx",
        onnx_sha256="0" * 64, model=TINY, form=FileForm(float_type="fp32"), options=BuildOptions(),
        gpu=None, layers=None, **changes,
    ).save(metadata_path(plan))  # fmt: skip


PLAN_HASH = "7a9ce3ac3a1b5bf1d4f5d8a3e8f4e0cd5ac3a6a6b4f6c3b1e2d9b0a1c2d3e4f5"


def test_a_plan_is_ours_with_our_metadata_beside_it(tmp_path: Path) -> None:
    from ditas_export.artifact_files import sha256_of_file

    plan = tmp_path / "out.plan"
    plan.write_bytes(b"a plan")
    files = build_files(exported(), plan, BuildOptions())
    with pytest.raises(ArtifactError, match=r"out\.plan is there already, and is no earlier eng"):
        files.check()
    metadata(plan, plan_sha256=sha256_of_file(plan))
    files.check()
    metadata(plan, plan_sha256=PLAN_HASH)
    assert not is_plan_file(plan)
    metadata_path(plan).write_text("{}")
    plan.unlink()
    with pytest.raises(ArtifactError, match=r"out\.plan\.json is there already"):
        files.check()


def test_a_build_replaces_neither_its_model_nor_anything_by_its_timing_cache(
    tmp_path: Path,
) -> None:
    model = tmp_path / "m.onnx"
    copy(exported())(model)
    before = model.read_bytes()
    result = CliRunner().invoke(build.app, [str(model), "-o", str(model)])
    assert (result.exit_code, model.read_bytes()) == (2, before)
    assert "it is the input MODEL.onnx; name another" in " ".join(result.stderr.split())
    with pytest.raises(ArtifactError, match="it is the input"):
        build_files(model, tmp_path / "a.plan", BuildOptions(timing_cache=model)).check()
    cache = tmp_path / "timings"
    cache.write_bytes(b"whatever a builder keeps")
    build_files(model, tmp_path / "a.plan", BuildOptions(timing_cache=cache)).check()


def test_a_comparison_replaces_comparisons_and_inputs_only(tmp_path: Path) -> None:
    reference, model = exported_reference(), exported()
    for words in (["--json", "x"], ["--gen-inputs", "x"]):
        path = tmp_path / "x"
        path.write_text('{"mine": 1}')
        result = CliRunner().invoke(
            compare.app, [str(reference), str(model), words[0], str(path), "--steps", "2"]
        )
        assert (result.exit_code, path.read_text()) == (2, '{"mine": 1}')
    files = compare_files(
        CompareOptions(reference=reference, model=model, gen_inputs=tmp_path / "a"),
        tmp_path / "b",
    )
    feed: dict[str, Any] = {"latents": {}, "timesteps": {}, "class_labels": {}}
    (tmp_path / "a").write_text(json.dumps([feed, feed]))
    (tmp_path / "b").write_text('{"format": "ditas-export comparison 1"}')
    files.check()
    (tmp_path / "a").write_text(json.dumps([feed | {"other": {}}]))
    with pytest.raises(ArtifactError, match="no earlier inputs for Polygraphy"):
        files.check()


def test_samples_replace_their_own_stack_only(tmp_path: Path) -> None:
    stack = tmp_path / "mine.npz"
    np.savez(stack, np.zeros(3))
    before = stack.read_bytes()
    words = [str(exported()), "-o", str(tmp_path / "out"), "--steps", "2", "--classes", "1"]
    result = CliRunner().invoke(sample.app, [*words, "--npz", str(stack)])
    assert (result.exit_code, stack.read_bytes()) == (2, before)
    assert not (tmp_path / "out").exists()
    stack.unlink()
    for _ in range(2):  # the second replaces the first
        result = CliRunner().invoke(sample.app, [*words, "--npz", str(stack)])
        assert result.exit_code == 0, result.stderr
    for name in ("000000.png", "grid.png", "samples.json"):
        result = CliRunner().invoke(sample.app, [*words, "--npz", str(tmp_path / "out" / name)])
        assert result.exit_code == 2
        assert "has the name of another output" in " ".join(result.stderr.split())


def test_one_job_at_a_time(tmp_path: Path) -> None:
    output = Output(path=tmp_path / "out.onnx", what="model", is_ours=lambda _: True)
    files = JobFiles(outputs=(output,), keeps_work=True)
    with files.working() as work:
        part = work.part("solved", "0" * 64)
        who = rf"process {os.getpid()} on {socket.gethostname()} \(.+, since .+\)"
        message = rf"{who} is writing .*out\.onnx now; wait for it, stop it, or name another"
        with pytest.raises(ArtifactError, match=message), files.working():
            pass
        assert part.is_dir()  # the one that is refused takes nothing away
    assert list(tmp_path.iterdir()) == []  # nothing was kept in it


def test_work_goes_whole_and_nothing_else_does(tmp_path: Path) -> None:
    output = Output(path=tmp_path / "out.onnx", what="model", is_ours=lambda _: True)
    files = JobFiles(outputs=(output,), keeps_work=True)
    with files.working() as work:
        for kind in ("sampled", "solved", "written"):
            with atomic_path(work.part(kind, "0" * 64) / "file") as partial:
                partial.write_text(kind)
        work.remove("written")
        assert {path.name[:7] for path in work.path.iterdir()} == {"lock", "sampled", "solved-"}
    assert work.path.is_dir()
    (tmp_path / ".out.onnx.work.done").mkdir()  # of a process that was killed while it removed
    (tmp_path / "out.onnx.workshop").write_text("of somebody else")
    with files.working() as work:
        work.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx.workshop"]


def test_paths_of_one_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "soft").symlink_to(file)
    os.link(file, tmp_path / "hard")
    for name in ("soft", "hard", "./file", "../" + tmp_path.name + "/file"):
        assert same_file(file, tmp_path / name), name
    assert not same_file(file, tmp_path / "other")
    assert same_file(tmp_path / "new", tmp_path / "." / "new")


def no_file(path: Path, kind: str) -> None:
    """Make what is no file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/full")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("command", ["sample", "compare", "inputs", "evaluate", "build", "image"])
def test_no_command_writes_to_what_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    output, folder = Path("output"), tmp_path / "images"
    if command == "image":
        folder.mkdir()
        output = folder / "000003.png"
        (folder / "samples.json").write_text("{}")
        monkeypatch.chdir(folder)
    no_file(Path(output.name), kind)
    pair: Any = {"reference": Path("a.onnx"), "model": Path("b.onnx")}
    both: Any = {"samples": Path("a.npz"), "reference": Path("b.npz")}
    checks = {
        "sample": lambda: _check_files(SampleOptions(model="digits", output=folder, npz=output)),
        "compare": lambda: compare_files(CompareOptions(**pair), output).check(),
        "inputs": lambda: compare_files(CompareOptions(**pair, gen_inputs=output)).check(),
        "evaluate": lambda: evaluate_files(EvaluateOptions(**both), output).check(),
        "build": lambda: build_files(Path("a.onnx"), output, BuildOptions()).check(),
        "image": lambda: _check_files(SampleOptions(model="digits", output=folder)),
    }
    with pytest.raises(ArtifactError, match=r"is a folder|is a device, pipe or socket"):
        checks[command]()


def test_a_pipe_in_the_place_of_unfinished_work_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".out.partial")
    with (
        pytest.raises(ArtifactError, match=r"\.out\.partial is there, and is no file; delete it"),
        atomic_path(tmp_path / "out") as partial,
    ):
        partial.write_text("would wait for a reader")
    os.mkfifo(tmp_path / "lock")
    with (
        pytest.raises(ArtifactError, match="lock is there, and is no file; delete it"),
        sole_process(tmp_path / "lock", what=tmp_path / "out"),
    ):
        pass
