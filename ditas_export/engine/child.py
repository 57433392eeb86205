"""Running the builder in a child process: it may crash, hang or be cancelled, and we stay whole."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ditas_export.engine.builder_process import BuildRequest
from ditas_export.errors import EngineError

OnProgress = Callable[[str, int, int], None]
"""Phase of the build, steps done, steps."""

SECONDS_TO_STOP = 10.0
"""What a cancelled builder gets to stop by itself; then it is killed."""


def run_builder(
    request: BuildRequest, *, on_progress: OnProgress | None, timeout_s: float
) -> dict[str, Any]:
    """Run the child process on a request and return what it says of the engine.

    Args:
        request: what `builder_process.py` reads.
        on_progress: called with every step that the builder tells.
        timeout_s: seconds after which the builder is given up.

    Raises:
        EngineError: the builder refuses, crashes or takes too long.
        KeyboardInterrupt: passed on once the builder has stopped.
    """
    title, onnx = request.title, request.onnx
    script = Path(__file__).with_name("builder_process.py")
    command = [sys.executable, "-P", str(script), json.dumps(dataclasses.asdict(request))]
    expired = threading.Event()

    def give_up() -> None:
        expired.set()
        child.kill()

    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as child,
    ):
        timer = threading.Timer(timeout_s, give_up)
        timer.start()
        try:
            _follow(child, on_progress)
        finally:
            timer.cancel()
            _stop(child)
        if expired.is_set():
            raise EngineError(f"{title} did not finish {onnx} within {timeout_s:g} s")
        if child.returncode < 0:
            raise EngineError(
                f"{title} crashed on {onnx} (signal {-child.returncode}); the graph has a form "
                f"that its builder cannot take"
            )
        result = _result(Path(request.result), errors)
    if "error" in result:
        reason = " ".join(result["error"].split())
        raise EngineError(f"{title} could not build {onnx}: {reason}")
    return result


def _follow(child: subprocess.Popen[bytes], on_progress: OnProgress | None) -> None:
    """Pass on what the child tells, until it ends."""
    assert child.stdout is not None  # it is a pipe
    for line in child.stdout:
        phase, done, steps = json.loads(line)
        if on_progress is not None:
            on_progress(phase, done, steps)
    child.wait()


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child: ask first, by the end of its standard input, then kill."""
    assert child.stdin is not None  # it is a pipe
    child.stdin.close()
    try:
        child.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        pass
    finally:
        child.kill()
        child.wait()


def _result(path: Path, errors: IO[bytes]) -> dict[str, Any]:
    """Return what the child wrote, or the last line of its complaints."""
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return {"error": lines[-1] if lines else "no reason given"}
