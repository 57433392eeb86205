"""The same build by NVIDIA's own programs: the command line, and running it.

`trtexec` 10.x needs --stronglyTyped; 11.x accepts it and builds no other networks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from ditas_export.artifact_files import atomic_path
from ditas_export.engine.build import BuiltEngine, input_shapes, shape_words
from ditas_export.engine.options import BuildOptions
from ditas_export.engine.products import RTX, Product
from ditas_export.errors import EngineError
from ditas_export.onnx_export.file_facts import read_config

MIB = 2**20

_VERSION = re.compile(r"TensorRT(?:-RTX| for RTX)? version: (\d+(?:\.\d+)+)")


def command_line(
    onnx_path: Path, plan_path: Path, *, product: Product, options: BuildOptions
) -> list[str]:
    """Return the words of the command that builds what `build_engine` builds.

    Raises:
        EngineError: an option that the product, or its program, does not have.
        OnnxExportError: the file does not say which model it holds.
    """
    product.require_options(options)
    shapes = input_shapes(read_config(onnx_path), options.batch)
    words = [product.tool, f"--onnx={onnx_path}", f"--saveEngine={plan_path}"]
    for index, name in enumerate(("minShapes", "optShapes", "maxShapes")):
        words.append(f"--{name}={shape_words(shapes, index)}")
    words.append("--skipInference")
    return words + (_rtx_words(options) if product == RTX else _tensorrt_words(options))


def _tensorrt_words(options: BuildOptions) -> list[str]:
    """Return the options of `trtexec`."""
    words = ["--stronglyTyped", "--noTF32", "--profilingVerbosity=detailed", "--verbose"]
    if options.workspace_bytes is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_bytes / MIB:g}")
    if options.opt_level is not None:
        words.append(f"--builderOptimizationLevel={options.opt_level}")
    if options.timing_cache is not None:
        words.append(f"--timingCacheFile={options.timing_cache}")
    if options.version_compatible:
        words.append("--versionCompatible")
    if options.refit:
        words.append("--refit")
    return words


def _rtx_words(options: BuildOptions) -> list[str]:
    """Return the options of `tensorrt_rtx`, as far as its documentation names them."""
    for name, value in (("workspace", options.workspace_gib), ("opt-level", options.opt_level)):
        if value is not None:
            raise EngineError(
                f"tensorrt_rtx documents no option for --{name}; leave it out, or build without "
                f"--trtexec"
            )
    words = ["--refit"] if options.refit else []
    if options.compute_capabilities:
        numbers = (number.replace(".", "") for number in options.compute_capabilities)
        words.append(f"--computeCapabilities={','.join(numbers)}")
    return words


def run_tool(
    onnx_path: Path, plan_path: Path, *, product: Product, options: BuildOptions
) -> BuiltEngine:
    """Build with the product's own program; the plan is there whole or not at all.

    Raises:
        EngineError: the program is not on the path, fails, or does not say its version.
        OnnxExportError: the file does not say which model it holds.
        ArtifactError: the plan cannot be written.
    """
    with atomic_path(plan_path) as plan:
        words = command_line(onnx_path, plan, product=product, options=options)
        if shutil.which(product.tool) is None:
            raise EngineError(f"{product.tool} is not on the PATH; install {product.title}")
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "[E]" in line]
            reason = errors[-1] if errors else f"exit code {done.returncode}"
            raise EngineError(f"{product.tool} could not build {onnx_path}: {reason}")
        version = _VERSION.search(done.stdout)
        if version is None:
            raise EngineError(f"{product.tool} did not say its version; its plan was not kept")
        return BuiltEngine(size_bytes=plan.stat().st_size, version=version[1], log=done.stdout)
