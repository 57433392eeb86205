"""Time and memory of calibrating and quantizing a DiT-XL/2 of random weights, part by part.

    python scripts/bench_calibration.py                                 # all of it
    python scripts/bench_calibration.py --size 512 --blocks 2 --steps 2 # a part, and a projection
    python scripts/bench_calibration.py --fast                          # as `ditas-export --fast`
    python scripts/bench_calibration.py --device cuda --no-count        # on a GPU

Outliers are planted; the weights are random: right for time and memory, not for quality. With
fewer blocks, steps or samples, sampling and the blocks' parts are multiplied up to the paper's
setting (12 classes, 50 steps, guidance 1.5), the walk sees as many tokens as it would there, of
random states, and the table says that it is a projection. Operations are counted by torch on one
block's walk: products and attention, without triangular solves and updates in place.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import torch
from bench_block_pair import cpu_facts
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from ditas_export.calibration.calibrate import QuantizationSettings, peak_bytes, quantize_model
from ditas_export.calibration.states import CalibrationSettings, CalibrationStates, collect_states
from ditas_export.diffusion.diffusion_schedules import make_scheduler
from ditas_export.dit.model import DiT, randomize
from ditas_export.dit.presets import preset_config
from ditas_export.families.load import LoadedModel, load_model
from ditas_export.families.outliers import plant_outliers
from ditas_export.options import ExportOptions
from ditas_export.pipeline import quantization_settings, sampling_precision
from ditas_export.timings import Timings

DEPTH, STEPS, SAMPLES = 28, 50, 12
"""The paper's setting."""

PUBLISHED_TRAJECTORIES = 113
"""What the published code samples: one for the statistics, one for each of 112 linears."""

TERA = 1e12


def write_checkpoint(path: Path, size: int, blocks: int) -> None:
    """Write a random model with planted outliers."""
    config = replace(preset_config("DiT-XL/2"), input_size=size // 8, depth=blocks)
    model = DiT(config)
    randomize(model, seed=0)
    model = plant_outliers(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"num_heads": str(config.num_heads)})


def to_the_papers_setting(states: CalibrationStates) -> CalibrationStates:
    """Return random states of the paper's steps and samples, with the maxima of those sampled."""
    steps = states.latents.shape[0]
    of_step = torch.arange(STEPS) * steps // STEPS
    generator = torch.Generator().manual_seed(1)
    return replace(
        states,
        latents=torch.randn(STEPS, SAMPLES, *states.latents.shape[2:], generator=generator),
        timesteps=torch.linspace(999, 0, STEPS).long(),
        input_maxima={name: value[of_step] for name, value in states.input_maxima.items()},
        settings=replace(states.settings, steps=STEPS, classes=tuple(range(SAMPLES))),
    )


def forward_flops(model: DiT) -> float:
    """Return the floating-point operations of one row's forward pass, depth as in the paper."""
    config = model.config
    inputs = torch.zeros(1, config.in_channels, config.input_size, config.input_size)
    none = torch.zeros(1, dtype=torch.int64)
    device = model.pos_embed.device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(tensor.to(device) for tensor in (inputs, none, none)))
    return float(counter.get_total_flops()) * DEPTH / config.depth


