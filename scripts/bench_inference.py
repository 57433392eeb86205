"""Time a DiT-XL/2 on a CPU in every runtime, and its rivals, in turns, one alive at a time.

    python scripts/bench_inference.py --rounds 3
    python scripts/bench_inference.py --depth 2 --batch 8 --peers

Random weights, low-rank branch of rank 32 included: right for speed, not for quality. The exported
files are the default `int4` layout with a float32 side and the default's modulation, once for each
kind of ranges, portable and with `--target onnxruntime` ("joined": the branch is part of the
linear's product). A portable file runs in ONNX Runtime as in a session that is told nothing, and by
our runner, which writes the joined form of it. A round opens a
form, warms it up, times it and closes it before the next. `--peers` adds what else quantizes a DiT
to INT8 on a CPU: onnxruntime's dynamic quantization, OpenVINO's NNCF and torchao, each if it is
installed. `--only` keeps the forms whose names contain one of its words, and onnxruntime's float32.
Prints medians and ratios to that as a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from bench_block_pair import cpu_facts, median_seconds
from bench_torch_int8 import allow_graphs
from random_quantized import RANK, randomly_quantized
from torch import Tensor

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.diffusion.runner import Runner
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.families.base import ModelInputs
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.file_facts import read_config
from ditas_export.options import DEFAULTS
from ditas_export.runtime.onnxruntime_runner import BARE_SESSION, OnnxRuntimeRunner
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.torch_int8 import int8_model
from ditas_export.runtime.torch_runner import TorchRunner
from ditas_export.telemetry import import_openvino

BASE = "onnxruntime float32"
"""The form whose speed is 1."""

Opener = Callable[[], Runner]


class OpenVINOModelRunner:
    """Runs an OpenVINO model that holds a DiT: what NNCF makes has no place in our own runner."""

    description = "openvino"

    def __init__(self, path: Path, config: DiTConfig, threads: int) -> None:
        self.config = config
        self._model: Any = (
            import_openvino()
            .Core()
            .compile_model(
                str(path),
                "CPU",
                {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"},
            )
        )

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """Return ε and the learned variance."""
        latents, timesteps, class_labels = inputs.values()
        feed = [latents.numpy(), timesteps.numpy(), class_labels.numpy()]
        return torch.from_numpy(np.array(next(iter(self._model(feed).values()))))

    def __enter__(self) -> Self:
        """Return the runner."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the model go."""
        self._model = None


