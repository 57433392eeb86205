"""Whether anything grows: thousands of images in each runner, a hundred exports in one process.

    python scripts/soak.py images            # 2000 images of 10 steps in each runner
    python scripts/soak.py exports           # 100 exports of the bundled model, 8 steps, 4 samples

Resident memory is taken after every batch, and after every export. What counts is the slope over
the last half (least squares): the first half fills caches. Descriptors and threads are counted
after a tenth of the work and at the end, garbage collected. Prints a Markdown table, and exits with
1 where a mark is missed.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from ditas_export.cli.console import clean_errors
from ditas_export.generation.sampler import Sampler, SamplingSettings
from ditas_export.options import ExportOptions
from ditas_export.pipeline import export
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.options import Runtime

BATCH = 8
STEPS = 10
MOST_PER_IMAGE = 20 * 2**10
MOST_PER_EXPORT = 2 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a process holds."""

    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> State:
        """Count, after what is garbage was collected."""
        gc.collect()
        status = Path("/proc/self/status").read_text().splitlines()
        threads = next(line for line in status if line.startswith("Threads:"))
        return cls(descriptors=len(os.listdir("/proc/self/fd")), threads=int(threads.split()[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """What was found of one subject."""

    name: str
    count: int
    slope: float  # bytes for each image or export, over the last half
    resident: int  # bytes at the end
    before: State  # after a tenth
    after: State

    def misses(self, most: float) -> bool:
        """Return whether anything grew more than it may."""
        return self.slope > most or self.before != self.after


def soak(name: str, count: int, each: int, work: Callable[[int], None]) -> Soaked:
    """Do a work again and again; `each` is how many images or exports one call makes."""
    calls = -(-count // each)
    resident: list[int] = []
    before = after = None
    for index in track(range(calls), description=name, console=Console(stderr=True)):
        work(index)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        if index == max(0, calls // 10 - 1):
            before = State.now()
        if index == calls - 1:  # here, where the bar's own thread is still there
            after = State.now()
    assert before is not None  # there is one call at least
    assert after is not None
    half = resident[len(resident) // 2 :]
    places = list(range(len(half)))
    slope = statistics.linear_regression(places, half).slope / each if len(half) > 1 else 0.0
    return Soaked(
        name=name,
        count=calls * each,
        slope=slope,
        resident=resident[-1],
        before=before,
        after=after,
    )


def soak_images(count: int) -> Iterator[Soaked]:
    """Sample in every runner of a machine without a GPU, one after the other."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        artifact = folder / "model.safetensors"
        export(
            ExportOptions(output=folder / "out.onnx", steps=8, samples=4, save_artifact=artifact)
        )
        runs: tuple[tuple[str, str, Runtime], ...] = (
            ("PyTorch, float32", "digits", "auto"),
            ("PyTorch, INT8 products", str(artifact), "auto"),
            ("onnxruntime", str(folder / "out.onnx"), "onnxruntime"),
            ("OpenVINO", str(folder / "out.onnx"), "openvino"),
        )
        for name, model, runtime in runs:
            with _sampling(model, runtime) as work:
                yield soak(name, count, BATCH, work)


@contextmanager
def _sampling(model: str, runtime: Runtime) -> Iterator[Callable[[int], None]]:
    """Yield what samples one batch."""
    with open_runner(model, runtime=runtime).runner as runner:
        classes = tuple(index % 10 for index in range(BATCH))
        sampler = Sampler(runner, SamplingSettings(classes=classes, steps=STEPS))
        yield lambda index: _one_batch(sampler, index)


def _one_batch(sampler: Sampler, _index: int) -> None:
    """Sample the batch and forget it."""
    sampler.run(0)


def soak_exports(count: int) -> Iterator[Soaked]:
    """Export the bundled model, calibration and proof included."""

    def work(_index: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            export(ExportOptions(output=Path(folder) / "out.onnx", steps=8, samples=4))

    yield soak("exports", count, 1, work)


def main() -> None:
    """Soak, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["images", "exports"])
    parser.add_argument("--count", type=int)
    args = parser.parse_args()
    is_images = args.what == "images"
    most = MOST_PER_IMAGE if is_images else MOST_PER_EXPORT
    count = args.count or (2000 if is_images else 100)
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", "openvino")
    )
    print(f"{versions}; {torch.get_num_threads()} threads; at most {most / 2**10:.0f} KiB each\n")
    titles = "what", "count", "KiB each", "MiB resident", "descriptors", "after", "threads", "after"
    print(f"| {' | '.join(titles)} |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    missed = False
    for found in soak_images(count) if is_images else soak_exports(count):
        missed |= found.misses(most)
        print(
            f"| {found.name} | {found.count} | {found.slope / 2**10:.2f} "
            f"| {found.resident / 2**20:.0f} | {found.before.descriptors} "
            f"| {found.after.descriptors} | {found.before.threads} | {found.after.threads} |",
            flush=True,
        )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    with clean_errors():
        main()
