"""The builder process and its parent, driven by a stand-in for classic TensorRT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantized_fixture import exported

from ditas_export.engine import child
from ditas_export.engine.build import build_engine
from ditas_export.engine.options import BatchRange, BuildOptions
from ditas_export.engine.products import RTX, TENSORRT
from ditas_export.errors import ArtifactError, EngineError

FAKES = Path(__file__).parent / "fake_tensorrt"

Behave = Callable[[str], None]


@pytest.fixture
def behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behave:
    """Put the stand-in where parent and child find it; the function says what goes wrong."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("FAKE_TENSORRT_RECORD", str(tmp_path / "calls.json"))
    return lambda behaviour: monkeypatch.setenv("FAKE_TENSORRT_BEHAVIOUR", behaviour)


def calls(folder: Path) -> list[Any]:
    return json.loads((folder / "calls.json").read_text())


def build(folder: Path, **options: Any) -> None:
    build_engine(exported(), folder / "out.plan", product=TENSORRT, options=BuildOptions(**options))


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"calls.json"}


@pytest.mark.usefixtures("behave")
def test_options_arrive(tmp_path: Path) -> None:
    steps = []
    built = build_engine(
        exported(),
        tmp_path / "out.plan",
        product=TENSORRT,
        options=BuildOptions(
            batch=BatchRange(smallest=1, usual=3, largest=4),
            workspace_gib=0.5,
            opt_level=0,
            timing_cache=tmp_path / "timings",
            version_compatible=True,
            refit=True,
        ),
        on_progress=lambda *step: steps.append(step),
    )
    assert (tmp_path / "out.plan").read_bytes() == b"a plan"
    assert (built.size_bytes, built.version) == (6, "10.13.3.9")
    assert calls(tmp_path) == [
        ["network", 2],  # 1 << STRONGLY_TYPED
        ["no flag", "TF32"],
        ["pool", "WORKSPACE", 2**29],
        ["set", "builder_optimization_level", 0],
        ["flag", "VERSION_COMPATIBLE"],
        ["flag", "REFIT"],
        ["timing cache", "", False],
        ["parse", exported().name],
        ["set", "profiling_verbosity", 2],
        [
            "profile",
            {
                "latents": [[1, 3, 8, 8], [3, 3, 8, 8], [4, 3, 8, 8]],
                "timesteps": [[1], [3], [4]],
                "class_labels": [[1], [3], [4]],
            },
        ],
    ]
    assert steps[0] == ("Building engine", 0, 3)
    assert steps[-1] == ("Building engine", 3, 3)
    assert ("Timing", 1000, 1000) in steps
    assert "Too deep" not in {phase for phase, _, _ in steps}


@pytest.mark.usefixtures("behave")
def test_what_is_not_asked_for_is_not_set(tmp_path: Path) -> None:
    build(tmp_path)
    assert {call[0] for call in calls(tmp_path)} == {
        "network",
        "no flag",
        "parse",
        "set",
        "profile",
    }
    assert leftovers(tmp_path) == {"out.plan"}


@pytest.mark.usefixtures("behave")
def test_the_timing_cache_grows(tmp_path: Path) -> None:
    timings = tmp_path / "timings"
    for _ in range(2):
        build(tmp_path, timing_cache=timings)
    assert timings.read_bytes() == b"+timed+timed"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("none", r"could not build .*: ERROR Error Code 10: Could not find any tactic"),
        ("silent none", "could not build .*: the builder gave no reason"),
        ("parser", "could not build .*: In node 3 .*UNSUPPORTED_NODE"),
        ("no GPU", "could not build .*: TypeError: pybind11.* returned nullptr"),
        ("no libraries", "its libraries do not load .*libnvinfer.so.10.*; install it again"),
        ("old", "version 10.2.1 is too old; install 10.3 or later"),
        ("exits", "could not build .*: the library gave up"),
    ],
)
def test_a_refusal_is_one_line(tmp_path: Path, behave: Behave, behaviour: str, reason: str) -> None:
    behave(behaviour)
    with pytest.raises(EngineError, match=reason) as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    assert not leftovers(tmp_path)


def test_a_foreign_timing_cache_is_refused_and_left_alone(tmp_path: Path, behave: Behave) -> None:
    behave("foreign cache")
    (tmp_path / "timings").write_bytes(b"of another GPU")
    with pytest.raises(EngineError, match="timing cache is of another GPU or version"):
        build(tmp_path, timing_cache=tmp_path / "timings")
    assert (tmp_path / "timings").read_bytes() == b"of another GPU"


@pytest.mark.usefixtures("behave")
def test_options_that_a_product_lacks_are_refused_before_building(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="TensorRT has no --compute-capability"):
        build(tmp_path, compute_capabilities=("8.9",))
    for options, name in (
        (BuildOptions(timing_cache=tmp_path / "x"), "timing-cache"),
        (BuildOptions(version_compatible=True), "version-compatible"),
    ):
        with pytest.raises(EngineError, match=f"TensorRT for RTX has no --{name}"):
            RTX.require_options(options)
    with pytest.raises(ArtifactError, match="does not exist"):
        build_engine(exported(), tmp_path / "nowhere" / "out.plan", product=TENSORRT)
    assert not leftovers(tmp_path)


def test_cancelling_goes_through_the_monitor(tmp_path: Path, behave: Behave) -> None:
    behave("slow")

    def interrupt(phase: str, done: int, steps: int) -> None:
        if phase == "Timing" and done > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(exported(), tmp_path / "out.plan", product=TENSORRT, on_progress=interrupt)
    assert calls(tmp_path)[-1][0] == "cancelled"
    assert not leftovers(tmp_path)


def test_a_builder_that_does_not_stop_is_killed(
    tmp_path: Path, behave: Behave, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave("deaf")
    monkeypatch.setattr(child, "SECONDS_TO_STOP", 0.2)

    def interrupt(phase: str, done: int, steps: int) -> None:
        if phase == "Timing" and done == 3:  # the last that the stand-in tells before it sleeps
            time.sleep(0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(exported(), tmp_path / "out.plan", product=TENSORRT, on_progress=interrupt)
    what, process = calls(tmp_path)[-1]
    assert what == "sleeps"
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert not leftovers(tmp_path)


def test_ctrl_c_ends_the_command_with_130(tmp_path: Path, behave: Behave) -> None:
    behave("slow")
    plan = tmp_path / "out.plan"
    command = [sys.executable, "-m", "ditas_export.cli.build", str(exported()), "-o", str(plan)]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # What a shell runs in the background ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120  # a first start from a cold disk
    while not (tmp_path / "calls.json").exists():
        assert time.monotonic() < deadline, "the stand-in was not called"
        time.sleep(0.05)
    threading.Event().wait(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and child
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "No engine was written" in err
    assert "Traceback" not in err
    assert calls(tmp_path)[-1][0] == "cancelled"
    assert not leftovers(tmp_path)
