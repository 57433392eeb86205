"""What integers in the modulation cost: one quantized model, its modulation float, 8 and 4 bits.

    ditas-export --save-artifact model.safetensors out.onnx
    python scripts/compare_modulation.py model.safetensors --model digits

All files are written from the same quantized model. Every image is sampled by every file from the
same noise, so differences are paired: the mean over images of what an image's final latents lose in
dB against the file of float modulation, and its 95 % interval (Student's t). Beside it the error of
single steps, Σ (out − float)² over all probed x_t, relative to that file's. Both as our runners run
a file, and in an `InferenceSession` that is told nothing. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.cli.console import clean_errors
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import trajectory
from ditas_export.evaluation.inputs import inputs_at
from ditas_export.evaluation.metrics import Difference
from ditas_export.families.base import ModelInputs
from ditas_export.families.load import load_model
from ditas_export.families.registry import conditions_of
from ditas_export.figures import confidence_interval
from ditas_export.onnx_export.export import export_onnx
from ditas_export.runtime.onnxruntime_runner import BARE_SESSION, OnnxRuntimeRunner
from ditas_export.runtime.torch_runner import TorchRunner

FIRST_SEED = 1000
"""Noise that calibration did not see."""

IMAGES_PER_SEED = 4
STEPS = 25
CFG_SCALE = 1.5
PROBED_EVERY = 5
BITS = (16, 8, 4)


def main() -> None:
    """Write the files, run each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    loaded = load_model(args.model)
    quantized = QuantizedModel.load(args.artifact, model=loaded.identity)
    classes = [index % loaded.model.config.num_labels for index in range(IMAGES_PER_SEED)]
    seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
    with TorchRunner(loaded.model) as runner:
        floats, inputs = _sampled(runner, seeds, classes)
        wanted = _answers(runner, inputs)
    print("| session | modulation | bytes | final latents, dB | lost, dB | 95 % | single step, % |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for session in ("our runner", "bare"):
            kept: tuple[list[float], float] | None = None
            for bits in BITS:
                path = Path(folder) / f"{bits}.onnx"
                if not path.exists():
                    export_onnx(fold_smoothing(quantize_adaln(quantized, bits)), path)
                is_bare = session == "bare"
                entries = BARE_SESSION if is_bare else None
                with OnnxRuntimeRunner(path, as_is=is_bare, session_entries=entries) as runner:
                    finals, _ = _sampled(runner, seeds, classes)
                    answers = _answers(runner, inputs)
                each = [
                    Difference.between(*pair).snr_db for pair in zip(floats, finals, strict=True)
                ]
                error = Difference.between(wanted, answers).noise
                if kept is None:
                    kept = each, error
                lost = [had - has for had, has in zip(kept[0], each, strict=True)]
                low, high = confidence_interval(lost)
                print(
                    f"| {session} | {bits} | {path.stat().st_size} | {statistics.fmean(each):.2f} "
                    f"| {statistics.fmean(lost):.2f} | {low:.2f} to {high:.2f} "
                    f"| {100 * (error / kept[1] - 1):+.1f} |",
                    flush=True,
                )


def _sampled(
    runner: Runner, seeds: range, classes: list[int]
) -> tuple[list[Tensor], list[ModelInputs]]:
    """Return every image's final latents, and the inputs at some steps of the first seed."""
    finals, inputs = [], []
    for seed in seeds:
        for step in trajectory(
            runner, classes=classes, steps=STEPS, cfg_scale=CFG_SCALE, seed=seed
        ):
            if step.index % PROBED_EVERY == 0:
                inputs.append(
                    inputs_at(step, CFG_SCALE, runner.config, conditions_of(runner.config))
                )
            last = step.next_latents
        finals += list(last)
    return finals, inputs


def _answers(runner: Runner, inputs: list[ModelInputs]) -> Tensor:
    """Return what a model answers to the inputs, one after the other."""
    return torch.cat([runner(each) for each in inputs])


if __name__ == "__main__":
    with clean_errors():
        main()
