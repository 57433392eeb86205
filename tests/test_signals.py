"""Ctrl-C at any moment: one line and 130, alone and on ranks; nothing once the work is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ditas_export.cli.interrupts import Interruption, interruptible

INTERRUPTED_AT = """
import atexit, os, signal, sys

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.environ["AT"] = "nothing"
            interrupt()

if os.environ.get("AT") == "the end":
    atexit.register(interrupt)  # the first to be registered runs last
elif "AT" in os.environ:
    sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize.py; its process interrupts itself where it imports a module."""

GOES_ON = "interrupted. Run the same command again to go on where it stopped.\n"


def started(words: list[str], folder: Path, at: str | None = None) -> subprocess.Popen[str]:
    """Start Python in a session of its own, with Ctrl-C as in a terminal."""
    (folder / "sitecustomize.py").write_text(INTERRUPTED_AT)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "DITAS_EXPORT_CACHE": str(folder / "cache")}
    if at is not None:
        variables["AT"] = at
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell runs in the background ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def export_words(checkpoint: Path, output: Path) -> list[str]:
    """What samples long enough to be interrupted."""
    words = ["-m", "ditas_export.cli.export", "--model", str(checkpoint), "--steps", "1000"]
    return [*words, "--samples", "8", "--device", "cpu", "--quiet", str(output)]


@pytest.mark.parametrize(
    ("at", "line"),
    [
        ("typer", "interrupted.\n"),
        ("rich.progress", "interrupted.\n"),
        ("ditas_export.cli.recipes", "interrupted.\n"),
        ("torch", GOES_ON),
        ("torch._C", GOES_ON),
        ("ditas_export.pipeline", GOES_ON),
    ],
)
def test_an_interrupt_of_the_start_is_one_line(
    checkpoint: Path, tmp_path: Path, at: str, line: str
) -> None:
    process = started(export_words(checkpoint, tmp_path / "out.onnx"), tmp_path, at)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, line)


def test_an_interrupt_of_the_end_changes_nothing(tmp_path: Path) -> None:
    process = started(["-m", "ditas_export.cli.cache", "list"], tmp_path, "the end")
    found, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert found.endswith(f"in {tmp_path / 'cache'}\n")


def on_two_ranks(words: list[str], folder: Path, at: str | None = None) -> subprocess.Popen[str]:
    """Start ranks whose output torchrun keeps from its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return started([*launcher, "--redirects", "3", "--log-dir", str(folder), *words], folder, at)


def said(folder: Path) -> dict[int, str]:
    """What each rank printed as errors."""
    return {rank: next(folder.glob(f"*/*/{rank}/stderr.log")).read_text() for rank in range(2)}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ranks_that_are_interrupted_at_their_start_speak_once(
    checkpoint: Path, tmp_path: Path
) -> None:
    words = export_words(checkpoint, tmp_path / "out.onnx")
    process = on_two_ranks(words, tmp_path, "ditas_export.pipeline")
    _, errors = process.communicate(timeout=120)
    assert "exitcode  : 130" in errors
    first, second = said(tmp_path).values()
    assert first in (GOES_ON, "")  # torchrun may end it before it has begun, for the second's sake
    assert second == ""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ranks_that_are_interrupted_at_work_speak_once(checkpoint: Path, tmp_path: Path) -> None:
    """By the terminal, which sends the signal to all, and by torchrun, which sends it again."""
    process = on_two_ranks(export_words(checkpoint, tmp_path / "out.onnx"), tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.work/sampled-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert said(tmp_path) == {0: GOES_ON, 1: ""}


def test_signals_that_come_together_are_one() -> None:
    interruption = Interruption()
    with pytest.raises(KeyboardInterrupt):
        interruption.arrive(signal.SIGINT, None)
    interruption.arrive(signal.SIGTERM, None)
    assert interruption.exit_code == 130
    interruption.at -= 10
    with pytest.raises(KeyboardInterrupt):
        interruption.arrive(signal.SIGTERM, None)
    assert interruption.exit_code == 143


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
