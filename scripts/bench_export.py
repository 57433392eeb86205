"""Measure the export of a DiT-XL/2: seconds, peak memory and bytes, form by form; engines too.

    python scripts/bench_export.py --build
    python scripts/bench_export.py --depth 2 --threads 2

Random weights, low-rank branch of rank 32 included: right for bytes, seconds and memory, not for
quality. Every form is folded, lowered, written and read again in a process of its own, so that the
peak resident set is its own; `--build` then builds an engine of it with TensorRT for RTX, in the
child process that the builder has anyway. Every process computes in one thread, or in `--threads`.
Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import torch
from bench_block_pair import cpu_facts
from random_quantized import RANK, randomly_quantized

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.engine.build import build_engine
from ditas_export.engine.products import RTX
from ditas_export.onnx_export.contract import check_contract
from ditas_export.onnx_export.export import export_onnx
from ditas_export.onnx_export.manifest import bytes_by_part

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime")

FORMS = [
    ("portable", "int4", "fp32", 16),
    ("portable", "int4", "fp32", 8),
    ("portable", "int4", "fp32", 4),
    ("portable", "int4", "fp16", 16),
    ("portable", "int4", "fp16", 8),
    ("portable", "int4", "fp16", 4),
    ("tensorrt", "int8", "fp16", 16),
]
"""Target, layout, float side, bits of the modulation."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What one export took."""

    seconds: float
    peak_mib: float
    file_mib: float
    parts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the build of one engine took."""

    seconds: float
    peak_mib: float
    plan_mib: float
    builder: str  # its version


def main() -> None:
    """Write the artefact once, export every form, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--build", action="store_true", help="build engines too")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that are started here
    config = DiTConfig(depth=args.depth)
    model = DiT(config)
    randomize(model, seed=0)
    float_mib = sum(tensor.numel() for tensor in model.state_dict().values()) * 4 / 2**20
    context = multiprocessing.get_context("spawn")
    exported, built = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        artefact = Path(folder) / "model.ditas.safetensors"
        randomly_quantized(model).save(artefact)
        artefact_mib = artefact.stat().st_size / 2**20
        del model
        for form in FORMS:
            path = Path(folder) / "model.onnx"
            with context.Pool(1) as pool:
                exported[form] = pool.apply(export, (artefact, path, form))
            if args.build:  # in a process of its own: a child's peak counts its parent's memory
                with context.Pool(1) as pool:
                    built[form] = pool.apply(build, (path,))
            for file in files_of(path):
                file.unlink()
    versions = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    versions += sorted({f"{RTX.title} {row.builder}" for row in built.values()})
    print(f"DiT-XL/2 with {args.depth} blocks, rank {RANK}; {cpu_facts()}, {args.threads} threads, "
          f"python {platform.python_version()}, {', '.join(versions)}")  # fmt: skip
    print(f"float32 parameters: {float_mib:.0f} MiB; artefact: {artefact_mib:.0f} MiB\n")
    print("| target | layout | float side | adaLN bits | export s | peak MiB | file MiB "
          "| build s | its peak MiB | plan MiB |")  # fmt: skip
    print("|" + "---|" * 4 + "---:|" * 6)
    for form, row in exported.items():
        values = [row.seconds, row.peak_mib, row.file_mib]
        if form in built:
            values += [built[form].seconds, built[form].peak_mib, built[form].plan_mib]
        cells = [f"{value:.0f}" for value in values] + [""] * (6 - len(values))
        print(f"| {' | '.join(map(str, form))} | {' | '.join(cells)} |")
    parts = list(dict.fromkeys(part for row in exported.values() for part in row.parts))
    print(
        "\n| MiB of tensors | " + " | ".join("-".join(map(str, form[1:])) for form in FORMS) + " |"
    )
    print("|---|" + "---:|" * len(FORMS))
    for part in parts:
        cells = [f"{row.parts.get(part, 0) / 2**20:.1f}" for row in exported.values()]
        print(f"| {part.replace('_', ' ')} | {' | '.join(cells)} |")


def files_of(path: Path) -> list[Path]:
    """Return an ONNX file and its external data, if it has any."""
    return [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]


def export(artefact: Path, path: Path, form: tuple[str, str, str, int]) -> Exported:
    """Export one form and read it again; for a fresh process."""
    target, layout, precision, adaln_bits = form
    start = time.perf_counter()
    quantized = quantize_adaln(QuantizedModel.load(artefact), adaln_bits)
    folded = fold_smoothing(quantized, dtype=DTYPES[precision])
    export_onnx(folded, path, layout=layout, target=target)
    model = ir.load(path)
    check_contract(model)
    return Exported(
        seconds=time.perf_counter() - start,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        file_mib=sum(file.stat().st_size for file in files_of(path)) / 2**20,
        parts=bytes_by_part(model, folded.config),
    )


def build(path: Path) -> Built:
    """Build an engine of a file; for a fresh process."""
    plan = path.with_name("model.plan")
    start = time.perf_counter()
    engine = build_engine(path, plan, product=RTX)
    return Built(
        seconds=time.perf_counter() - start,
        peak_mib=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10,
        plan_mib=engine.size_bytes / 2**20,
        builder=engine.version,
    )


if __name__ == "__main__":
    main()