def walk_flops(
    loaded: LoadedModel, states: CalibrationStates, settings: QuantizationSettings
) -> float:
    """Return the floating-point operations of the first block's walk, solving included."""
    first = replace(loaded.model.config, depth=1)
    with torch.device("meta"):
        model = DiT(first)
    parameters = loaded.model.state_dict()
    model.load_state_dict({name: parameters[name] for name in model.state_dict()}, assign=True)
    model.requires_grad_(requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        quantize_model(model, states, settings)
    return float(counter.get_total_flops())


def main() -> None:
    """Calibrate, and print where the time went."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", type=int, choices=(256, 512), default=256)
    parser.add_argument("--blocks", type=int, default=DEPTH)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of those that are sampled")
    parser.add_argument("--fast", action="store_true", help="as ditas-export --fast calibrates")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--no-count", action="store_true", help="leave out the operations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = ExportOptions(output=Path("out.onnx"), fast=args.fast)
    settings = quantization_settings(options)
    device = torch.device(args.device)
    precision = sampling_precision(options, device)
    timings = Timings()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            other.submit(write_checkpoint, path, args.size, args.blocks).result()
        with timings.part("reading the checkpoint"):
            loaded = load_model(path)
            loaded.model.to(device)
        make_scheduler("ddpm", 2)  # imports diffusers, which is no part of sampling
        asked = CalibrationSettings(
            steps=args.steps, classes=tuple(range(args.samples)), precision=precision
        )
        with timings.part("sampling"):
            states = collect_states(loaded.model, asked, identity=loaded.identity)
        if args.steps != STEPS or args.samples != SAMPLES:
            states = to_the_papers_setting(states)
        sampled_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        start = time.perf_counter()
        quantize_model(loaded.model, states, settings, timings=timings)
        elapsed = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        forward = forward_flops(loaded.model)
        block = 0.0 if args.no_count else walk_flops(loaded, states, settings)
    seconds = timings.seconds
    seconds["other"] = elapsed - sum(
        value
        for name, value in seconds.items()
        if name not in ("sampling", "reading the checkpoint")
    )
    by_depth = DEPTH / args.blocks
    factors = dict.fromkeys(seconds, by_depth)
    factors["sampling"] = by_depth * STEPS / args.steps * SAMPLES / args.samples
    whole_seconds = {name: value * factors[name] for name, value in seconds.items()}
    total = sum(whole_seconds.values())
    part = max(factors.values()) > 1
    print(f"DiT-XL/2 at {args.size} pixels, {settings.recipe.name}, sampled in {precision}, "
          f"{settings.walk_tokens} tokens in the walk, "
          f"{'projected from' if part else 'measured on'} {args.blocks} of {DEPTH} blocks, "
          f"{args.steps} of {STEPS} steps, {args.samples} of {SAMPLES} samples\n")  # fmt: skip
    print(f"| part | {'seconds measured | seconds projected' if part else 'seconds'} | share |")
    print(f"|---|{'---:|' * (3 if part else 2)}")
    for name, value in whole_seconds.items():
        measured = f" {seconds[name]:.1f} |" if part else ""
        print(f"| {name} |{measured} {value:.0f} | {value / total:.0%} |")
    print(f"| all |{f' {sum(seconds.values()):.1f} |' if part else ''} {total:.0f} | 100% |")
    forwards = 2 * STEPS * SAMPLES
    trajectory = forwards * forward
    print(f"\nA trajectory is {forwards} forward passes of a row, {trajectory / TERA:.0f} TFLOP.")
    if block:
        spent = trajectory + DEPTH * block
        published = PUBLISHED_TRAJECTORIES * trajectory
        print(f"Calibration: {spent / TERA:.0f} TFLOP, one trajectory and a walk as dear as "
              f"{DEPTH * block / forward:.0f} forward passes; the published code's "
              f"{PUBLISHED_TRAJECTORIES} trajectories take {published / TERA:.0f} TFLOP, "
              f"{published / spent:.0f} times as many.")  # fmt: skip
    estimate = peak_bytes(loaded.model.config, states.settings, settings)
    print(f"Peak RSS {peak:.2f} GiB, after sampling {sampled_peak:.2f}; the estimate beside the "
          f"model was {estimate / 2**30:.2f} GiB.")  # fmt: skip
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated() / 2**30
        print(f"{torch.cuda.get_device_name()}: at most {allocated:.2f} GiB allocated.")
    if args.blocks < DEPTH:
        missing = sum(p.numel() for p in loaded.model.blocks[0].parameters()) * 4 / 2**30
        print(
            f"The missing blocks' weights take another {missing * (DEPTH - args.blocks):.2f} GiB."
        )
    print(f"{cpu_facts()}, {args.threads} threads, python {platform.python_version()}, torch "
          f"{metadata.version('torch')}.")  # fmt: skip


if __name__ == "__main__":
    main()
