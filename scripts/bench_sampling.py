"""Measure what sampling costs outside the model, and how long a DiT-XL/2 takes to open.

    python scripts/bench_sampling.py --runtime onnxruntime --steps 5

Random weights, low-rank branch of rank 32 included; the default file, or `--adaln 4`. The file is
opened twice, each time in a process of its own: the first time nothing is prepared, the second time
what the first one kept is found. Each then samples one image with guidance. Prints a Markdown table
of seconds to import and open, the share of a step that is spent outside the model, and peak memory.
Then `ditas-sample` itself is run twice in the same way, two steps each: its seconds from start to
end without those of the sampling, so that all counts that a user waits for besides.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a process that is measured imports torch while it is
    from torch import Tensor

    from ditas_export.families.base import ModelInputs

NAMES = ("first time", "prepared")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process saw."""

    import_seconds: float
    open_seconds: float
    step_seconds: float
    outside_share: float  # of a step
    opened_mib: float  # resident once open
    peak_mib: float


def main() -> None:
    """Write the file, open it twice, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runtime", default="onnxruntime", choices=["onnxruntime", "openvino"])
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--adaln", type=int, default=8, choices=[16, 8, 4])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with context.Pool(1) as pool:
            facts = pool.apply(write, (path, args.depth, args.adaln))
        rows = []
        with tempfile.TemporaryDirectory() as cache:
            asked = (path, args.runtime, args.threads, Path(cache))
            for _ in NAMES:
                with context.Pool(1) as pool:
                    rows.append(pool.apply(measure, (*asked, args.steps)))
        with tempfile.TemporaryDirectory() as cache:
            asked = (path, args.runtime, args.threads, Path(cache))
            commands = [command_seconds(*asked) for _ in NAMES]
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", args.runtime)]
    print(f"{facts}, {args.threads} threads, python {platform.python_version()}, "
          f"{', '.join(versions)}; 1 image with guidance\n")  # fmt: skip
    print("| | import s | open s | a step s | outside the model | opened MiB | peak MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in zip(NAMES, rows, strict=True):
        print(
            f"| {name} | {row.import_seconds:.1f} | {row.open_seconds:.1f} "
            f"| {row.step_seconds:.3f} | {row.outside_share:.2%} "
            f"| {row.opened_mib:.0f} | {row.peak_mib:.0f} |"
        )
    waits = (f"{name} {seconds:.1f} s" for name, seconds in zip(NAMES, commands, strict=True))
    print(f"\nThe whole command, `ditas-sample`, without its sampling: {', '.join(waits)}")


def write(path: Path, depth: int, adaln: int) -> str:
    """Write the file; for a fresh process."""
    from bench_block_pair import cpu_facts
    from random_quantized import RANK, randomly_quantized

    from ditas_export.calibration.adaln import quantize_adaln
    from ditas_export.calibration.fold import fold_smoothing
    from ditas_export.dit.model import DiT, DiTConfig, randomize
    from ditas_export.onnx_export.export import export_onnx

    model = DiT(DiTConfig(depth=depth))
    randomize(model, seed=0)
    export_onnx(fold_smoothing(quantize_adaln(randomly_quantized(model), adaln)), path)
    size = path.stat().st_size / 2**20
    return f"DiT-XL/2 with {depth} blocks, rank {RANK}, file of {size:.0f} MiB; {cpu_facts()}"


def measure(path: Path, runtime: str, threads: int, cache: Path, steps: int) -> Measured:
    """Open the file and sample with it; for a fresh process."""
    start = time.perf_counter()
    from ditas_export.generation.sampler import Sampler, SamplingSettings
    from ditas_export.runtime.open_runner import open_runner

    imported = time.perf_counter()
    opened = open_runner(str(path), runtime=runtime, threads=threads, cache=cache)
    ready = time.perf_counter()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with opened.runner as runner:
        timed = Timed(runner)
        sampler = Sampler(timed, SamplingSettings(classes=(1,), steps=steps))
        sampler.run(0)  # warm
        timed.seconds = 0.0
        begin = time.perf_counter()
        sampler.run(0)
        total = time.perf_counter() - begin
    return Measured(
        import_seconds=imported - start,
        open_seconds=ready - imported,
        step_seconds=total / steps,
        outside_share=1 - timed.seconds / total,
        opened_mib=resident / 2**20,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    )


def command_seconds(path: Path, runtime: str, threads: int, cache: Path) -> float:
    """Run `ditas-sample` once and return its seconds without those of the sampling."""
    command = [sys.executable, "-m", "ditas_export.cli.sample", str(path), "--json"]
    command += ["--runtime", runtime, "--threads", str(threads)]
    command += ["--classes", "1", "--steps", "2", "--vae", "none"]
    environment = os.environ | {"DITAS_EXPORT_CACHE": str(cache)}
    with tempfile.TemporaryDirectory() as images:
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--output", images], env=environment, stdout=subprocess.PIPE, check=True
        )
        seconds = time.perf_counter() - start
    return seconds - float(json.loads(done.stdout)["seconds"])


class Timed:
    """A runner whose calls are timed."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        """Return the runner's own."""
        return getattr(self._runner, name)

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """Run the model and count the time."""
        start = time.perf_counter()
        out: Tensor = self._runner(inputs)
        self.seconds += time.perf_counter() - start
        return out


if __name__ == "__main__":
    main()
