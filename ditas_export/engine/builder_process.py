"""The child process that holds NVIDIA's builder: one JSON request in, a plan and a log out.

Run as a script with the request as its argument; it imports nothing of this package, and the
request names the module to build with, `tensorrt` or `tensorrt_rtx`. Standard output carries
progress, one JSON list (phase, steps done, steps) a line. The parent holds standard input open: its
end cancels the build. What came of it is JSON in the result file, and a refusal is exit code 1.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ditas_export.engine.tensorrt_api import (
        Builder,
        IBuilderConfig,
        ILogger,
        INetworkDefinition,
        IProgressMonitor,
        Module,
    )

SECONDS_BETWEEN_LINES = 0.1
"""Steps of one phase that follow each other faster are not all told."""

TOLD_DEPTH = 1
"""Phases nested deeper are not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What the parent asks for, as JSON on the command line; None leaves it to the product."""

    title: str  # of the product, in errors
    module: str
    oldest: list[int]  # version that this package builds with
    onnx: str
    plan: str
    log: str
    result: str
    shapes: dict[str, list[list[int]]]  # of every input: smallest, usual, largest
    workspace_bytes: int | None
    opt_level: int | None
    compute_capabilities: list[str]
    timing_cache: str | None  # read and written
    version_compatible: bool
    refit: bool


class RefusalError(Exception):
    """Why there is no plan; without a message the log has the reason."""


def main() -> None:
    """Build what the request on the command line asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends our stdin
    request = BuildRequest(**json.loads(sys.argv[1]))
    tell, cancelled = _progress_writer(), _end_of_stdin()
    lines: list[str] = []
    try:
        trt = _load(request.module, request.oldest)
        logger, monitor = _logger(trt, lines), _monitor(trt, tell, cancelled)
        result = _build(trt, logger, monitor, request)
    except RefusalError as refusal:
        result = {"error": str(refusal) or _last_error(lines)}
    except Exception as error:  # whatever the bindings raise is their refusal
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(request.log).write_text("\n".join(lines), encoding="utf-8")
    Path(request.result).write_text(json.dumps(result), encoding="utf-8")
    sys.exit(1 if "error" in result else 0)


def _last_error(lines: list[str]) -> str:
    """Return the last error in the log."""
    errors = [line for line in lines if line.startswith(("ERROR", "INTERNAL_ERROR"))]
    return errors[-1] if errors else "the builder gave no reason"


def _load(module: str, oldest: list[int]) -> Module:
    """Import the product; RefusalError if its libraries do not load or are too old."""
    try:
        trt = cast("Module", importlib.import_module(module))
    except (ImportError, OSError) as error:
        raise RefusalError(f"its libraries do not load ({error}); install it again") from error
    found = [int(part) for part in trt.__version__.split(".")[:2]]
    if found < oldest:
        wanted = ".".join(str(part) for part in oldest)
        raise RefusalError(f"version {trt.__version__} is too old; install {wanted} or later")
    return trt


def _build(
    trt: Module, logger: ILogger, monitor: IProgressMonitor, request: BuildRequest
) -> dict[str, Any]:
    """Write the plan and, where asked for, the timing cache; return what is known of them."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    _set_options(trt, config, request)
    _parse(trt, network, logger, request.onnx)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor
    _add_profile(builder, config, request.shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusalError  # the log has the reason
    Path(request.plan).write_bytes(plan)
    if request.timing_cache is not None:
        cache = config.get_timing_cache()
        Path(request.timing_cache).write_bytes(cache.serialize())
    return {"version": trt.__version__}


def _parse(trt: Module, network: INetworkDefinition, logger: ILogger, onnx: str) -> None:
    """Read the ONNX file into the network; RefusalError with the parser's first reason."""
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(onnx):
        return
    reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
    raise RefusalError(*reasons[:1])


def _set_options(trt: Module, config: IBuilderConfig, request: BuildRequest) -> None:
    """Set what the request asks for; what it leaves out stays as the product has it.

    But for TF32, which is off: a float32 product in a file is one in the engine.
    """
    config.clear_flag(trt.BuilderFlag.TF32)
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.opt_level is not None:
        config.builder_optimization_level = request.opt_level
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if request.compute_capabilities:
        _set_compute_capabilities(trt, config, request.compute_capabilities)
    if request.timing_cache is not None:
        _use_timing_cache(config, Path(request.timing_cache))


def _set_compute_capabilities(trt: Module, config: IBuilderConfig, wanted: list[str]) -> None:
    """Name the GPUs to build for, such as "8.9"; only TensorRT for RTX builds for others."""
    if not hasattr(trt, "ComputeCapability"):
        raise RefusalError("it builds for the GPU at hand, not for compute capabilities")
    config.num_compute_capabilities = len(wanted)
    known = trt.ComputeCapability.__members__
    for index, number in enumerate(wanted):
        name = f"SM{number.replace('.', '')}"
        if name not in known or not config.set_compute_capability(known[name], index):
            names = ", ".join(f"{key[2:-1]}.{key[-1]}" for key in known if key.startswith("SM"))
            raise RefusalError(f"it does not build for compute capability {number}; only {names}")


def _use_timing_cache(config: IBuilderConfig, path: Path) -> None:
    """Attach the timings of earlier builds, or none yet; RefusalError if they are not for here."""
    cache = config.create_timing_cache(path.read_bytes())
    if not config.set_timing_cache(cache, False):
        raise RefusalError("the timing cache is of another GPU or version; name another file")


def _add_profile(
    builder: Builder, config: IBuilderConfig, shapes: dict[str, list[list[int]]]
) -> None:
    """Set the smallest, usual and largest shape of every input."""
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    config.add_optimization_profile(profile)


def _logger(trt: Module, lines: list[str]) -> ILogger:
    """Return a logger that keeps every line, the most verbose too."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # which module, is only known now
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            lines.append(f"{severity.name} {msg}")

    return Logger()


def _monitor(
    trt: Module, tell: Callable[[str, int, int], None], cancelled: threading.Event
) -> IProgressMonitor:
    """Return a monitor that tells how far the build is, and ends it when it is cancelled."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._phases: dict[str | None, tuple[int, int]] = {None: (-1, 0)}  # depth, steps
            self._told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            depth = self._phases.get(parent_phase, (TOLD_DEPTH, 0))[0] + 1
            self._phases[phase_name] = (depth, num_steps)
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
                self._told = time.monotonic()
                self._tell(phase_name, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._phases[phase_name][1])

        def _tell(self, phase: str, done: int) -> None:
            depth, steps = self._phases[phase]
            if depth <= TOLD_DEPTH:
                tell(phase, done, steps)

    return Monitor()


def _progress_writer() -> Callable[[str, int, int], None]:
    """Return a function that writes one line to the parent; what libraries print goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()  # the builder calls its monitor from several threads

    def tell(phase: str, done: int, steps: int) -> None:
        with lock:
            print(json.dumps([phase, done, steps]), file=stream, flush=True)

    return tell


def _end_of_stdin() -> threading.Event:
    """Return an event that is set when the parent closes our standard input, or is gone."""
    ended = threading.Event()

    def read() -> None:
        while os.read(0, 1):
            pass
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    return ended


if __name__ == "__main__":
    main()
