"""What a command says of errors, whatever they are, and of an output that takes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ditas_export.cli.console import clean_errors, printing, stdout
from ditas_export.errors import DitasExportError
from ditas_export.plain_text import HEAD, TAIL, one_line, visible


class OutOfMemoryError(RuntimeError):
    """As PyTorch calls its own."""


def said(error: Exception, capsys: pytest.CaptureFixture[str], **options: bool) -> tuple[int, str]:
    """The exit code and what is printed."""
    with pytest.raises(SystemExit) as left, clean_errors(**options):
        raise error
    return int(str(left.value.code)), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DitasExportError("no; give more"), 2, "error: no; give more\n"),
        (
            ZeroDivisionError("division by zero"),
            70,
            "error: ZeroDivisionError: division by zero; this is a bug of ditas-export, report it "
            "with what --debug shows\n",
        ),
        (
            AssertionError(),
            70,
            "error: AssertionError; this is a bug of ditas-export, report it with what --debug "
            "shows\n",
        ),
        (
            OSError(28, "No space left on device", "/tmp/x"),
            2,
            "error: the system refuses: [Errno 28] No space left on device: '/tmp/x'; --debug "
            "shows what was asked of it\n",
        ),
        (
            MemoryError(),
            2,
            "error: out of memory (MemoryError); take fewer images or tokens at once, or a larger "
            "machine\n",
        ),
        (
            OutOfMemoryError("CUDA:\n 3 GiB"),
            2,
            "error: out of memory (CUDA: 3 GiB); take fewer images or tokens at once, or a larger "
            "machine\n",
        ),
    ],
)
def test_every_error_is_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str
) -> None:
    assert said(error, capsys) == (code, line)
    traced = said(error, capsys, debug=True)
    assert traced[0] == code
    assert traced[1].startswith("Traceback (most recent call last):\n")
    assert traced[1].endswith(f"\n{line}")


HOSTILE = "a\x1b[31m\nname\u202e\x9b2J"


def test_text_of_others_is_one_visible_line(capsys: pytest.CaptureFixture[str]) -> None:
    seen = "a\\x1b[31m name\\u202e\\x9b2J"
    assert said(DitasExportError(HOSTILE), capsys) == (2, f"error: {seen}\n")
    assert "\x1b" not in said(ValueError(HOSTILE), capsys, debug=True)[1]
    with clean_errors():
        warnings.warn(HOSTILE, RuntimeWarning, stacklevel=1)
        stdout().print(HOSTILE, markup=False)
    found = capsys.readouterr()
    assert found.err == f"warning: {seen}\n"
    assert found.out == "a\\x1b[31m\nname\\u202e\\x9b2J\n"


def test_a_long_refusal_keeps_its_beginning_and_its_end() -> None:
    refusal = "\n".join(f"line {number}" for number in range(10_000))
    found = one_line(refusal)
    assert len(found) < HEAD + TAIL + 50
    assert found.startswith("line 0 line 1 ")
    assert found.endswith(" line 9998 line 9999")
    assert " characters left out) " in found
    assert one_line("x" * (HEAD + TAIL)) == "x" * (HEAD + TAIL)


def test_ordinary_text_stays_as_it_is() -> None:
    text = "α·s → 76\N{NO-BREAK SPACE}800 数 é\n"
    assert visible(text) == text
    assert visible("\udcff") == "\\udcff"


@pytest.mark.parametrize("name", ["export", "sample", "build", "compare", "cache"])
def test_every_command_has_a_way_to_the_trace(name: str) -> None:
    command = ["verify", "--help"] if name == "cache" else ["--help"]
    words = [sys.executable, "-m", f"ditas_export.cli.{name}", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "--debug" in done.stdout
    assert not done.stderr


TOLD = "what was to be printed is lost, files that were written are whole\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["--help"]])
def test_an_output_that_takes_nothing_is_one_line(tmp_path: Path, words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ditas_export.cli.cache", *words],
            env={**os.environ, "DITAS_EXPORT_CACHE": str(tmp_path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    reason = "error: cannot write to the standard output: No space left on device; "
    assert done.stderr == reason + TOLD


def test_an_output_that_is_closed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as left, clean_errors(), printing():
        pass
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: the standard output is closed; {TOLD}"
