"""The child process that holds NVIDIA's builder: one JSON request in, a plan and a log out.

Run as a script with the request as its argument; it imports nothing of this package. A refusal is
one line on stderr and exit code 1.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Build what the request on the command line asks for."""
    request = json.loads(sys.argv[1])
    try:
        trt: Any = importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        sys.exit(f"its libraries do not load ({error}); reinstall the extra [rtx]")
    lines: list[str] = []
    Path(request["log"]).touch()
    try:
        plan = _build(trt, _logger(trt, lines), request)
    finally:
        Path(request["log"]).write_text("\n".join(lines), encoding="utf-8")
    if plan is None:
        errors = [line for line in lines if line.startswith(("ERROR", "INTERNAL_ERROR"))]
        sys.exit(errors[-1].replace("\n", " ") if errors else "the builder gave no reason")
    Path(request["plan"]).write_bytes(plan)
    Path(request["result"]).write_text(json.dumps({"version": trt.__version__}), encoding="utf-8")


def _build(trt: Any, logger: Any, request: dict[str, Any]) -> Any:
    """Return the serialized engine, or None where parser or builder refuse."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        return None
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for name, shapes in request["shapes"].items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


def _logger(trt: Any, lines: list[str]) -> Any:
    """Return a logger that keeps every line, the most verbose too."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            lines.append(f"{severity.name} {message}")

    return Logger()


if __name__ == "__main__":
    main()