def main() -> None:
    """Write the files, time the forms in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5, help="forward passes per round")
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="guidance included")
    parser.add_argument("--depth", type=int, default=28, help="blocks; fewer fit a small machine")
    parser.add_argument("--side", type=int, default=32, help="of the latents: 32 or 64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="add other quantizers")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="forms to time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = DiTConfig(depth=args.depth, input_size=args.side)
    with tempfile.TemporaryDirectory() as folder:
        openers = ours(config, Path(folder), args.threads)
        if args.peers:
            openers |= dict(peers(config, Path(folder), args.threads))
        openers = {
            name: opener
            for name, opener in openers.items()
            if name == BASE or any(word in name for word in args.only)
        }
        allow_graphs(len(openers) * len(args.batch))  # at most, with every form compiled
        times: dict[tuple[str, int], list[float]] = {}
        for number in range(args.rounds):
            for name, opener in openers.items():
                with opener() as runner:
                    for batch in args.batch:
                        seconds = median_seconds(runner, batch, args.runs)
                        times.setdefault((name, batch), []).append(seconds)
            print(f"round {number + 1}/{args.rounds}", file=sys.stderr, flush=True)
    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("torch", "onnxruntime", "openvino", "nncf", "torchao")
        if importlib.util.find_spec(name)
    )
    print(f"DiT-XL/2 with {args.depth} blocks, {config.num_tokens} tokens a row, rank {RANK}")
    print(f"{cpu_facts()}, {args.threads} threads, {versions}\n")
    print("| form | rows | ms | speed | lowest | highest |")
    print("|---|---:|---:|---:|---:|---:|")
    for batch, name in itertools.product(args.batch, openers):
        values = times[name, batch]
        ratios = [a / b for a, b in zip(times[BASE, batch], values, strict=True)]
        print(
            f"| {name} | {batch} | {1e3 * statistics.median(values):.0f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
        )


def ours(config: DiTConfig, folder: Path, threads: int) -> dict[str, Opener]:
    """Return the float model and the exported files in every runtime."""
    model = random_model(config)
    reference = folder / "float.onnx"
    export_reference(model, reference)
    quantized = randomly_quantized(model)
    folded = fold_smoothing(quantize_adaln(quantized, DEFAULTS["adaln"]))
    files = {}
    for target in ("portable", "onnxruntime"):
        for ranges in ("token", "static"):
            files[target, ranges] = folder / f"{target}-{ranges}.onnx"
            export_onnx(folded, files[target, ranges], layout="int4", ranges=ranges, target=target)
    cache = folder / "cache"
    openers: dict[str, Opener] = {
        BASE: partial(OnnxRuntimeRunner, reference, threads=threads, cache=cache)
    }
    for (target, ranges), path in files.items():
        openers[f"onnxruntime {_form(target, ranges)}"] = partial(
            OnnxRuntimeRunner,
            path,
            as_is=True,
            threads=threads,
            cache=cache,
            session_entries=BARE_SESSION if target == "portable" else None,
        )
        if target == "portable":
            openers[f"onnxruntime {_form(target, ranges)}, by our runner"] = partial(
                OnnxRuntimeRunner, path, threads=threads, cache=cache
            )
    for precision in ("f32", "bf16"):
        openers[f"OpenVINO float, {precision}"] = partial(
            OpenVINORunner, reference, threads=threads, precision=precision
        )
        for (target, ranges), path in files.items():
            openers[f"OpenVINO {_form(target, ranges)}, {precision} beside it"] = partial(
                OpenVINORunner, path, as_is=True, threads=threads, precision=precision
            )
    openers["PyTorch float32"] = partial(TorchRunner, model)
    openers["PyTorch float32, compiled"] = partial(TorchRunner, compiled(model))
    half = copy.deepcopy(model).to(torch.bfloat16)
    openers["PyTorch bfloat16"] = partial(TorchRunner, half)
    openers["PyTorch bfloat16, compiled"] = partial(TorchRunner, compiled(half))
    integers = int8_model(fold_smoothing(quantized, dtype=torch.bfloat16), ranges="token")
    openers["PyTorch W4A8 token as INT8, compiled, bfloat16 beside it"] = partial(
        TorchRunner, compiled(integers)
    )
    return openers


def _form(target: str, ranges: str) -> str:
    """Return what a row of the table calls a file."""
    return f"W4A8 {ranges}{', joined' if target == 'onnxruntime' else ''}"


def peers(config: DiTConfig, folder: Path, threads: int) -> Iterator[tuple[str, Opener]]:
    """Yield what else quantizes the same model to INT8, as far as it is installed."""
    reference = folder / "float.onnx"
    yield (
        "onnxruntime quantize_dynamic",
        partial(
            OnnxRuntimeRunner,
            dynamically_quantized(reference, folder / "dynamic.onnx"),
            threads=threads,
        ),
    )
    if importlib.util.find_spec("nncf"):
        path = post_training_quantized(reference, folder / "nncf.xml")
        yield "OpenVINO NNCF INT8", partial(OpenVINOModelRunner, path, config, threads)
    if importlib.util.find_spec("torchao"):
        yield (
            "PyTorch torchao INT8 dynamic, compiled",
            partial(TorchRunner, compiled(by_torchao(config))),
        )


def random_model(config: DiTConfig) -> DiT:
    """Return the float model."""
    model = DiT(config)
    randomize(model, seed=0)
    return model.eval()


def compiled(model: DiT) -> DiT:
    """Return a model of the same weights that is compiled when it first meets a batch size."""
    model = copy.copy(model)
    model.compile(dynamic=False)
    return model


def dynamically_quantized(source: Path, target: Path) -> Path:
    """Quantize by onnxruntime: INT8 weights per channel, inputs per tensor at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    facts = list(model.metadata_props)
    del model.graph.value_info[:]  # shapes of Gemm weights, which the quantizer transposes
    plain = target.with_name("plain.onnx")
    onnx.save(model, str(plain), save_as_external_data=True, location="plain.onnx.data")
    quantize_dynamic(
        str(plain),
        str(target),
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )
    made = onnx.load(str(target), load_external_data=False)
    del made.metadata_props[:]
    made.metadata_props.extend(facts)
    target.write_bytes(made.SerializeToString())
    return target


def post_training_quantized(source: Path, target: Path) -> Path:
    """Quantize by NNCF's defaults for transformers, calibrated on four noisy inputs."""
    import_openvino()
    import nncf
    import openvino

    config = read_config(source)
    shape = (2, config.in_channels, config.input_size, config.input_size)
    samples = [
        {
            "latents": torch.randn(shape, generator=torch.Generator().manual_seed(step)).numpy(),
            "timesteps": np.full(2, step),
            "class_labels": np.arange(2),
        }
        for step in (999, 700, 400, 100)
    ]
    made = nncf.quantize(
        openvino.Core().read_model(str(source)),
        nncf.Dataset(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
    )
    openvino.save_model(made, str(target), compress_to_fp16=False)
    return target


def by_torchao(config: DiTConfig) -> DiT:
    """Quantize by torchao: INT8 weights per row, inputs per token at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = random_model(config).to(torch.bfloat16)
    quantize_(model.blocks, Int8DynamicActivationInt8WeightConfig())
    return model


if __name__ == "__main__":
    main()
