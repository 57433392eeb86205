"""Measure how the time of a step grows with batch, tokens and depth, and draw it.

    python scripts/bench_growth.py --picture docs/images/growth.png

DiT-XL/2-width blocks of random weights: two of them while the batch or the tokens grow, and two
rows of 256 tokens while the depth grows. A round opens a form once, times its points from the
smallest to the largest and closes it before the next; of the rounds the best counts, for noise
only adds time. The exponent between two neighbours is 1 where the time grows as the work does.
Needs matplotlib (extra `train`) for the picture.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch
from bench_block_pair import cpu_facts, median_seconds
from random_quantized import RANK, randomly_quantized

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.diffusion.runner import Runner
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.openvino_runner import OpenVINORunner

BATCHES = (1, 2, 4, 8, 16, 32)
SIDES = (16, 32, 48, 64)
DEPTHS = (1, 2, 4, 8)

Opener = Callable[[], Runner]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Milliseconds of every form at every point of one axis."""

    axis: str
    points: Sequence[int]
    milliseconds: dict[str, list[float]]  # form -> one per point


def main() -> None:
    """Time the three curves, print their tables, draw them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="forward passes per round and point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="PNG to draw the curves in")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair = {"depth": 2, "input_size": 32}
    curves = [
        measure("rows of 256 tokens", BATCHES, [(pair, BATCHES)], args),
        measure(
            "tokens a row, 2 rows",
            [(side // 2) ** 2 for side in SIDES],
            [({**pair, "input_size": side}, (2,)) for side in SIDES],
            args,
        ),
        measure("blocks, 2 rows", DEPTHS, [({**pair, "depth": d}, (2,)) for d in DEPTHS], args),
    ]
    versions = [f"{name} {metadata.version(name)}" for name in ("onnxruntime", "openvino")]
    print(f"DiT-XL/2-width blocks, rank {RANK}; {cpu_facts()}, {args.threads} threads, "
          f"{', '.join(versions)}")  # fmt: skip
    for curve in curves:
        print_table(curve)
    if args.picture:
        draw(curves, args.picture)


def measure(
    axis: str,
    points: Sequence[int],
    models: Sequence[tuple[dict[str, int], Sequence[int]]],
    args: argparse.Namespace,
) -> Curve:
    """Time one curve: of each model, the batches named with it."""
    found: dict[str, list[list[float]]] = {}
    for changes, batches in models:
        with tempfile.TemporaryDirectory() as folder:
            openers = forms(DiTConfig(**changes), Path(folder), args.threads)
            times: dict[tuple[str, int], list[float]] = {}
            for _ in range(args.rounds):
                for name, opener in openers.items():
                    with opener() as runner:
                        for batch in batches:
                            seconds = median_seconds(runner, batch, args.runs)
                            times.setdefault((name, batch), []).append(1e3 * seconds)
            for name in openers:
                found.setdefault(name, []).extend(times[name, batch] for batch in batches)
        print(f"{axis}: {changes} done", file=sys.stderr, flush=True)
    best = {name: [min(each) for each in values] for name, values in found.items()}
    return Curve(axis=axis, points=points, milliseconds=best)


def forms(config: DiTConfig, folder: Path, threads: int) -> dict[str, Opener]:
    """Return the float model and the default file in both CPU runtimes."""
    model = DiT(config)
    randomize(model, seed=0)
    reference, exported = folder / "float.onnx", folder / "int4-token.onnx"
    export_reference(model.eval(), reference)
    export_onnx(fold_smoothing(randomly_quantized(model)), exported, layout="int4", ranges="token")
    return {
        f"{runtime} {kind}": partial(opener, path, threads=threads)
        for runtime, opener in (("onnxruntime", OnnxRuntimeRunner), ("OpenVINO", OpenVINORunner))
        for kind, path in (("float32", reference), ("W4A8 token", exported))
    }


def exponents(points: Sequence[int], values: Sequence[float]) -> list[float]:
    """Return d log(time) / d log(work) between neighbours."""
    pairs = zip(pairwise(points), pairwise(values), strict=True)
    return [math.log(b / a) / math.log(q / p) for (p, q), (a, b) in pairs]


def print_table(curve: Curve) -> None:
    """Print milliseconds, and the exponent from the point before."""
    print(f"\n| {curve.axis} | " + " | ".join(map(str, curve.points)) + " |")
    print("|---|" + "---:|" * len(curve.points))
    for name, values in curve.milliseconds.items():
        grown = exponents(curve.points, values)
        print(f"| {name}, ms | {' | '.join(f'{value:.0f}' for value in values)} |")
        print(f"| {name}, exponent | | {' | '.join(f'{value:.2f}' for value in grown)} |")


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw time over work, both logarithmic, with a line of proportional growth."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(12, 3.6), layout="constrained")
    for plot, curve in zip(axes, curves, strict=True):
        for name, values in curve.milliseconds.items():
            style = "--" if name.endswith("float32") else "-"
            colour = "tab:blue" if name.startswith("onnxruntime") else "tab:orange"
            plot.loglog(curve.points, values, style, color=colour, marker="o", ms=3, label=name)
        lowest = min(values[0] for values in curve.milliseconds.values()) * 0.7
        ideal = [lowest * point / curve.points[0] for point in curve.points]
        plot.loglog(curve.points, ideal, ":", color="grey", label="proportional")
        plot.set_xticks(curve.points, [str(point) for point in curve.points])
        plot.minorticks_off()
        plot.set_xlabel(curve.axis)
        plot.grid(alpha=0.3)
    axes[0].set_ylabel("ms a step")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
