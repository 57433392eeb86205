"""Time the exported forms of a DiT-XL/2-width block pair in turns, one live session at a time.

    python scripts/bench_block_pair.py --rounds 7

Random weights, low-rank branch of rank 32 included: right for speed, not for quality. Files are
exported with `--target onnxruntime`; for OpenVINO in the portable form, too. A round opens a
session, warms it up, times it and closes it before the next form: idle sessions keep their threads
spinning. Prints medians, ratios to the float file, and the ratio of the best rounds (noise only
ever adds time) as a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from random_quantized import RANK, randomly_quantized

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.conditions.labels import labelled_inputs
from ditas_export.diffusion.runner import Runner
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

BLOCK_PAIR = DiTConfig(hidden_size=1152, depth=2, num_heads=16)


def seconds_per_run(open_runner: Callable[[], Runner], batch: int, runs: int) -> float:
    """Open a runner, warm it up, and return the median seconds of a forward pass."""
    with open_runner() as runner:
        return median_seconds(runner, batch, runs)


def median_seconds(runner: Runner, batch: int, runs: int) -> float:
    """Warm a runner up and return the median seconds of a forward pass."""
    config = runner.config
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    inputs = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        torch.full((batch,), 500),
        torch.arange(batch),
    )
    for _ in range(2):
        runner(labelled_inputs(*inputs))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        runner(labelled_inputs(*inputs))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cpu_facts() -> str:
    """Return the processor's name and the instruction sets that matter here."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line),
                platform.processor())  # fmt: skip
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    return f"{name} ({', '.join(flag for flag in wanted if f' {flag} ' in text)})"


def main() -> None:
    """Export the forms, time them in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=9, help="forward passes per round")
    parser.add_argument("--batch", type=int, default=2, help="rows, guidance halves included")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--openvino", action="store_true", help="also time the int4 files there")
    args = parser.parse_args()
    model = DiT(BLOCK_PAIR)
    randomize(model, seed=0)
    folded = fold_smoothing(randomly_quantized(model))
    with tempfile.TemporaryDirectory() as folder:
        files = {"onnxruntime float": Path(folder) / "float.onnx"}
        export_reference(model, files["onnxruntime float"])
        for ranges in ("token", "static"):
            for layout in ("int4", "int8"):
                path = Path(folder) / f"{layout}-{ranges}.onnx"
                export_onnx(folded, path, layout=layout, ranges=ranges, target="onnxruntime")
                files[f"onnxruntime {layout} {ranges}"] = path
        forms: dict[str, Callable[[], Runner]] = {
            name: lambda path=path: OnnxRuntimeRunner(path, as_is=True, threads=args.threads)
            for name, path in files.items()
        }
        if args.openvino:
            from ditas_export.runtime.openvino_runner import OpenVINORunner

            by_openvino = {"float": files["onnxruntime float"]}
            for ranges in ("token", "static"):
                by_openvino[f"int4 {ranges}"] = files[f"onnxruntime int4 {ranges}"]
                path = by_openvino[f"int4 {ranges}, portable"] = Path(folder) / f"{ranges}.onnx"
                export_onnx(folded, path, layout="int4", ranges=ranges)
            for name, path in by_openvino.items():
                forms[f"openvino {name}"] = lambda path=path: OpenVINORunner(
                    path, as_is=True, threads=args.threads
                )
        times: dict[str, list[float]] = {name: [] for name in forms}
        for round_index in range(args.rounds):
            for name, open_runner in forms.items():
                times[name].append(seconds_per_run(open_runner, args.batch, args.runs))
            print(f"round {round_index + 1}/{args.rounds}", flush=True)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    base = times["onnxruntime float"]
    print(
        f"\nDiT-XL/2-width block pair, {args.batch} rows of 256 tokens, rank {RANK}, float32 side"
    )
    print(f"{cpu_facts()}, {args.threads} threads, python {platform.python_version()}, "
          f"onnxruntime {metadata.version('onnxruntime')}")  # fmt: skip
    print("\n| form | ms | speed | lowest | highest | best | MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, values in times.items():
        ratios = [reference / value for reference, value in zip(base, values, strict=True)]
        size = f"{sizes[name] / 2**20:.1f}" if name in sizes else ""
        spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f}"
        best = f"{min(base) / min(values):.2f}"
        print(f"| {name} | {1e3 * statistics.median(values):.1f} | {spread} | {best} | {size} |")
    for ranges in ("token", "static"):
        pairs = zip(times[f"onnxruntime int4 {ranges}"], times[f"onnxruntime int8 {ranges}"],
                    strict=True)  # fmt: skip
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"\nint4 / int8 time, {ranges}: {ratio:.3f}")


if __name__ == "__main__":
    main()
