"""An export that is stopped, refused or rejected late: what is kept, and what goes on from it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from quantized_fixture import save_checkpoint, tiny_dit

from ditas_export import export_files, pipeline
from ditas_export.artifact_files import sha256_of_file
from ditas_export.calibration.states import CalibrationStates
from ditas_export.engine.build import BuiltEngine
from ditas_export.engine.make import make_engine
from ditas_export.engine.metadata import metadata_of
from ditas_export.engine.options import BuildOptions
from ditas_export.engine.products import RTX
from ditas_export.errors import ArtifactError, QuantizationError
from ditas_export.evaluation import held_out, ties
from ditas_export.families.identity import identity_of
from ditas_export.onnx_export import export as onnx_export
from ditas_export.onnx_export.external_data import external_files, sha256_of_onnx
from ditas_export.onnx_export.manifest import require_own_manifest
from ditas_export.options import ExportOptions
from ditas_export.pipeline import ExportResult, export
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner


def options(folder: Path, checkpoint: Path, **changes: Any) -> ExportOptions:
    small = {"steps": 4, "samples": 2, "walk_tokens": 100, "method": "linear", "device": "cpu"}
    return ExportOptions(
        **{"output": folder / "out.onnx", "model": str(checkpoint), **small, **changes}
    )


Asked = tuple[ExportOptions, ExportResult]

STATS = "out.stats.safetensors"


@pytest.fixture(scope="module")
def clean(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    asked = options(tmp_path_factory.mktemp("clean"), checkpoint)
    return asked, export(asked)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def without_seconds(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    del content["seconds"]
    return content


STAGES = {
    "modulation": (pipeline, "quantize_adaln"),
    "folding": (export_files, "fold_smoothing"),
    "writing": (export_files, "export_onnx"),
    "verifying": (export_files, "verify_file"),
    "naming": (export_files, "install"),
    "telling": (export_files, "write_manifest"),  # kept by now; the final one is written anew
}


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts what is sampled and solved."""
    counter = Mock()
    for name in ("collect_states", "quantize_model"):
        function = getattr(pipeline, name)
        spy = Mock(side_effect=function)
        counter.attach_mock(spy, name)
        monkeypatch.setattr(pipeline, name, spy)
    return counter


