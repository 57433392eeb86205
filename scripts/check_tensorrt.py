"""Build every exported form with TensorRT or TensorRT for RTX; on a GPU, run and time the engines.

    python scripts/check_tensorrt.py

The bundled model and a DiT-XL/2 of random weights, both rounded to nearest: right for structure and
speed, not for quality. Every layout × range × precision of `--target tensorrt` is built and its
layer report read; with a GPU each plan is run by the driver, compared with onnxruntime on the same
file (OpenVINO for bf16, which onnxruntime does not run on CPUs), and timed with CUDA events against
the float16 file's engine, PyTorch in bfloat16, and the same compiled. A round opens a form, warms
it up, times it and closes it before the next. Prints Markdown tables. Without a GPU it builds and
says that the rest was not run. Exit code 1: a build was refused, or lost INT8.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from random_quantized import randomly_quantized

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.conditions.labels import labelled_inputs
from ditas_export.diffusion.runner import Runner
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.dit.presets import preset_config
from ditas_export.engine.build import build_engine
from ditas_export.engine.layers import Kernel, layers_from_inspector
from ditas_export.engine.make import current_gpu, make_engine
from ditas_export.engine.options import BatchRange, BuildOptions
from ditas_export.engine.products import Product, choose_product
from ditas_export.engine.report import LayerReport, layer_report, with_known_of
from ditas_export.errors import DitasExportError, EngineError
from ditas_export.evaluation.metrics import snr_db
from ditas_export.families.identity import identity_of
from ditas_export.families.load import load_model
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.form import FileForm
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.open_runner import onnxruntime_takes
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.tensorrt_runner import TensorRTRunner
from ditas_export.runtime.torch_runner import TorchRunner

BATCHES = (1, 2, 8, 32)
OPTIONS = BuildOptions(batch=BatchRange(smallest=1, usual=8, largest=32))
FLOAT_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BASELINE = "float fp16"
NOT_RUN = "Nothing was run: this machine has no CUDA GPU that PyTorch sees."


@dataclass(kw_only=True)
class Form:
    """One file of one model, and what is found out about it."""

    name: str
    plan: Path
    write: Callable[[Path], None]
    report: LayerReport | None = None
    problem: str = ""
    seconds: float = 0.0  # of the build
    size_mib: float = 0.0
    snr_db: float | None = None  # of a single step against the file on the CPU; None where not run

    @property
    def is_sound(self) -> bool:
        """Whether the builder took the file, the plan ran, and nothing shows a lost linear."""
        return not self.problem and not (self.report and self.report.lost)


def main() -> None:
    """Build, run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="the bundled model only")
    parser.add_argument("--backend", default="auto", help="tensorrt, rtx or auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=20, help="forward passes per round")
    args = parser.parse_args()
    product, sound = choose_product(args.backend), True
    print(facts(product))
    for name, model, rank in models(quick=args.quick):
        with tempfile.TemporaryDirectory() as folder:
            forms = all_forms(model, randomly_quantized(model, rank=rank), Path(folder))
            for form in forms:
                check(form, product, model.config, Path(folder))
            print_builds(name, forms)
            if current_gpu() is not None:
                print_times(name, timed(forms, model, Path(folder), args.rounds, args.runs))
        sound = sound and all(form.is_sound for form in forms)
    if current_gpu() is None:
        print(f"\n{NOT_RUN}")
    sys.exit(0 if sound else 1)


def models(*, quick: bool) -> Iterator[tuple[str, DiT, int]]:
    """Yield name, model and rank of the low-rank branch."""
    yield "bundled model", load_model("digits").model, 5
    if not quick:
        model = DiT(preset_config("DiT-XL/2"))
        randomize(model, seed=0)
        yield "DiT-XL/2, random weights", model.eval(), 32


def all_forms(model: DiT, quantized: QuantizedModel, folder: Path) -> list[Form]:
    """Return every quantized form, and the float16 model."""
    half, identity = copy.deepcopy(model).half(), identity_of(model)
    forms = [
        Form(
            name=BASELINE,
            plan=folder / "float.plan",
            write=lambda path: export_reference(half, path, identity=identity),
        )
    ]
    for precision, ranges, layout in itertools.product(
        FLOAT_TYPES, ("token", "static"), ("int4", "int8")
    ):

        def write(
            path: Path, dtype: str = precision, ranges: str = ranges, layout: str = layout
        ) -> None:
            folded = fold_smoothing(quantized, dtype=FLOAT_TYPES[dtype])
            export_onnx(folded, path, layout=layout, ranges=ranges, target="tensorrt")

        name = f"{layout} {ranges} {precision}"
        forms.append(Form(name=name, plan=folder / f"{name}.plan", write=write))
    return forms


def check(form: Form, product: Product, config: DiTConfig, folder: Path) -> None:
    """Build a form and, on a GPU, run it once; its ONNX file lives no longer than this."""
    print(f"{form.name} …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as files:
        onnx = Path(files) / "model.onnx"
        form.write(onnx)
        build = partial(build_engine, product=product, options=OPTIONS)
        start = time.perf_counter()
        try:
            made = make_engine(
                onnx, form.plan, product=product, options=OPTIONS, layout=None, build=build
            )
            form.seconds = time.perf_counter() - start
            form.size_mib = made.metadata.plan_bytes / 2**20
            form.report = made.report
            if current_gpu() is not None:
                run_once(form, onnx, config, made.metadata.form)
        except DitasExportError as error:
            form.problem = str(error).splitlines()[0]


def run_once(form: Form, onnx: Path, config: DiTConfig, written: FileForm) -> None:
    """Compare one step with the file on the CPU, and read the inspector."""
    inputs = example_inputs(config, batch=2)
    with (
        OnnxRuntimeRunner(onnx, as_is=True)
        if onnxruntime_takes(onnx)
        else OpenVINORunner(onnx) as runner
    ):
        expected = runner(labelled_inputs(*inputs))
    with TensorRTRunner(form.plan) as runner:
        form.snr_db = snr_db(expected, runner(labelled_inputs(*inputs)))
        text = runner.layer_information()
    try:
        inspected = layer_report(layers_from_inspector(text), config, written)
    except EngineError as error:
        print(f"{form.name}: {error}", file=sys.stderr)
        return  # the log's report stays
    form.report = with_known_of(inspected, form.report) if form.report else inspected


def example_inputs(
    config: DiTConfig, *, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, time steps and class labels."""
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return latents, torch.full((batch,), 500), torch.arange(batch) % config.num_classes


def timed(
    forms: list[Form], model: DiT, folder: Path, rounds: int, runs: int
) -> dict[str, dict[int, list[float]]]:
    """Return form -> batch -> milliseconds of every round, the forms taken in turns."""
    openers: dict[str, Callable[[], Runner]] = {
        form.name: partial(TensorRTRunner, form.plan, cache=folder / "cache")
        for form in forms
        if form.snr_db is not None
    }
    openers["PyTorch bfloat16"] = partial(torch_runner, model, compiled=False)
    openers["PyTorch bfloat16, compiled"] = partial(torch_runner, model, compiled=True)
    times: dict[str, dict[int, list[float]]] = {
        name: {batch: [] for batch in BATCHES} for name in openers
    }
    for number in range(rounds):
        for name, open_runner in list(openers.items()):
            try:
                with open_runner() as runner:
                    for batch in BATCHES:
                        times[name][batch].append(milliseconds(runner, batch, runs))
                del runner
            except DitasExportError as error:
                print(f"{name} is not timed: {error}", file=sys.stderr)
                del openers[name], times[name]
                for form in forms:
                    form.problem = str(error) if form.name == name else form.problem
            torch.cuda.empty_cache()
        print(f"round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    return times


def torch_runner(model: DiT, *, compiled: bool) -> TorchRunner:
    """Return the float model in bfloat16 on the GPU."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    if compiled:
        half.compile(dynamic=False)
    return TorchRunner(half, device="cuda")


def milliseconds(runner: Runner, batch: int, runs: int) -> float:
    """Return the time of one forward pass, inputs and output on the GPU, by CUDA events."""
    inputs = [tensor.cuda() for tensor in example_inputs(runner.config, batch=batch)]
    for _ in range(3):
        runner(labelled_inputs(*inputs))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(runs):
        runner(labelled_inputs(*inputs))
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / runs


def facts(product: Product) -> str:
    """Return versions and hardware."""
    gpu = current_gpu()
    words = [
        f"{product.title} {importlib.import_module(product.module).__version__}",
        f"torch {torch.__version__}",
        f"onnxruntime {metadata.version('onnxruntime')}",
        f"python {platform.python_version()}",
        "no GPU" if gpu is None else f"{gpu.name} ({gpu.compute_capability})",
    ]
    return ", ".join(words)


def print_builds(name: str, forms: list[Form]) -> None:
    """Print what the builder made of every form."""
    print(f"\n### {name}: builds\n")
    print("| form | linears as INT8×INT8 GEMM | INT4 kept | kernels | of a block | extra streams "
          "| fused attention | plan MiB | build s | SNR dB to the file on the CPU |")  # fmt: skip
    print("|" + "---|" * 10)
    for form in forms:
        print(f"| {form.name} | {' | '.join(build_cells(form))} |")


def build_cells(form: Form) -> list[str]:
    """Return the cells of a form."""
    report = form.report
    ran = form.problem or ("not run" if form.snr_db is None else f"{form.snr_db:.1f}")
    if report is None:
        size = [f"{form.size_mib:.1f}", f"{form.seconds:.0f}"] if form.size_mib else ["", ""]
        return ["unknown" if form.size_mib else "", *[""] * 5, *size, ran]
    linears = report.linears.values()
    unknown = f", {len(report.unknown)} unknown" if report.unknown else ""
    per_block = sorted({block.kernels for block in report.blocks})
    fused = sum(block.has_fused_attention for block in report.blocks)
    return [
        f"{sum(linear.kernel == Kernel.INTEGER for linear in linears)} of {len(linears)}{unknown}",
        f"{sum(linear.keeps_int4 for linear in linears)} of {len(linears)}",
        str(report.kernels),
        "–".join(str(count) for count in dict.fromkeys((per_block[0], per_block[-1]))),
        str(report.extra_streams),
        f"{fused} of {len(report.blocks)}",
        f"{form.size_mib:.1f}",
        f"{form.seconds:.0f}",
        ran,
    ]


def print_times(name: str, times: dict[str, dict[int, list[float]]]) -> None:
    """Print medians over rounds, and how they compare with the float16 engine's."""
    print(f"\n### {name}: ms per forward pass (times the speed of the {BASELINE} engine)\n")
    print(f"| form | {' | '.join(f'{batch} rows' for batch in BATCHES)} |")
    print("|" + "---|" * (len(BATCHES) + 1))
    for form, batches in times.items():
        cells = []
        for batch, values in batches.items():
            cell = f"{statistics.median(values):.2f}"
            if BASELINE in times:
                pairs = zip(times[BASELINE][batch], values, strict=True)
                cell += f" ({statistics.median(base / value for base, value in pairs):.2f}×)"
            cells.append(cell)
        print(f"| {form} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