def test_no_stage_after_the_walk_loses_it(
    clean: Asked, checkpoint: Path, tmp_path: Path, reached: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in one stage after the other, the job samples and walks once."""
    kept = tmp_path / "kept"
    asked = options(tmp_path, checkpoint, adaln=4, save_artifact=kept)
    for stage, (module, name) in STAGES.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                export(asked)
        left = names(tmp_path)
        assert "out.onnx.work" in left, stage
        assert ("out.onnx" in left) == (stage == "telling")
        assert "out.json" not in left, stage
    assert [call[0] for call in reached.mock_calls] == ["collect_states", "quantize_model"]
    export(asked)
    assert names(tmp_path) == {"out.onnx", "out.json", STATS, "kept"}
    assert len(reached.mock_calls) == 2
    require_own_manifest(asked.output)


def test_a_verification_runs_no_seed_twice(
    clean: Asked, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first step of every seed of every model: float, the file, a bare session."""
    asked, result = clean
    again = options(tmp_path, checkpoint)
    spy = Mock(side_effect=held_out.trajectory)
    monkeypatch.setattr(held_out, "trajectory", spy)
    assert len(result.verification.final.seeds_db) == 2
    for finished in range(2 * 3):
        at = ("held out" if finished < 2 else "verify", 25 * finished + 1)

        def stop(stage: str, done: int, _total: int, at: tuple[str, int] = at) -> None:
            if (stage, done) == at:
                raise KeyboardInterrupt

        spy.reset_mock()
        with pytest.raises(KeyboardInterrupt):
            export(again, on_progress=stop)
        assert spy.call_count == (1 if finished == 0 else 2)  # one to its end, and the next
        assert len(list(tmp_path.glob("*.work/*/*-100?.safetensors"))) == finished
    export(again)
    assert without_seconds(again.manifest_path) == without_seconds(asked.manifest_path)
    assert again.output.read_bytes() == asked.output.read_bytes()


def test_calibration_states_are_saved_by_a_resumed_run_too(
    checkpoint: Path, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("quantize", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(options(tmp_path, checkpoint), on_progress=stop)
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(KeyboardInterrupt):
        export(options(tmp_path, checkpoint, save_calibration=first), on_progress=stop)
    states = CalibrationStates.load(first, identity=identity_of(tiny_dit()))
    assert states.settings.steps == 4
    other = options(
        tmp_path, checkpoint, output=tmp_path / "b.onnx", calibration=first, save_calibration=second
    )
    with pytest.raises(KeyboardInterrupt):
        export(other, on_progress=stop)
    assert second.read_bytes() == first.read_bytes()


def test_a_refusal_after_the_walk_keeps_it_and_says_how_to_go_on(
    tmp_path: Path, reached: Mock
) -> None:
    """A modulation bias that folds beyond float16, divided by a small s: known only when s is."""
    model = tiny_dit()
    model.blocks[0].attn.qkv.weight.mul_(50)  # type: ignore[union-attr, operator]
    model.blocks[0].adaLN_modulation[1].bias[:96] = 1e4  # type: ignore[union-attr, index, operator]
    checkpoint = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, model)
    smooth = {"method": "ditas", "rank": 2, "alpha_grid": (0.0,)}
    with pytest.raises(QuantizationError) as caught:
        export(options(tmp_path, checkpoint, precision="fp16", **smooth))
    message = str(caught.value)
    assert "float16" in message
    assert f"The solved model is kept in {tmp_path / 'out.onnx.work'}" in message
    assert "the same command, with that mended, goes on from it" in message
    export(options(tmp_path, checkpoint, precision="fp32", **smooth))
    assert [call[0] for call in reached.mock_calls] == ["collect_states", "quantize_model"]
    assert names(tmp_path) == {"model.safetensors", "out.onnx", "out.json", STATS}


def test_a_file_that_does_not_match_is_put_aside(
    clean: Asked, checkpoint: Path, tmp_path: Path, reached: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older file stays as it was, its manifest too; another form goes on from the model."""
    asked, _ = clean
    for path in (asked.output, asked.manifest_path):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(ties, "MOST_EXCESS_DB", -500.0)
        result = export(options(tmp_path, checkpoint, layout="int8"))
    assert result.file == tmp_path / "out.rejected.onnx"
    assert result.manifest["verified"] is False
    assert result.manifest["not_verified_because"] == "it does not compute what was calibrated"
    for path in (asked.output, asked.manifest_path):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    require_own_manifest(result.file)
    assert result.manifest["file"]["name"] == "out.rejected.onnx"
    export(options(tmp_path, checkpoint))
    assert [call[0] for call in reached.mock_calls] == ["collect_states", "quantize_model"]
    assert (tmp_path / "out.onnx").read_bytes() == asked.output.read_bytes()
    rejected = {f"out.rejected.{end}" for end in ("onnx", "json", "stats.safetensors")}
    assert names(tmp_path) == {"out.onnx", "out.json", STATS, *rejected}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_file_that_nothing_runs_says_that_it_is_not_verified(
    checkpoint: Path, tmp_path: Path, hide_openvino: Any, precision: str
) -> None:
    hide_openvino()
    manifest = export(options(tmp_path, checkpoint, precision=precision)).manifest
    assert manifest["verified"] is (precision == "fp32")
    expected = None if precision == "fp32" else "no runtime that is installed runs a file of bf16"
    assert manifest["not_verified_because"] == expected


def check_pair(path: Path) -> str:
    """A file past the inline limit and its data are of one another at this moment."""
    with OnnxRuntimeRunner(path, threads=1):
        return sha256_of_onnx(path)


def test_a_pair_replaces_a_pair_without_a_moment_of_disagreement(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before every operation on files; what lies there runs, and is the old or the new."""
    monkeypatch.setattr(onnx_export, "LARGEST_INLINE_BYTES", 100_000)
    export(options(tmp_path, checkpoint))
    path = tmp_path / "out.onnx"
    seen = {check_pair(path)}
    (old,) = external_files(path)
    asked = options(tmp_path, checkpoint, ranges="static", layout="int8")
    replaced, stopped_at = os.replace, set()

    def stop_once(source: Any, target: Any, **named: Any) -> None:
        replaced(source, target, **named)
        if Path(target).parent == tmp_path and str(target) not in stopped_at:
            stopped_at.add(str(target))
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop_once)
    for _ in range(4):  # the data, the file, the statistics, the manifest
        with pytest.raises(KeyboardInterrupt):
            export(asked)
        seen.add(check_pair(path))
    export(asked)
    assert len(seen) == 2
    (new,) = external_files(path)
    assert new != old
    assert names(tmp_path) == {"out.onnx", "out.json", STATS, new.name}
    require_own_manifest(path)


def test_a_plan_replaces_a_plan_without_a_moment_of_disagreement(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every rename; the plan that lies there has its own metadata, old or new."""
    file, plan = tmp_path / "out.onnx", tmp_path / "out.plan"
    export(options(tmp_path, checkpoint))

    def make(content: bytes) -> None:
        def build(_onnx: Path, partial: Path) -> BuiltEngine:
            partial.write_bytes(content)
            return BuiltEngine(size_bytes=len(content), version="1.2.3", log="")

        make_engine(file, plan, product=RTX, options=BuildOptions(), layout=None, build=build)

    replaced, seen = os.replace, []
    make(b"a plan")
    for last in range(1, 4):  # both metadata, the plan, its own metadata
        done = []

        def stop(source: Any, target: Any, *, done: list[Any] = done, last: int = last) -> None:
            replaced(source, target)
            done.extend([target] if Path(target).parent == tmp_path else [])
            if len(done) == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                make(b"plan %d" % last)
        assert metadata_of(plan).plan_sha256 == sha256_of_file(plan)
        seen.append(plan.read_bytes())
    assert seen == [b"a plan", b"plan 2", b"plan 3"]
    make(b"at last")
    assert metadata_of(plan).replaces is None
    assert names(tmp_path) == {"out.onnx", "out.json", STATS, "out.plan", "out.plan.json"}


def test_a_rejected_pair_has_data_of_its_own(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "LARGEST_INLINE_BYTES", 100_000)
    monkeypatch.setattr(ties, "MOST_EXCESS_DB", -500.0)
    result = export(options(tmp_path, checkpoint))
    (data,) = external_files(result.file)
    assert data.name.startswith("out.rejected.onnx.")
    check_pair(result.file)
    require_own_manifest(result.file)


def test_a_second_run_of_one_output_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    asked, messages = options(tmp_path, checkpoint), []

    def second(stage: str, _done: int, _total: int) -> None:
        if stage == "sample" and not messages:
            with pytest.raises(ArtifactError) as caught:
                export(asked)
            messages.append(str(caught.value))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(asked, on_progress=second)
    assert f"process {os.getpid()} on {socket.gethostname()} (" in messages[0]
    assert f"({Path(sys.argv[0]).name}" in messages[0]
    assert ", since 20" in messages[0]
    assert "wait for it, stop it, or name another" in messages[0]


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_signals_are_one_line_and_leave_what_goes_on(
    checkpoint: Path, tmp_path: Path, how: signal.Signals, code: int
) -> None:
    words = [sys.executable, "-m", "ditas_export.cli.export", "--model", str(checkpoint)]
    words += ["--steps", "1000", "--samples", "8", "--device", "cpu", "--quiet"]
    process = subprocess.Popen(
        [*words, str(tmp_path / "out.onnx")],
        stderr=subprocess.PIPE,
        text=True,
        # What a shell runs in the background ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.work/sampled-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert errors.split("\n")[:-1] == [
        "interrupted. Run the same command again to go on where it stopped."
    ]
    assert names(tmp_path) <= {"out.onnx.work"}
